"""The network that the surgery cuts: architecture as plain data, modules, size, cost and files."""
