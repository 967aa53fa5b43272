"""An ONNX graph on disk; above protobuf's limit its weights go to a file of their own."""

from __future__ import annotations

from pathlib import Path

import onnx

from .artifact import FileEntry, entry_for

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
# Protobuf refuses messages of 2 GiB; the graph itself needs some room.
EXTERNAL_ABOVE_BYTES = 2_000_000_000


def save_model(model: onnx.ModelProto, folder: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES) -> list[FileEntry]:
    """Write `model.onnx`, and `model.onnx.data` if the weights are larger than the limit; the manifest's lines for them."""
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if size <= external_above_bytes:
        onnx.save(model, str(folder / MODEL))
        return [entry_for(folder, MODEL, "model")]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, str(folder / MODEL), save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS, size_threshold=1024)
    return [entry_for(folder, MODEL, "model"), entry_for(folder, WEIGHTS, "weights")]
