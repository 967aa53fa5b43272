"""Reading an .onnx file: untrusted bytes become a valid, sorted graph without functions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import external_data_helper, helper, inliner

from ...core.errors import InputError
from .model_proto import STANDARD_DOMAINS, opset_of
from .nested_nodes import RUNTIME_DOMAIN, inner_graphs, order_problem, sort_nodes, variable_node
from .torch_graph import simplify, strip_metadata

MAX_GRAPH_BYTES = 64 * 1024**3
# Protobuf parses no message of 2 GiB; larger models keep their weights in other files.
MAX_MESSAGE_BYTES = 2**31 - 1
WAY_OUT = "export it again"
_LFS = b"version https://git-lfs"
# Weights from this size on are not passed to the checker.
LARGE_BYTES = 1 << 20
# The first version of the format whose initializers need not be inputs as well.
LEAST_IR = 4


def read_graph(path: Path) -> onnx.ModelProto:
    """Read and check a model, with its external weights from its own folder.

    Nodes that are only out of order are sorted, and local functions are inlined.

    Raises:
        InputError: The file is not a valid model, or its outputs vary from run to run; the message
            names the file and the reason.
    """
    model = _parsed(path)
    _require_graph(model, path)
    _add_weights(model, path)
    sort_nodes(model)
    if problem := order_problem(model.graph):
        raise InputError(f"{path}: not a valid ONNX model ({problem}); {WAY_OUT}")
    # Earlier versions want all initializers among the inputs, where no runtime folds them.
    model.ir_version = max(model.ir_version, LEAST_IR)
    if RUNTIME_DOMAIN not in {entry.domain for entry in model.opset_import}:
        # The runtime knows its own operators without an import; the checker does not.
        model.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    with _checker_errors(path):
        onnx.checker.check_model(_outline(model))
    _require_stable(model, path)
    model = _inlined(model, path)
    _require_stable(model, path)
    model = strip_metadata(_without_inner_graphs(model, path))
    _drop_unused_imports(model)
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an .onnx file, or a folder that vitrim saved")
    size = path.stat().st_size
    if size > MAX_MESSAGE_BYTES:
        raise InputError(
            f"{path}: {size} bytes are more than protobuf reads ({MAX_MESSAGE_BYTES}); "
            "save its weights as external data, in a file beside it"
        )
    with _checker_errors(path):
        content = path.read_bytes()
        if content.startswith(_LFS):
            raise InputError(f"{path}: a Git LFS pointer and not the model; run `git lfs pull`")
        return onnx.load_model_from_string(content)


def _require_graph(model: onnx.ModelProto, path: Path) -> None:
    """Raise InputError for messages that are not even the outline of a model."""
    reason = None
    if not model.HasField("graph") or not model.graph.node:
        reason = "it has no graph with nodes"
    elif opset_of(model) is None:
        reason = "it names no version of ONNX's operators"
    if reason is not None:
        raise InputError(f"{path}: not a valid ONNX model ({reason}); {WAY_OUT}")


@contextlib.contextmanager
def _checker_errors(path: Path) -> Iterator[None]:
    """Turn what protobuf, the checker and the file system raise into InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # types without a common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a valid ONNX model ({reason}); {WAY_OUT}") from None


# ---- weights in other files ----------------------------------------------------------------------


def external_files(path: Path, model: onnx.ModelProto) -> list[Path]:
    """Return the files with a model's external weights, each once.

    Raises:
        InputError: One is missing, or is not a plain file in the model's own folder.
    """
    root = path.resolve().parent
    found: dict[Path, None] = {}
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = root / location
        subject = f"{path}: not a valid ONNX model (weights {tensor.name!r} are in {location!r}, "
        # The checks of the onnx package depend on its version.
        if not location or os.path.isabs(location) or not _is_inside(file, root):
            raise InputError(f"{subject}outside of its folder); save them beside it")
        if not file.is_file():
            raise InputError(f"{subject}a file that is missing); copy it into the model's folder")
        _require_range(file, entries, subject)
        found[file] = None
    return list(found)


def _is_inside(file: Path, root: Path) -> bool:
    """Return whether a path stays in a folder, links followed."""
    return ".." not in file.parts and file.resolve().is_relative_to(root)


def _require_range(file: Path, entries: dict[str, str], subject: str) -> None:
    size = file.stat().st_size
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        raise InputError(f"{subject}at a place that is no number); {WAY_OUT}") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(
            f"{subject}which has {size} bytes and not {offset + length}); copy the whole file again"
        )


def _add_weights(model: onnx.ModelProto, path: Path) -> None:
    """Load the external weights into the model."""
    files = external_files(path, model)
    size = sum(file.stat().st_size for file in files)
    if size > MAX_GRAPH_BYTES:
        raise InputError(f"{path}: {size} bytes are more than a model may have ({MAX_GRAPH_BYTES})")
    if files:
        with _checker_errors(path):
            onnx.load_external_data_for_model(model, str(path.resolve().parent))


def _outline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy for the checker, which reads one message only and some rules too strictly.

    Large weights become inputs. The runtime needs no shapes of inputs and outputs.
    """
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = model.graph
    copy.graph.name = graph.name or "graph"
    copy.graph.node.extend(graph.node)
    copy.graph.input.extend(graph.input)
    copy.graph.output.extend(graph.output)
    copy.graph.sparse_initializer.extend(graph.sparse_initializer)
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.ByteSize() < LARGE_BYTES:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            copy.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    for value in (*copy.graph.input, *copy.graph.output):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and not kind.HasField("shape"):
            kind.shape.SetInParent()
    return copy


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


# ---- nodes ---------------------------------------------------------------------------------------


def _require_stable(model: onnx.ModelProto, path: Path) -> None:
    if reason := variable_node(model):
        raise InputError(f"{path}: {reason}; export the model for inference (eval mode)")


def _inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Return the model without local functions."""
    if not model.functions:
        return model
    try:
        inlined = inliner.inline_local_functions(model, convert_version=True)
    except Exception as error:  # a native tool with its own errors
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: its functions cannot be inlined ({reason}); export it without functions"
        ) from None
    if inlined.functions:
        names = ", ".join(entry.name for entry in inlined.functions)
        raise InputError(
            f"{path}: its functions cannot be inlined ({names}); export it without functions"
        )
    sort_nodes(inlined)
    return inlined


def _without_inner_graphs(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Return the model without If and Loop, which simplification removes if they are constant."""
    if not any(inner_graphs(node) for node in model.graph.node):
        return model
    simpler, _ = simplify(model)
    for node in simpler.graph.node:
        if inner_graphs(node):
            name = node.name or node.output[0]
            raise InputError(
                f"{path}: node {name!r} ({node.op_type}) holds inner graphs that depend on the "
                "input; export the model for inference alone"
            )
    return simpler


def _drop_unused_imports(model: onnx.ModelProto) -> None:
    used = {node.domain for node in model.graph.node} | set(STANDARD_DOMAINS)
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
