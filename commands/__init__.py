"""The command line's commands, one a file; each reads and writes the values of the chain."""
