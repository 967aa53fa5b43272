"""Errors that the command line prints as one line, with exit code 2."""

from __future__ import annotations


class InputError(Exception):
    """A fault in the user's input: one line with what is wrong, where, and what to do about it.

    The place is a file, a key or a value.
    """


class UnsupportedModel(InputError):
    """A module type without a surgery rule; the message contains the module's path and type."""
