"""Which version of the standard a graph is written in."""

from __future__ import annotations

import onnx


def opset_of(model: onnx.ModelProto) -> int | None:
    """The version of the standard's operators, or None where the graph uses none."""
    return max(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        default=None,
    )
