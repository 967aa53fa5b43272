"""From a saved model to `model.tflite`; run by conversion.py, in a Python that has litert-torch."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

from converting import converter, load_model  # beside this file, which is run as a script


def convert(job: dict[str, Any]) -> dict[str, str]:
    """Export, convert, and quantize where asked for."""
    import litert_torch
    import torch

    model, images = load_model(job)
    path = os.path.join(job["out"], "model.tflite")
    with torch.no_grad():
        litert_torch.convert(model, (images,)).export(path)
    if job["precision"] == "int8":
        from ai_edge_quantizer import quantizer, recipe

        quantizer.Quantizer(path, recipe.dynamic_wi8_afp32()).quantize().export_model(
            path, overwrite=True
        )
    return {
        name: importlib.metadata.version(name)
        for name in ("litert-torch", "ai-edge-litert", "torch")
    }


if __name__ == "__main__":
    sys.exit(converter(convert))
