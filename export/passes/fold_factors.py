"""Fold a constant factor after a linear map into its weights: attention's scale, LayerScale.

Requires Mul or Div of x W + b by a constant, a number or one for each column; a number also through
Reshape and Transpose. The values between must have one reader. Ensures that there is no such
factor.
"""

from __future__ import annotations

import numpy as np
import onnx

from .graph_editor import Array, GraphEditor, Pass, Result
from .linear_chain import linear_making, replace_linear

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


def _apply(model: onnx.ModelProto) -> Result:
    editor = GraphEditor(model)
    count = 0
    for node in list(editor.graph.node):
        if (
            node.op_type in ("Mul", "Div")
            and node.output[0] not in editor.outputs
            and _folded(editor, node)
        ):
            count += 1
    return Result(editor.finished() if count else model, count)


def _folded(editor: GraphEditor, node: onnx.NodeProto) -> bool:
    for data, other in (
        (node.input[0], node.input[1]),
        *([(node.input[1], node.input[0])] if node.op_type == "Mul" else []),
    ):
        factor = editor.value(other)
        if (
            factor is None
            or not np.issubdtype(factor.dtype, np.floating)
            or (factor.size != 1 and factor.shape[-1] != factor.size)
        ):
            continue
        factor = factor.astype(np.float64).ravel()
        if _into_weights(editor, data, 1.0 / factor if node.op_type == "Div" else factor):
            editor.replace_reads(node.output[0], data)
            editor.graph.node.remove(node)
            editor.index()
            return True
    return False


def _into_weights(editor: GraphEditor, value: str, factor: Array) -> bool:
    while editor.only_reader(value) is not None:
        chain = linear_making(editor, value)
        if chain is not None:
            if factor.size not in (1, chain.weight.shape[1]):
                return False
            bias = None if chain.bias is None else chain.bias.astype(np.float64) * factor
            replace_linear(editor, chain, chain.weight.astype(np.float64) * factor, bias)
            return True
        mover = editor.made_by(value, *_MOVES)
        if mover is None or factor.size != 1:
            return False
        value = mover.input[0]
    return False


FOLD_FACTORS = Pass(
    "fold-factors",
    requires="constants as initializers, as constant folding leaves them",
    ensures="no constant factor of a linear map without another reader",
    apply=_apply,
)
