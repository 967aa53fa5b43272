"""Small ONNX classifiers that tests change into what exporters of others write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import TensorProto, helper, numpy_helper

CLASSES = 4
FLATTEN = helper.make_node("Flatten", ["x"], ["f"], "flatten")
PRODUCT = helper.make_node("MatMul", ["f", "w"], ["y"], "product")
HIDDEN = helper.make_node("MatMul", ["f", "w"], ["z"], "product")


def tensor(name: str, *shape: int, dtype: DTypeLike = np.float32) -> onnx.TensorProto:
    """Random weights, small enough for half precision; of integer types all codes of seven bits."""
    source = np.random.default_rng(sum(shape))
    if np.dtype(dtype).kind == "i":
        values = source.integers(-63, 63, shape).astype(dtype)
    else:
        values = (0.1 * source.standard_normal(shape)).astype(dtype)
    return numpy_helper.from_array(values, name)


def value(name: str, *sizes: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output; sizes that are names are free."""
    return helper.make_tensor_value_info(name, kind, list(sizes))


def classifier(
    nodes: Sequence[onnx.NodeProto] = (FLATTEN, PRODUCT),
    *,
    entry: onnx.ValueInfoProto | None = None,
    result: onnx.ValueInfoProto | None = None,
    weights: Sequence[onnx.TensorProto] | None = None,
    opset: int = 20,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """`x` (batch, 3, 16, 16) -> `y` (batch, classes), by default one product.

    Args:
        nodes: Its nodes.
        entry: The input.
        result: The output.
        weights: Its initializers, by default the matrix `w`.
        opset: Version of the standard's operators.
        functions: Local functions, of the domain "local".
        domains: Further domains to import.
    """
    graph = helper.make_graph(
        list(nodes),
        "sample",
        [entry or value("x", "n", 3, 16, 16)],
        [result or value("y", "n", CLASSES)],
        [tensor("w", 768, CLASSES)] if weights is None else list(weights),
    )
    further = [*domains, *(["local"] if functions else [])]
    return helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", opset),
            *(helper.make_opsetid(domain, 1) for domain in further),
        ],
        ir_version=10,
        functions=list(functions),
    )


def written(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """The file of a model, which is not checked."""
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def channels_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same classifier with an input of (batch, height, width, channels)."""
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    only = moved.graph.input[0]
    batch, *image = only.type.tensor_type.shape.dim
    for node in moved.graph.node:
        node.input[:] = ["first" if name == only.name else name for name in node.input]
    move = helper.make_node("Transpose", [only.name], ["first"], "to-first", perm=[0, 3, 1, 2])
    moved.graph.node.insert(0, move)
    channels, height, width = (side.dim_value for side in image)
    free = batch.dim_value or batch.dim_param
    only.CopyFrom(value(only.name, free, height, width, channels))
    return moved
