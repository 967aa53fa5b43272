"""Running artifacts on devices, and reporting what was measured."""
