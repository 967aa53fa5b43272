"""x * (1 + erf(x / sqrt 2)) / 2 in any order of its factors -> Gelu.

Requires opset 20. Ensures that there is no such chain whose inner values have one reader each.
"""

from __future__ import annotations

import math

import onnx

from ..graphs.model_proto import opset_of
from .cleanup import GELU_OPSET
from .graph_editor import GraphEditor, Pass, Result


def _apply(model: onnx.ModelProto) -> Result:
    if (opset_of(model) or 0) < GELU_OPSET:
        return Result(model, 0)
    editor = GraphEditor(model)
    count = 0
    for erf in [node for node in editor.graph.node if node.op_type == "Erf"]:
        found = _chain(editor, erf)
        if found is None:
            continue
        x, last = found
        output = last.output[0]
        gelu = editor.node("Gelu", [x], output)
        editor.insert_before(last, [gelu])
        editor.graph.node.remove(last)
        editor.index()
        count += 1
    return Result(editor.finished() if count else model, count)


def _chain(editor: GraphEditor, erf: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
    """Return x and the last node of a chain."""
    x = _scaled(editor, erf.input[0])
    plus = editor.only_reader(erf.output[0])
    if (
        x is None
        or plus is None
        or plus.op_type != "Add"
        or not _is(editor, _other(plus, erf.output[0]), 1.0)
    ):
        return None
    value, halved, times_x = plus.output[0], False, False
    # Either two products follow, by x and by a half, or one by x / 2.
    for _ in range(2):
        times = editor.only_reader(value)
        if times is None or times.op_type != "Mul":
            return None
        factor = _other(times, value)
        if not halved and _is(editor, factor, 0.5):
            halved = True
        elif not times_x and factor == x:
            times_x = True
        elif not halved and not times_x and _times_constant(editor, factor, 0.5) == x:
            return x, times
        else:
            return None
        if halved and times_x:
            return x, times
        value = times.output[0]
    return None


def _scaled(editor: GraphEditor, name: str) -> str | None:
    """Return x where `name` is x / sqrt 2."""
    node = editor.made_by(name, "Div")
    if node is not None and _is(editor, node.input[1], math.sqrt(2.0)):
        return str(node.input[0])
    return _times_constant(editor, name, math.sqrt(0.5))


def _times_constant(editor: GraphEditor, name: str, factor: float) -> str | None:
    """Return x where `name` is x times `factor`."""
    node = editor.made_by(name, "Mul")
    if node is None:
        return None
    for constant, other in ((0, 1), (1, 0)):
        if _is(editor, node.input[constant], factor):
            return str(node.input[other])
    return None


def _other(node: onnx.NodeProto, name: str) -> str:
    return str(node.input[1] if node.input[0] == name else node.input[0])


def _is(editor: GraphEditor, name: str, expected: float) -> bool:
    value = editor.value(name)
    return (
        value is not None
        and value.size == 1
        and math.isclose(float(value.ravel()[0]), expected, rel_tol=1e-6)
    )


ERF_TO_GELU = Pass(
    "erf-to-gelu",
    requires="opset 20 or more",
    ensures="no chain of Div, Erf, Add and two Mul that is a Gelu",
    apply=_apply,
)
