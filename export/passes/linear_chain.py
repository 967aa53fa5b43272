"""A product with a constant matrix and the sum of a constant vector that may follow it: what
several passes look for and write.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from .net import Array, Net, attribute


@dataclass(frozen=True)
class LinearChain:
    """y = x W + b. weight: (in, out); bias: (out,) or None; last: the node whose output is y;
    first: the product.
    """

    x: str
    weight: Array
    bias: Array | None
    first: onnx.NodeProto
    last: onnx.NodeProto

    @property
    def y(self) -> str:
        """The value that it makes."""
        return str(self.last.output[0])


def linear_making(net: Net, name: str) -> LinearChain | None:
    """The linear map that makes a value, whose product nobody else reads."""
    node = net.maker.get(name)
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gemm":
        return _gemm(net, node)
    if node.op_type == "MatMul":
        weight = net.value(node.input[1])
        return (
            LinearChain(node.input[0], weight, None, node, node)
            if weight is not None and weight.ndim == 2
            else None
        )
    if node.op_type != "Add":
        return None
    for product, shift in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        bias, times = net.value(shift), net.made_by(product, "MatMul")
        if bias is None or times is None or net.only_reader(product) is None:
            continue
        weight = net.value(times.input[1])
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


def _gemm(net: Net, node: onnx.NodeProto) -> LinearChain | None:
    weight = net.value(node.input[1])
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
    bias = net.value(node.input[2])
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
    net: Net, chain: LinearChain, weight: Array, bias: Array | None, output: str, *, name: str
) -> list[onnx.NodeProto]:
    """Nodes that make `output` = x weight + bias, of the same kind as the chain's."""
    matrix = net.constant(f"{name}.weight", weight.astype(chain.weight.dtype))
    shift = None if bias is None else net.constant(f"{name}.bias", bias.astype(chain.weight.dtype))
    if chain.first.op_type == "Gemm":
        return [net.node("Gemm", [chain.x, matrix, *([shift] if shift else [])], output)]
    if shift is None:
        return [net.node("MatMul", [chain.x, matrix], output)]
    product = net.fresh(f"{name}.product")
    return [
        net.node("MatMul", [chain.x, matrix], product),
        net.node("Add", [product, shift], output),
    ]


def replace_linear(net: Net, chain: LinearChain, weight: Array, bias: Array | None) -> None:
    """Write the chain anew with other numbers, making the same value."""
    nodes = write_linear(
        net, chain, weight, bias, chain.y, name=net.fresh(f"{chain.first.name or chain.y}.folded")
    )
    net.insert_before(chain.last, nodes)
    net.graph.node.remove(chain.last)
    if chain.first is not chain.last:
        net.graph.node.remove(chain.first)
    net.index()
