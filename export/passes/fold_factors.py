"""A constant factor behind a linear map goes into its weights: attention's scale, LayerScale.

Requires: Mul or Div by a constant, a number or one a column, of x W + b; for a number also through
Reshape and Transpose. Nobody else may read what lies between. Ensures: no such factor.
"""

from __future__ import annotations

import numpy as np
import onnx

from .contract import Result
from .linear_chain import linear_making, replace_linear
from .net import Array, Net

name = "fold-factors"
requires = "constants as initializers, as constant folding leaves them"
ensures = "no constant factor of a linear map that nobody else reads"

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    net = Net(model)
    count = 0
    for node in list(net.graph.node):
        if (
            node.op_type in ("Mul", "Div")
            and node.output[0] not in net.outputs
            and _folded(net, node)
        ):
            count += 1
    return Result(net.finished() if count else model, count)


def _folded(net: Net, node: onnx.NodeProto) -> bool:
    for data, other in (
        (node.input[0], node.input[1]),
        *([(node.input[1], node.input[0])] if node.op_type == "Mul" else []),
    ):
        factor = net.value(other)
        if (
            factor is None
            or not np.issubdtype(factor.dtype, np.floating)
            or (factor.size != 1 and factor.shape[-1] != factor.size)
        ):
            continue
        factor = factor.astype(np.float64).ravel()
        if _into_weights(net, data, 1.0 / factor if node.op_type == "Div" else factor):
            net.replace_reads(node.output[0], data)
            net.graph.node.remove(node)
            net.index()
            return True
    return False


def _into_weights(net: Net, value: str, factor: Array) -> bool:
    while net.only_reader(value) is not None:
        chain = linear_making(net, value)
        if chain is not None:
            if factor.size not in (1, chain.weight.shape[1]):
                return False
            bias = None if chain.bias is None else chain.bias.astype(np.float64) * factor
            replace_linear(net, chain, chain.weight.astype(np.float64) * factor, bias)
            return True
        mover = net.made_by(value, *_MOVES)
        if mover is None or factor.size != 1:
            return False
        value = mover.input[0]
    return False
