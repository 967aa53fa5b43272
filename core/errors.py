"""What vitrim raises when the user's input is at fault; the command line prints the message and
exits with 2.
"""

from __future__ import annotations


class InputError(Exception):
    """One line that names what is wrong, where (file, key or value), and the way out."""


class UnsupportedModel(InputError):
    """A module that the compactor has no rule for; the message holds its path and type."""
