"""From a saved model to `model.pte`; run by conversion.py, in a Python that has ExecuTorch."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

from converting import converter, load_model  # beside this file, which is run as a script


def convert(job: dict[str, Any]) -> dict[str, str]:
    """Export, quantize where asked for, hand to XNNPACK what it takes, and write."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, images = load_model(job)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        if job["precision"] == "int8":
            program = torch.export.export(in_eight_bits(program.module(), images), (images,))
        written = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()]
        ).to_executorch()
    with open(os.path.join(job["out"], "model.pte"), "wb") as stream:
        stream.write(written.buffer)
    return {name: importlib.metadata.version(name) for name in ("executorch", "torch", "torchao")}


def in_eight_bits(module: Any, images: Any) -> Any:
    """Weights a channel in eight bits, inputs quantized as they come."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    )
    prepared = prepare_pt2e(module, quantizer)
    prepared(images)
    return convert_pt2e(prepared)


if __name__ == "__main__":
    sys.exit(converter(convert))
