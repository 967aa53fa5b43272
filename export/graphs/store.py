"""An ONNX graph on disk; above protobuf's limit its weights go to a file of their own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from ..artifact import FileEntry, entry_for
from ..sessions import open_session

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
# Protobuf refuses messages of 2 GiB; the graph itself needs some room.
EXTERNAL_ABOVE_BYTES = 2_000_000_000


def save_model(
    model: onnx.ModelProto, folder: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES
) -> list[FileEntry]:
    """Write `model.onnx`, and `model.onnx.data` if the weights are larger than the limit; the
    manifest's lines for them.
    """
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if size <= external_above_bytes:
        onnx.save(model, str(folder / MODEL))
        return [entry_for(folder, MODEL, "model")]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(
        copy,
        str(folder / MODEL),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=WEIGHTS,
        size_threshold=1024,
    )
    return [entry_for(folder, MODEL, "model"), entry_for(folder, WEIGHTS, "weights")]


def open_graph(
    model: onnx.ModelProto,
    *,
    threads: int = 1,
    config: dict[str, str] | None = None,
    optimised: bool = True,
    external_above_bytes: int = EXTERNAL_ABOVE_BYTES,
) -> onnxruntime.InferenceSession:
    """A session on a graph in memory; one that is too large for a message goes through a file that
    is gone again when this returns.
    """
    if sum(tensor.ByteSize() for tensor in model.graph.initializer) <= external_above_bytes:
        return open_session(
            model.SerializeToString(), threads=threads, config=config, optimised=optimised
        )
    with tempfile.TemporaryDirectory(prefix="vitrim-graph-") as folder:
        save_model(model, Path(folder), external_above_bytes=external_above_bytes)
        return open_session(
            Path(folder) / MODEL, threads=threads, config=config, optimised=optimised
        )
