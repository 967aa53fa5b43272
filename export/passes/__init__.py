"""Exact transformations of ONNX graphs that somebody else wrote: one a file, each with what it
requires and ensures, `modified` true only when so.
"""

from __future__ import annotations

from .contract import Pass, Result
from .sequence import PASSES, Step, steps

__all__ = ["PASSES", "Pass", "Result", "Step", "steps"]
