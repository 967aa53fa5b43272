"""Tokens that nobody reads are not computed: a class token at the end asks for one row of
everything that works row by row.

Requires: static shapes, and a Gather or Slice of some rows. From there the demand is carried
backwards: through sums, norms over other dimensions, products, Softmax, Reshape and Transpose that
keep the rows apart. Where all readers of a value ask for the same rows, it is made with those
alone; where a value is needed whole, it is sliced for whoever needs less. Ensures: no node that
makes rows of which nobody reads any.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx

from .contract import Result
from .net import Net, attribute

name = "first-tokens"
requires = "static shapes, as a fixed batch and constant folding leave them"
ensures = "the last block computes only the rows that the classifier reads"

_ALIKE = {
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
}
_PAIRS = {"Add", "Mul", "Sub", "Div", "Pow"}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Entries from `start` to before `stop` along `axis`."""

    axis: int
    start: int
    stop: int


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    net = Net(model, shapes=True)
    asked: dict[str, list[Rows | None]] = {output: [None] for output in net.outputs}
    narrow: dict[str, Rows] = {}
    wants: dict[int, list[Rows | None]] = {}
    for node in reversed(net.graph.node):
        wanted = _agreed(asked, node.output[0]) if len(node.output) == 1 else None
        inputs = _sink(net, node)
        if inputs is None:
            inputs = _through(net, node, wanted) if wanted is not None else None
            if inputs is not None and wanted is not None:
                narrow[node.output[0]] = wanted
                wants[id(node)] = inputs
            else:
                inputs = [None] * len(node.input)
        for value, rows in zip(node.input, inputs, strict=True):
            if value:
                asked.setdefault(value, []).append(rows)
    if not narrow or not any(
        node.op_type in ("MatMul", "Gemm") and node.output[0] in narrow for node in net.graph.node
    ):
        return Result(model, 0)
    _rewrite(net, narrow, wants)
    return Result(net.finished(), len(narrow))


def _agreed(asked: dict[str, list[Rows | None]], value: str) -> Rows | None:
    found = asked.get(value, [])
    return found[0] if found and all(rows == found[0] for rows in found) else None


def _static(net: Net, value: str) -> Shape | None:
    shape = net.shapes.get(value)
    return (
        None
        if shape is None or any(side is None for side in shape)
        else tuple(side for side in shape if side is not None)
    )


def _sink(net: Net, node: onnx.NodeProto) -> list[Rows | None] | None:
    """What a Gather or Slice with constant places reads, or None for other nodes."""
    shape = _static(net, node.input[0]) if node.input else None
    if shape is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gather":
        index, axis = net.value(node.input[1]), attribute(node, "axis", 0) % len(shape)
        if index is None or index.size != 1:
            return None
        place = int(index.ravel()[0])
        place += shape[axis] if place < 0 else 0
        return [Rows(axis, place, place + 1), None]
    if node.op_type != "Slice":
        return None
    parts = [net.value(name) if name else None for name in node.input[1:]]
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


def _through(net: Net, node: onnx.NodeProto, rows: Rows) -> list[Rows | None] | None:
    """What a node must read to make only these rows, or None if it cannot."""
    out = _static(net, node.output[0])
    shapes = [_static(net, value) if value else () for value in node.input]
    if (
        out is None
        or node.domain not in ("", "ai.onnx")
        or rows.stop - rows.start >= out[rows.axis]
    ):
        return None
    rest: list[Rows | None] = [None] * (len(node.input) - 1)
    kind, rank, axis = node.op_type, len(out), rows.axis
    if shapes[0] is None or (kind in _PAIRS | {"MatMul"} and shapes[1] is None):
        return None
    if kind in _ALIKE:
        return [rows, *rest]
    if kind == "Softmax":
        return [rows, *rest] if axis != attribute(node, "axis", -1) % rank else None
    if kind == "LayerNormalization":
        return [rows, *rest] if axis < attribute(node, "axis", -1) % rank else None
    if kind in _PAIRS:
        return [_broadcast(shape, rank, rows) for shape in shapes if shape is not None]
    if kind == "MatMul":
        return _product(shapes[0], shapes[1], rank, rows)  # type: ignore[arg-type]
    if kind == "Gemm" and axis == 0 and not attribute(node, "transA", 0):
        bias = shapes[2] if len(shapes) > 2 else ()
        return (
            None
            if bias is None
            else [rows, None, *([_broadcast(bias, 2, rows)] if len(shapes) > 2 else [])]
        )
    if kind == "Transpose":
        perm = attribute(node, "perm", list(range(rank))[::-1])
        return [Rows(perm[axis], rows.start, rows.stop)]
    if kind == "Reshape" and net.value(node.input[1]) is not None:
        same = [
            place
            for place, side in enumerate(shapes[0])
            if side == out[axis] and prod(shapes[0][:place]) == prod(out[:axis])
        ]
        return [Rows(same[0], rows.start, rows.stop), None] if len(same) == 1 else None
    return None


def _broadcast(shape: Shape, rank: int, rows: Rows) -> Rows | None:
    """An operand without that dimension, or with one entry of it, is read as it is."""
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


def _rewrite(net: Net, narrow: dict[str, Rows], wants: dict[int, list[Rows | None]]) -> None:
    sliced: dict[tuple[str, Rows], str] = {}
    for node in list(net.graph.node):
        if id(node) in wants:
            for number, rows in enumerate(wants[id(node)]):
                value = node.input[number]
                if rows is not None and narrow.get(value) != rows:
                    node.input[number] = _slice(net, node, value, rows, sliced)
            if node.op_type == "Reshape":
                made, shape = narrow[node.output[0]], list(net.shapes[node.output[0]])
                shape[made.axis] = made.stop - made.start
                node.input[1] = net.constant(f"{node.output[0]}.sizes", np.array(shape, np.int64))
        elif node.input and node.input[0] in narrow:
            # Only a Gather or a Slice reads less than the whole without being narrow itself.
            _move(net, node, narrow[node.input[0]])


def _slice(
    net: Net, node: onnx.NodeProto, value: str, rows: Rows, sliced: dict[tuple[str, Rows], str]
) -> str:
    if (value, rows) in sliced:
        return sliced[value, rows]
    constant = net.value(value)
    if constant is not None:
        made = net.constant(
            f"{value}.rows", constant[(*([slice(None)] * rows.axis), slice(rows.start, rows.stop))]
        )
    else:
        named = (("start", rows.start), ("stop", rows.stop), ("axis", rows.axis))
        places = [
            net.constant(f"{value}.{label}", np.array([place], np.int64)) for label, place in named
        ]
        made = net.fresh(f"{value}.rows")
        net.insert_before(node, [net.node("Slice", [value, *places], made)])
    sliced[value, rows] = made
    return made


def _move(net: Net, node: onnx.NodeProto, rows: Rows) -> None:
    if node.op_type == "Gather":
        index = net.value(node.input[1])
        assert index is not None
        node.input[1] = net.constant(f"{node.output[0]}.index", np.zeros_like(index))
        return
    places = (("start", 0), ("stop", rows.stop - rows.start))
    for number, (label, place) in enumerate(places, start=1):
        node.input[number] = net.constant(f"{node.output[0]}.{label}", np.array([place], np.int64))
