"""Errors that the command line prints as one line, with exit code 2, and notes about a model."""

from __future__ import annotations

import sys
import warnings


class InputError(Exception):
    """A fault in the user's input: one line with what is wrong, where, and what to do about it.

    The place is a file, a key or a value.
    """


class UnsupportedModel(InputError):
    """A module type without a surgery rule; the message contains the module's path and type."""


class ModelWarning(UserWarning):
    """A model is computed in another way than it was given, such as in another precision."""


def warn_of_model(text: str) -> None:
    """Warn with `ModelWarning`, at the line outside of the package that called it."""
    level, frame = 1, sys._getframe()
    package = f"{__package__.partition('.')[0]}."
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ModelWarning, stacklevel=level)
