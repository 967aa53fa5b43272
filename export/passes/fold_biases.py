"""Sums of constants are one constant: of two in a row, and of a product with a matrix in a Gemm.

Requires: (x + a) + b with constants a and b; or a MatMul of a value with two dimensions and a sum
behind it. Ensures: no such pair.
"""

from __future__ import annotations

import numpy as np
import onnx

from .contract import Result
from .linear_chain import linear_making
from .net import Net

name = "fold-biases"
requires = "constants as initializers, as constant folding leaves them"
ensures = "no two constant sums in a row, no MatMul and Add on matrices"


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    net = Net(model, shapes=True)
    count = 0
    # First all sums: a Gemm takes one bias.
    for rewrite in (_joined, _gemm):
        for node in list(net.graph.node):
            alive = net.maker.get(node.output[0])
            if alive is not None and alive.op_type == "Add":
                count += rewrite(net, alive)
    return Result(net.finished() if count else model, count)


def _constant_side(net: Net, node: onnx.NodeProto) -> tuple[str, str] | None:
    """(value, constant) of a sum."""
    for value, constant in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        if net.value(constant) is not None and net.value(value) is None:
            return value, constant
    return None


def _joined(net: Net, node: onnx.NodeProto) -> bool:
    outer = _constant_side(net, node)
    inner_node = net.made_by(outer[0], "Add") if outer else None
    inner = _constant_side(net, inner_node) if inner_node is not None else None
    if outer is None or inner is None or inner_node is None or net.only_reader(outer[0]) is None:
        return False
    first, second = net.value(inner[1]), net.value(outer[1])
    assert first is not None
    assert second is not None
    together = first.astype(np.float64) + second.astype(np.float64)
    # A sum that is larger than both would cost more than it saves.
    if together.size > max(first.size, second.size) or first.dtype != second.dtype:
        return False
    node.input[0], node.input[1] = (
        inner[0],
        net.constant(f"{node.name or node.output[0]}.constants", together.astype(first.dtype)),
    )
    net.graph.node.remove(inner_node)
    net.index()
    return True


def _gemm(net: Net, node: onnx.NodeProto) -> bool:
    chain = linear_making(net, node.output[0])
    if (
        chain is None
        or chain.first.op_type != "MatMul"
        or chain.bias is None
        or len(net.shapes.get(chain.x, ())) != 2
    ):
        return False
    bias = net.constant(f"{node.name or node.output[0]}.bias", np.ascontiguousarray(chain.bias))
    gemm = net.node("Gemm", [chain.x, chain.first.input[1], bias], node.output[0])
    net.insert_before(node, [gemm])
    net.graph.node.remove(node)
    net.graph.node.remove(chain.first)
    net.index()
    return True
