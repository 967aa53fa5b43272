"""The bias of keys is left out, since it adds the same to all scores of a query; the bias of values
goes into the output's, since shares sum to one.

Requires: MatMul(shares, values) with shares = Softmax over the last dimension of MatMul(queries,
keys), perhaps scaled, or with a constant added; keys and values made by x W + b through Reshape and
Transpose that nobody else reads. That the bias is the same for every token is not read off the
pattern but computed: the bias alone is sent through the same nodes. Ensures: no such bias.
"""

from __future__ import annotations

import numpy as np
import onnx

from .contract import Result
from .linear_chain import LinearChain, linear_making, replace_linear
from .net import Array, Net, attribute

name = "fold-attention-biases"
requires = "separate products for keys and values, as split-qkv leaves them, and static shapes"
ensures = "no bias of keys; values' biases in the output projection"


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    net = Net(model, shapes=True)
    count = 0
    for softmax in [node for node in net.graph.node if node.op_type == "Softmax"]:
        rank = len(net.shapes.get(softmax.input[0], ()))
        if rank < 3 or attribute(softmax, "axis", -1) not in (-1, rank - 1):
            continue
        count += _keys(net, softmax) + _values(net, softmax)
    return Result(net.finished() if count else model, count)


def _keys(net: Net, softmax: onnx.NodeProto) -> bool:
    scores = softmax.input[0]
    while (node := net.made_by(scores, "Mul", "Div", "Add", "Sub")) is not None:
        constant = net.value(node.input[1])
        if constant is None or (node.op_type in ("Mul", "Div") and constant.size != 1):
            return False
        scores = node.input[0]
    product = net.made_by(scores, "MatMul")
    found = _source(net, product.input[1]) if product is not None else None
    if found is None or found[0].bias is None:
        return False
    chain, moves = found
    alone = _alone(net, chain, moves)
    # (…, width, tokens): what each token adds to a query's scores must be the same.
    if alone is None or not np.array_equal(alone, np.broadcast_to(alone[..., :1], alone.shape)):
        return False
    replace_linear(net, chain, chain.weight, None)
    return True


def _values(net: Net, softmax: onnx.NodeProto) -> bool:
    mix = net.only_reader(softmax.output[0])
    if mix is None or mix.op_type != "MatMul" or mix.input[0] != softmax.output[0]:
        return False
    found = _source(net, mix.input[1])
    if found is None or found[0].bias is None:
        return False
    chain, moves = found
    alone = _alone(net, chain, moves)
    if alone is None or not np.array_equal(alone, np.broadcast_to(alone[..., :1, :], alone.shape)):
        return False
    queries = net.shapes.get(mix.output[0], (None, None))[-2]
    if queries is None:
        return False
    # Whatever the shares are, they make this of the bias.
    mixed = np.broadcast_to(alone[..., :1, :], (*alone.shape[:-2], queries, alone.shape[-1]))
    value = mix.output[0]
    while True:
        reader = net.only_reader(value)
        if reader is None:
            return False
        out = linear_making(net, reader.output[0])
        if out is not None and out.first is reader:
            break
        moved = _moved(net, reader, mixed)
        if moved is None or reader.input[0] != value:
            return False
        mixed, value = moved, reader.output[0]
    rows = mixed.reshape(-1, mixed.shape[-1])
    if not np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape)):
        return False
    follower = net.only_reader(out.y)
    whole = (
        linear_making(net, follower.output[0])
        if follower is not None and follower.op_type == "Add"
        else None
    )
    out = whole if whole is not None and whole.first is out.first else out
    shift = rows[0].astype(np.float64) @ out.weight.astype(np.float64)
    replace_linear(
        net, out, out.weight, shift if out.bias is None else out.bias.astype(np.float64) + shift
    )
    replace_linear(net, chain, chain.weight, None)
    return True


def _source(net: Net, value: str) -> tuple[LinearChain, list[onnx.NodeProto]] | None:
    """The linear map behind a value, and the nodes between, in order."""
    moves: list[onnx.NodeProto] = []
    while net.only_reader(value) is not None:
        chain = linear_making(net, value)
        if chain is not None:
            return chain, moves[::-1]
        node = net.made_by(value, "Reshape", "Transpose")
        if node is None:
            return None
        moves.append(node)
        value = node.input[0]
    return None


def _alone(net: Net, chain: LinearChain, moves: list[onnx.NodeProto]) -> Array | None:
    """What becomes of the bias by itself."""
    shape = net.shapes.get(chain.y)
    if chain.bias is None or shape is None or any(side is None for side in shape):
        return None
    value: Array | None = np.broadcast_to(
        chain.bias, tuple(side for side in shape if side is not None)
    )
    for node in moves:
        value = _moved(net, node, value) if value is not None else None
    return value


def _moved(net: Net, node: onnx.NodeProto, value: Array) -> Array | None:
    if node.op_type == "Transpose":
        return value.transpose(attribute(node, "perm", list(range(value.ndim))[::-1]))
    sizes = net.value(node.input[1]) if node.op_type == "Reshape" else None
    if sizes is None or (attribute(node, "allowzero", 0) and 0 in sizes):
        return None
    return value.reshape(
        [value.shape[axis] if size == 0 else int(size) for axis, size in enumerate(sizes)]
    )
