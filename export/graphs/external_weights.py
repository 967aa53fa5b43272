"""Weights that a model keeps in other files, which must be plain files of its own folder.

Free of torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import external_data_helper

from ...core.errors import InputError
from .nested_nodes import inner_graphs

MAX_GRAPH_BYTES = 64 * 1024**3
WAY_OUT = "export it again"


@contextlib.contextmanager
def checker_errors(path: Path) -> Iterator[None]:
    """Turn what protobuf, the checker and the file system raise into InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # types without a common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a valid ONNX model ({reason}); {WAY_OUT}") from None


@dataclass(frozen=True)
class _Place:
    """Where the values of a tensor are: `length` bytes of a file, 0 for the rest of it."""

    tensor: onnx.TensorProto
    file: Path
    offset: int
    length: int


def external_files(path: Path, model: onnx.ModelProto) -> list[Path]:
    """Return the files with a model's external weights, each once.

    Raises:
        InputError: One is missing, or is not a plain file in the model's own folder.
    """
    return list(dict.fromkeys(place.file for place in _places(path, model)))


def add_weights(model: onnx.ModelProto, path: Path) -> None:
    """Load the external weights into the model.

    Raises:
        InputError: See `external_files`.
    """
    places = list(_places(path, model))
    size = sum(file.stat().st_size for file in {place.file for place in places})
    if size > MAX_GRAPH_BYTES:
        raise InputError(f"{path}: {size} bytes are more than a model may have ({MAX_GRAPH_BYTES})")
    with checker_errors(path):
        for place in places:
            with place.file.open("rb") as stream:
                stream.seek(place.offset)
                place.tensor.raw_data = stream.read(place.length or -1)
            place.tensor.data_location = onnx.TensorProto.DEFAULT
            del place.tensor.external_data[:]


def _places(path: Path, model: onnx.ModelProto) -> Iterator[_Place]:
    folder = Path(os.path.abspath(path)).parent
    # Download caches link the model and its weights into one folder of contents.
    folders = (folder.resolve(), path.resolve().parent)
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = folder / location
        subject = f"{path}: not a valid ONNX model (weights {tensor.name!r} are in {location!r}, "
        inside = any(file.resolve().is_relative_to(allowed) for allowed in folders)
        if not location or os.path.isabs(location) or ".." in Path(location).parts or not inside:
            raise InputError(f"{subject}outside of its folder); save them beside it")
        if not file.is_file():
            raise InputError(f"{subject}a file that is missing); copy it into the model's folder")
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except ValueError:
            raise InputError(f"{subject}at a place that is no number); {WAY_OUT}") from None
        size = file.stat().st_size
        if offset < 0 or length < 0 or offset + length > size:
            raise InputError(
                f"{subject}which has {size} bytes and not {offset + length}); copy the whole file "
                "again"
            )
        yield _Place(tensor, file, offset, length)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors of a graph, those of nodes and of inner graphs among them."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for entry in node.attribute:
            yield from (*([entry.t] if entry.HasField("t") else []), *entry.tensors)
        for inner in inner_graphs(node):
            yield from _tensors(inner)
