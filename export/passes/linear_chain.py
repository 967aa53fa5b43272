"""A product with a constant matrix and the constant sum that may follow it.

Several passes match and write it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from .graph_editor import Array, GraphEditor, attribute, is_standard


@dataclass(frozen=True)
class LinearChain:
    """y = x W + b.

    Attributes:
        x: Name of the input.
        weight: (in, out).
        bias: (out,), or None.
        first: The product.
        last: The node whose output is y.
    """

    x: str
    weight: Array
    bias: Array | None
    first: onnx.NodeProto
    last: onnx.NodeProto

    @property
    def y(self) -> str:
        """Name of the output."""
        return str(self.last.output[0])


def linear_making(editor: GraphEditor, name: str) -> LinearChain | None:
    """Return the linear map that computes a value, if its product has no other reader."""
    node = editor.maker.get(name)
    if node is None or not is_standard(node):
        return None
    if node.op_type == "Gemm":
        return _gemm(editor, node)
    if node.op_type == "MatMul":
        weight = editor.value(node.input[1])
        return (
            LinearChain(node.input[0], weight, None, node, node)
            if weight is not None and weight.ndim == 2
            else None
        )
    if node.op_type != "Add":
        return None
    for product, shift in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        bias, times = editor.value(shift), editor.made_by(product, "MatMul")
        if bias is None or times is None or editor.only_reader(product) is None:
            continue
        weight = editor.value(times.input[1])
        if (
            weight is not None
            and weight.ndim == 2
            and bias.size in (1, weight.shape[1])
            and bias.size == bias.shape[-1]
        ):
            return LinearChain(
                times.input[0],
                weight,
                np.broadcast_to(bias.ravel(), (weight.shape[1],)),
                times,
                node,
            )
    return None


def _gemm(editor: GraphEditor, node: onnx.NodeProto) -> LinearChain | None:
    weight = editor.value(node.input[1])
    if (
        weight is None
        or attribute(node, "transA", 0)
        or attribute(node, "alpha", 1.0) != 1.0
        or attribute(node, "beta", 1.0) != 1.0
    ):
        return None
    weight = weight.T if attribute(node, "transB", 0) else weight
    if len(node.input) < 3 or not node.input[2]:
        return LinearChain(node.input[0], weight, None, node, node)
    bias = editor.value(node.input[2])
    if (
        bias is None
        or bias.size not in (1, weight.shape[1])
        or (bias.size > 1 and bias.shape[-1] != bias.size)
    ):
        return None
    return LinearChain(
        node.input[0], weight, np.broadcast_to(bias.ravel(), (weight.shape[1],)), node, node
    )


def write_linear(
    editor: GraphEditor,
    chain: LinearChain,
    weight: Array,
    bias: Array | None,
    output: str,
    *,
    name: str,
) -> list[onnx.NodeProto]:
    """Make the nodes of `output` = x weight + bias, of the same operators as the chain's.

    Args:
        editor: Gets the constants, not the nodes.
        chain: States x, the operators and the type of the constants.
        weight: (in, out).
        bias: (out,), or None.
        output: Name of the result.
        name: Prefix of the constants' names.

    Returns:
        The nodes, in order of computation.
    """
    matrix = editor.constant(f"{name}.weight", weight.astype(chain.weight.dtype))
    shift = (
        None if bias is None else editor.constant(f"{name}.bias", bias.astype(chain.weight.dtype))
    )
    if chain.first.op_type == "Gemm":
        return [editor.node("Gemm", [chain.x, matrix, *([shift] if shift else [])], output)]
    if shift is None:
        return [editor.node("MatMul", [chain.x, matrix], output)]
    product = editor.fresh(f"{name}.product")
    return [
        editor.node("MatMul", [chain.x, matrix], product),
        editor.node("Add", [product, shift], output),
    ]


def replace_linear(
    editor: GraphEditor, chain: LinearChain, weight: Array, bias: Array | None
) -> None:
    """Rewrite a chain with other weights under the same output name.

    Args:
        editor: The graph.
        chain: The nodes to replace.
        weight: (in, out).
        bias: (out,), or None.
    """
    nodes = write_linear(
        editor,
        chain,
        weight,
        bias,
        chain.y,
        name=editor.fresh(f"{chain.first.name or chain.y}.folded"),
    )
    editor.insert_before(chain.last, nodes)
    editor.graph.node.remove(chain.last)
    if chain.first is not chain.last:
        editor.graph.node.remove(chain.first)
    editor.index()
