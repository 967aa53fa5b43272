"""Drop the bias of keys, and fold the bias of values into the output projection.

A key bias adds the same to all scores of a query, and the softmax sums to one.

Requires MatMul(Softmax(MatMul(queries, keys)), values) with the softmax over the last dimension;
scores may be scaled, or have a constant added. Keys and values are x W + b through Reshape and
Transpose, without other readers. Whether the bias is the same for every token is not inferred from
the pattern but computed: the bias alone is passed through the same nodes.
"""

from __future__ import annotations

import numpy as np
import onnx

from .graph_editor import Array, GraphEditor, Pass, Result, attribute
from .linear_chain import LinearChain, linear_making, replace_linear


def _apply(model: onnx.ModelProto) -> Result:
    editor = GraphEditor(model, shapes=True)
    count = 0
    for softmax in [node for node in editor.graph.node if node.op_type == "Softmax"]:
        rank = len(editor.shapes.get(softmax.input[0], ()))
        if rank < 3 or attribute(softmax, "axis", -1) not in (-1, rank - 1):
            continue
        count += _keys(editor, softmax) + _values(editor, softmax)
    return Result(editor.finished() if count else model, count)


def _keys(editor: GraphEditor, softmax: onnx.NodeProto) -> bool:
    scores = softmax.input[0]
    while (node := editor.made_by(scores, "Mul", "Div", "Add", "Sub")) is not None:
        constant = editor.value(node.input[1])
        if constant is None or (node.op_type in ("Mul", "Div") and constant.size != 1):
            return False
        scores = node.input[0]
    product = editor.made_by(scores, "MatMul")
    found = _source(editor, product.input[1]) if product is not None else None
    if found is None or found[0].bias is None:
        return False
    chain, moves = found
    bias = _moved_bias(editor, chain, moves)
    # (…, width, tokens): what each token adds to a query's scores must be the same.
    if bias is None or not np.array_equal(bias, np.broadcast_to(bias[..., :1], bias.shape)):
        return False
    replace_linear(editor, chain, chain.weight, None)
    return True


def _values(editor: GraphEditor, softmax: onnx.NodeProto) -> bool:
    mix = editor.only_reader(softmax.output[0])
    if mix is None or mix.op_type != "MatMul" or mix.input[0] != softmax.output[0]:
        return False
    found = _source(editor, mix.input[1])
    if found is None or found[0].bias is None:
        return False
    chain, moves = found
    bias = _moved_bias(editor, chain, moves)
    if bias is None or not np.array_equal(bias, np.broadcast_to(bias[..., :1, :], bias.shape)):
        return False
    queries = editor.shapes.get(mix.output[0], (None, None))[-2]
    if queries is None:
        return False
    # Every softmax turns the bias into this.
    mixed = np.broadcast_to(bias[..., :1, :], (*bias.shape[:-2], queries, bias.shape[-1]))
    found_output = _output_projection(editor, mix.output[0], mixed)
    if found_output is None:
        return False
    out, rows = found_output
    rows = rows.reshape(-1, rows.shape[-1])
    if not np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape)):
        return False
    shift = rows[0].astype(np.float64) @ out.weight.astype(np.float64)
    total = shift if out.bias is None else out.bias.astype(np.float64) + shift
    replace_linear(editor, out, out.weight, total)
    replace_linear(editor, chain, chain.weight, None)
    return True


def _output_projection(
    editor: GraphEditor, value: str, bias: Array
) -> tuple[LinearChain, Array] | None:
    """Return the linear map that reads a value, and what becomes of `bias` on the way to it."""
    while True:
        reader = editor.only_reader(value)
        if reader is None:
            return None
        out = linear_making(editor, reader.output[0])
        if out is not None and out.first is reader:
            break
        moved = _moved(editor, reader, bias)
        if moved is None or reader.input[0] != value:
            return None
        bias, value = moved, reader.output[0]
    follower = editor.only_reader(out.y)
    if follower is not None and follower.op_type == "Add":
        whole = linear_making(editor, follower.output[0])
        if whole is not None and whole.first is out.first:
            out = whole
    return out, bias


def _source(editor: GraphEditor, value: str) -> tuple[LinearChain, list[onnx.NodeProto]] | None:
    """Return the linear map behind a value, and the nodes between, in order."""
    moves: list[onnx.NodeProto] = []
    while editor.only_reader(value) is not None:
        chain = linear_making(editor, value)
        if chain is not None:
            return chain, moves[::-1]
        node = editor.made_by(value, "Reshape", "Transpose")
        if node is None:
            return None
        moves.append(node)
        value = node.input[0]
    return None


def _moved_bias(
    editor: GraphEditor, chain: LinearChain, moves: list[onnx.NodeProto]
) -> Array | None:
    """Return what becomes of the bias alone, or None where it cannot be computed."""
    shape = editor.shapes.get(chain.y)
    if chain.bias is None or shape is None or any(side is None for side in shape):
        return None
    value: Array | None = np.broadcast_to(
        chain.bias, tuple(side for side in shape if side is not None)
    )
    for node in moves:
        value = _moved(editor, node, value) if value is not None else None
    return value


def _moved(editor: GraphEditor, node: onnx.NodeProto, value: Array) -> Array | None:
    if node.op_type == "Transpose":
        return value.transpose(attribute(node, "perm", list(range(value.ndim))[::-1]))
    sizes = editor.value(node.input[1]) if node.op_type == "Reshape" else None
    if sizes is None or (attribute(node, "allowzero", 0) and 0 in sizes):
        return None
    return value.reshape(
        [value.shape[axis] if size == 0 else int(size) for axis, size in enumerate(sizes)]
    )


FOLD_ATTENTION_BIASES = Pass(
    "fold-attention-biases",
    requires="separate products for keys and values, as split-qkv leaves them, and static shapes",
    ensures="no bias of keys; values' biases in the output projection",
    apply=_apply,
)
