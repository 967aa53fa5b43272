"""The standard's opset up to 20, the first with Gelu.

Requires: operators that onnx's version converter knows. Ensures: opset 20 or more; where the
converter fails, the model stays as it is.
"""

from __future__ import annotations

import onnx

from .contract import Result

name = "raise-opset"
requires = "operators that onnx's version converter knows"
ensures = "opset 20 or more"

WANTED = 20


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    version = max(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        default=0,
    )
    if version >= WANTED or any(
        entry.domain not in ("", "ai.onnx") for entry in model.opset_import
    ):
        return Result(model, 0)
    try:
        raised = onnx.version_converter.convert_version(model, WANTED)
        onnx.checker.check_model(raised)
    except Exception:  # a converter with errors of many types; the old opset runs as well
        return Result(model, 0)
    return Result(raised, 1)
