"""Operations on `onnx.ModelProto`: save, open a session, read the opset, choose unused names.

Above protobuf's size limit the weights are stored in a file next to the graph.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from ..artifact import entry_for
from ..manifest import FileEntry
from ..sessions import open_session

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
STANDARD_DOMAINS = ("", "ai.onnx")
# Part of the names of the nodes in which rounding is amplified, which reduced precisions spare.
LINEAR_ATTENTION = "linear_attention"
# Part of the names of the nodes that score tokens, where rounding would change the choice.
SCORES = "token_scores"
# The names of selections of tokens begin with the one, those of their chosen places end with the
# other.
SELECT, INDICES = "select.", "/indices"
# Protobuf refuses messages of 2 GiB; the graph itself needs some space.
EXTERNAL_ABOVE_BYTES = 2_000_000_000


def in_stem(name: str) -> bool:
    """Whether a node of vitrim's graph forms belongs to the patch embedding, by its name."""
    return name == "stem" or name.startswith("before.")


def in_selection(name: str) -> bool:
    """Whether a node of vitrim's graph forms selects tokens, by its name."""
    return name.startswith(SELECT)


def keeps_single_precision(name: str) -> bool:
    """Whether reduced precisions spare a node of vitrim's graph forms, by its name."""
    return LINEAR_ATTENTION in name or (in_selection(name) and SCORES in name)


def save_model(
    model: onnx.ModelProto, folder: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES
) -> list[FileEntry]:
    """Write `model.onnx`, and `model.onnx.data` where the weights exceed the limit.

    Returns:
        The manifest's entries of the written files.
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
    """Open an ONNX Runtime session on a graph in memory.

    Args:
        model: The graph. Above the limit it is loaded through a temporary file.
        threads: Threads within an operator.
        config: Session config entries, over the defaults of `sessions`.
        optimised: Whether the runtime optimises the graph.
        external_above_bytes: Weights above this size do not fit a protobuf message.

    Returns:
        The session.
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


def opset_of(model: onnx.ModelProto) -> int | None:
    """Return the version of the standard's operators, or None where the graph uses none."""
    return max(
        (entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS),
        default=None,
    )


def unused_name(name: str, used: set[str]) -> str:
    """Return `name`, with a number appended if it is in `used`, and add the result to `used`."""
    found, number = name, 1
    while found in used:
        number += 1
        found = f"{name}_{number}"
    used.add(found)
    return found
