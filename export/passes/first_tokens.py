"""Compute only the tokens that are read: a class token at the end needs one row of each value.

Requires static shapes, and a Gather or Slice of some rows. From there the demand is propagated
backwards: through sums, norms over other dimensions, products, Softmax, and Reshape and Transpose
that keep the rows. Where all readers of a value need the same rows, only those are computed; a
value that is needed whole is sliced for the readers that need less. Ensures that no node computes
rows that are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx

from .graph_editor import GraphEditor, Pass, Result, attribute, is_standard

_ELEMENTWISE = frozenset(
    [
        "Gelu",
        "Erf",
        "Relu",
        "Sigmoid",
        "Tanh",
        "Exp",
        "Sqrt",
        "Neg",
        "Abs",
        "HardSwish",
        "HardSigmoid",
        "Cast",
        "Identity",
        "Clip",
        "Elu",
        "LeakyRelu",
    ]
)
_BINARY = {"Add", "Mul", "Sub", "Div", "Pow"}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """The entries [start, stop) along `axis`."""

    axis: int
    start: int
    stop: int


def _apply(model: onnx.ModelProto) -> Result:
    editor = GraphEditor(model, shapes=True)
    demands: dict[str, list[Rows | None]] = {output: [None] for output in editor.outputs}
    narrowed: dict[str, Rows] = {}
    input_rows: dict[int, list[Rows | None]] = {}
    for node in reversed(editor.graph.node):
        needed = _common_demand(demands, node.output[0]) if len(node.output) == 1 else None
        inputs = _selection(editor, node)
        if inputs is None:
            inputs = _through(editor, node, needed) if needed is not None else None
            if inputs is not None and needed is not None:
                narrowed[node.output[0]] = needed
                input_rows[id(node)] = inputs
            else:
                inputs = [None] * len(node.input)
        for value, rows in zip(node.input, inputs, strict=True):
            if value:
                demands.setdefault(value, []).append(rows)
    if not narrowed or not any(
        node.op_type in ("MatMul", "Gemm") and node.output[0] in narrowed
        for node in editor.graph.node
    ):
        return Result(model, 0)
    _rewrite(editor, narrowed, input_rows)
    return Result(editor.finished(), len(narrowed))


def _common_demand(demands: dict[str, list[Rows | None]], value: str) -> Rows | None:
    """Return the rows that all readers need, or None where they differ or need all."""
    found = demands.get(value, [])
    return found[0] if found and all(rows == found[0] for rows in found) else None


def _static(editor: GraphEditor, value: str) -> Shape | None:
    shape = editor.shapes.get(value)
    if shape is None or any(side is None for side in shape):
        return None
    return tuple(side for side in shape if side is not None)


def _selection(editor: GraphEditor, node: onnx.NodeProto) -> list[Rows | None] | None:
    """Return what a Gather or Slice with constant bounds reads, or None for other nodes."""
    shape = _static(editor, node.input[0]) if node.input else None
    if shape is None or not is_standard(node):
        return None
    if node.op_type == "Gather":
        index, axis = editor.value(node.input[1]), attribute(node, "axis", 0) % len(shape)
        if index is None or index.size != 1:
            return None
        position = int(index.ravel()[0])
        position += shape[axis] if position < 0 else 0
        return [Rows(axis, position, position + 1), None]
    if node.op_type != "Slice":
        return None
    parts = [editor.value(name) if name else None for name in node.input[1:]]
    if (
        len(parts) < 3
        or any(part is None or part.size != 1 for part in parts)
        or (len(parts) > 3 and int(parts[3].ravel()[0]) != 1)  # type: ignore[union-attr]
    ):
        return None
    start, stop, axis = (int(part.ravel()[0]) for part in parts[:3] if part is not None)
    axis %= len(shape)
    start, stop, _ = slice(start, stop).indices(shape[axis])
    return [Rows(axis, start, stop), *([None] * (len(node.input) - 1))] if stop > start else None


def _through(editor: GraphEditor, node: onnx.NodeProto, rows: Rows) -> list[Rows | None] | None:
    """Return what a node must read to compute only these rows, or None if it cannot."""
    out = _static(editor, node.output[0])
    shapes = [_static(editor, value) if value else () for value in node.input]
    if out is None or not is_standard(node) or rows.stop - rows.start >= out[rows.axis]:
        return None
    rest: list[Rows | None] = [None] * (len(node.input) - 1)
    kind, rank, axis = node.op_type, len(out), rows.axis
    if shapes[0] is None or (kind in _BINARY | {"MatMul"} and shapes[1] is None):
        return None
    if kind in _ELEMENTWISE:
        return [rows, *rest]
    if kind == "Softmax":
        return [rows, *rest] if axis != attribute(node, "axis", -1) % rank else None
    if kind == "LayerNormalization":
        return [rows, *rest] if axis < attribute(node, "axis", -1) % rank else None
    if kind in _BINARY:
        return [_broadcast(shape, rank, rows) for shape in shapes if shape is not None]
    if kind == "MatMul":
        return _product(shapes[0], shapes[1], rank, rows)  # type: ignore[arg-type]
    if kind == "Gemm" and axis == 0 and not attribute(node, "transA", 0):
        bias = shapes[2] if len(shapes) > 2 else ()
        if bias is None:
            return None
        return [rows, None, *([_broadcast(bias, 2, rows)] if len(shapes) > 2 else [])]
    if kind == "Transpose":
        perm = attribute(node, "perm", list(range(rank))[::-1])
        return [Rows(perm[axis], rows.start, rows.stop)]
    if kind == "Reshape" and editor.value(node.input[1]) is not None:
        same = [
            position
            for position, side in enumerate(shapes[0])
            if side == out[axis] and prod(shapes[0][:position]) == prod(out[:axis])
        ]
        return [Rows(same[0], rows.start, rows.stop), None] if len(same) == 1 else None
    return None


def _broadcast(shape: Shape, rank: int, rows: Rows) -> Rows | None:
    """Return the rows of an operand; one without that dimension is read whole."""
    axis = rows.axis - (rank - len(shape))
    return None if axis < 0 or shape[axis] == 1 else Rows(axis, rows.start, rows.stop)


def _product(left: Shape, right: Shape, rank: int, rows: Rows) -> list[Rows | None] | None:
    if len(left) < 2 or len(right) < 2:
        return None
    if rows.axis == rank - 2:
        return [Rows(len(left) - 2, rows.start, rows.stop), None]
    if rows.axis == rank - 1:
        return [None, Rows(len(right) - 1, rows.start, rows.stop)]
    return [_broadcast(left, rank, rows), _broadcast(right, rank, rows)]


def _rewrite(
    editor: GraphEditor, narrowed: dict[str, Rows], input_rows: dict[int, list[Rows | None]]
) -> None:
    sliced: dict[tuple[str, Rows], str] = {}
    for node in list(editor.graph.node):
        if id(node) in input_rows:
            for number, rows in enumerate(input_rows[id(node)]):
                value = node.input[number]
                if rows is not None and narrowed.get(value) != rows:
                    node.input[number] = _slice(editor, node, value, rows, sliced)
            if node.op_type == "Reshape":
                made, shape = narrowed[node.output[0]], list(editor.shapes[node.output[0]])
                shape[made.axis] = made.stop - made.start
                node.input[1] = editor.constant(
                    f"{node.output[0]}.sizes", np.array(shape, np.int64)
                )
        elif node.input and node.input[0] in narrowed:
            # Only a Gather or a Slice reads less than the whole without being narrowed itself.
            _shift_bounds(editor, node, narrowed[node.input[0]])


def _slice(
    editor: GraphEditor,
    node: onnx.NodeProto,
    value: str,
    rows: Rows,
    sliced: dict[tuple[str, Rows], str],
) -> str:
    if (value, rows) in sliced:
        return sliced[value, rows]
    constant = editor.value(value)
    if constant is not None:
        index = (*([slice(None)] * rows.axis), slice(rows.start, rows.stop))
        name = editor.constant(f"{value}.rows", constant[index])
    else:
        bounds = [
            _position(editor, f"{value}.{label}", getattr(rows, label))
            for label in ("start", "stop", "axis")
        ]
        name = editor.fresh(f"{value}.rows")
        editor.insert_before(node, [editor.node("Slice", [value, *bounds], name)])
    sliced[value, rows] = name
    return name


def _shift_bounds(editor: GraphEditor, node: onnx.NodeProto, rows: Rows) -> None:
    if node.op_type == "Gather":
        index = editor.value(node.input[1])
        assert index is not None
        node.input[1] = editor.constant(f"{node.output[0]}.index", np.zeros_like(index))
        return
    node.input[1] = _position(editor, f"{node.output[0]}.start", 0)
    node.input[2] = _position(editor, f"{node.output[0]}.stop", rows.stop - rows.start)


def _position(editor: GraphEditor, name: str, value: int) -> str:
    return editor.constant(name, np.array([value], np.int64))


FIRST_TOKENS = Pass(
    "first-tokens",
    requires="static shapes, as a fixed batch and constant folding leave them",
    ensures="the last block computes only the rows that the classifier reads",
    apply=_apply,
)
