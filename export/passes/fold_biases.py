"""Two constant sums in a row become one, and MatMul and Add on matrices become Gemm.

Requires (x + a) + b with constants a and b, or a MatMul of a value with two dimensions followed by
a constant sum. Ensures that there is no such pair.
"""

from __future__ import annotations

import numpy as np
import onnx

from .graph_editor import GraphEditor, Pass, Result
from .linear_chain import linear_making


def _apply(model: onnx.ModelProto) -> Result:
    editor = GraphEditor(model, shapes=True)
    count = 0
    # All sums first, since a Gemm has one bias.
    for rewrite in (_joined, _gemm):
        for node in list(editor.graph.node):
            alive = editor.maker.get(node.output[0])
            if alive is not None and alive.op_type == "Add":
                count += rewrite(editor, alive)
    return Result(editor.finished() if count else model, count)


def _constant_side(editor: GraphEditor, node: onnx.NodeProto) -> tuple[str, str] | None:
    """Return (value, constant) of a sum."""
    for value, constant in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        if editor.value(constant) is not None and editor.value(value) is None:
            return value, constant
    return None


def _joined(editor: GraphEditor, node: onnx.NodeProto) -> bool:
    outer = _constant_side(editor, node)
    inner_node = editor.made_by(outer[0], "Add") if outer else None
    inner = _constant_side(editor, inner_node) if inner_node is not None else None
    if outer is None or inner is None or inner_node is None or editor.only_reader(outer[0]) is None:
        return False
    first, second = editor.value(inner[1]), editor.value(outer[1])
    assert first is not None
    assert second is not None
    total = first.astype(np.float64) + second.astype(np.float64)
    # A broadcast sum that is larger than both would cost more than it saves.
    if total.size > max(first.size, second.size) or first.dtype != second.dtype:
        return False
    node.input[0], node.input[1] = (
        inner[0],
        editor.constant(f"{node.name or node.output[0]}.constants", total.astype(first.dtype)),
    )
    editor.graph.node.remove(inner_node)
    editor.index()
    return True


def _gemm(editor: GraphEditor, node: onnx.NodeProto) -> bool:
    chain = linear_making(editor, node.output[0])
    if (
        chain is None
        or chain.first.op_type != "MatMul"
        or chain.bias is None
        or len(editor.shapes.get(chain.x, ())) != 2
    ):
        return False
    bias = editor.constant(f"{node.name or node.output[0]}.bias", np.ascontiguousarray(chain.bias))
    gemm = editor.node("Gemm", [chain.x, chain.first.input[1], bias], node.output[0])
    editor.insert_before(node, [gemm])
    editor.graph.node.remove(node)
    editor.graph.node.remove(chain.first)
    editor.index()
    return True


FOLD_BIASES = Pass(
    "fold-biases",
    requires="constants as initializers, as constant folding leaves them",
    ensures="no two constant sums in a row, no MatMul and Add on matrices",
    apply=_apply,
)
