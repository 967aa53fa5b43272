"""Which published models can be compacted exactly."""
