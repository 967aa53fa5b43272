"""ExecuTorch: `model.pte`; run as a script, the converter, in a Python that has ExecuTorch."""

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
    """Export, quantize for int8, delegate to XNNPACK what it supports, and write `model.pte`.

    Returns:
        The versions of the packages.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, images = load_model(job)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        if job["precision"] == "int8":
            program = torch.export.export(quantized(program.module(), images), (images,))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        written = lowered.to_executorch()
    with open(os.path.join(job["out"], "model.pte"), "wb") as stream:
        stream.write(written.buffer)
    return {name: importlib.metadata.version(name) for name in ("executorch", "torch", "torchao")}


def quantized(module: Any, images: Any) -> Any:
    """The module with int8 weights, one scale a channel, and dynamically quantized activations."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(module, XNNPACKQuantizer().set_global(config))
    prepared(images)
    return convert_pt2e(prepared)


if __name__ == "__main__":
    sys.exit(run_converter(convert))
else:
    RUNTIME = SubprocessRuntime(
        "executorch",
        extra="executorch",
        module="executorch",
        script=__file__,
        main="model.pte",
    )
