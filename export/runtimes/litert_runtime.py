"""LiteRT: `model.tflite`; run as a script, the converter, in a Python that has litert-torch.

int8 stores weights in eight bits; activations stay fp32 in the file and are quantized as they come.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

if __name__ == "__main__":  # Beside this file; the package is not importable there.
    from converter import load_model, run_converter
else:
    from .conversion import SubprocessRuntime
    from .converter import load_model


def convert(job: dict[str, Any]) -> dict[str, str]:
    """Convert, quantize for int8, and write `model.tflite`.

    Returns:
        The versions of the packages.
    """
    import litert_torch
    import torch

    model, images = load_model(job)
    path = os.path.join(job["out"], "model.tflite")
    with torch.no_grad():
        litert_torch.convert(model, (images,)).export(path)
    if job["precision"] == "int8":
        from ai_edge_quantizer import quantizer, recipe

        converted = quantizer.Quantizer(path, recipe.dynamic_wi8_afp32()).quantize()
        converted.export_model(path, overwrite=True)
    names = ("litert-torch", "ai-edge-litert", "torch")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(run_converter(convert))
else:
    RUNTIME = SubprocessRuntime(
        "litert",
        extra="litert",
        module="litert_torch",
        script=__file__,
        main="model.tflite",
    )
