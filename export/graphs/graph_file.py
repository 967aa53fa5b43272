"""Reading an .onnx file: untrusted bytes become a valid, sorted graph without functions."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper, inliner

from ...core.errors import InputError
from .external_weights import WAY_OUT, add_weights, checker_errors
from .model_proto import STANDARD_DOMAINS, opset_of
from .nested_nodes import RUNTIME_DOMAIN, inner_graphs, order_problem, sort_nodes, variable_node
from .torch_graph import simplify, strip_metadata

# Protobuf parses no message of 2 GiB; larger models keep their weights in other files.
MAX_MESSAGE_BYTES = 2**31 - 1
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
    add_weights(model, path)
    sort_nodes(model)
    if problem := order_problem(model.graph):
        raise InputError(f"{path}: not a valid ONNX model ({problem}); {WAY_OUT}")
    # Earlier versions want all initializers among the inputs, where no runtime folds them.
    model.ir_version = max(model.ir_version, LEAST_IR)
    model.graph.name = model.graph.name or path.stem
    if RUNTIME_DOMAIN not in {entry.domain for entry in model.opset_import}:
        # The runtime knows its own operators without an import; the checker does not.
        model.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    with checker_errors(path):
        onnx.checker.check_model(_outline(model))
    _infer_output_shapes(model)
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
    with checker_errors(path):
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


# ---- checks --------------------------------------------------------------------------------------


def _outline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy for the checker, which reads one message only and some rules too strictly.

    Large weights become inputs. The runtime needs no shapes of inputs and outputs.
    """
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = model.graph
    copy.graph.name = graph.name
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


def _infer_output_shapes(model: onnx.ModelProto) -> None:
    """State the shapes of outputs that have none, where they can be inferred."""
    if all(value.type.tensor_type.HasField("shape") for value in model.graph.output):
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # inference is a hint; it reads one message and raises types without a base
        return
    for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
        value.type.CopyFrom(found.type)


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
                f"{path}: node {name!r} ({node.op_type}) holds inner graphs that are no constant "
                "choice; export the model for inference alone"
            )
    return simpler


def _drop_unused_imports(model: onnx.ModelProto) -> None:
    used = {node.domain for node in model.graph.node} | set(STANDARD_DOMAINS)
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
