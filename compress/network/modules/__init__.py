"""The PyTorch modules of a network that an `Architecture` describes."""
