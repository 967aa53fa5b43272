"""What a pass is. Ideas after onnx/ir-py's passes: a transformation says what it needs, and what
holds afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx


@dataclass(frozen=True)
class Result:
    """The model after a pass, the very same object when nothing was found, and how often the
    pattern was rewritten.
    """

    model: onnx.ModelProto
    count: int

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return self.count > 0


class Pass(Protocol):
    """One exact transformation. It never touches the model that it is given, and passes over
    whatever it cannot prove.
    """

    @property
    def name(self) -> str:
        """What a manifest's stage calls it."""

    @property
    def requires(self) -> str:
        """What a graph must look like for the pass to find anything."""

    @property
    def ensures(self) -> str:
        """What holds afterwards, beside the same answers."""

    def __call__(self, model: onnx.ModelProto) -> Result:
        """Rewrite a copy."""
