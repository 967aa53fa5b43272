"""x * (1 + erf(x / sqrt 2)) / 2 in any order of its factors -> Gelu.

Requires: opset 20. Ensures: no such chain whose inner values nobody else reads.
"""

from __future__ import annotations

import math

import onnx

from .contract import Result
from .net import Net

name = "erf-to-gelu"
requires = "opset 20 or more"
ensures = "no chain of Div, Erf, Add and two Mul that is a Gelu"


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    version = max(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        default=0,
    )
    if version < 20:
        return Result(model, 0)
    net = Net(model)
    count = 0
    for erf in [node for node in net.graph.node if node.op_type == "Erf"]:
        found = _chain(net, erf)
        if found is None:
            continue
        x, last = found
        output = last.output[0]
        gelu = net.node("Gelu", [x], output)
        net.insert_before(last, [gelu])
        net.graph.node.remove(last)
        net.index()
        count += 1
    return Result(net.finished() if count else model, count)


def _chain(net: Net, erf: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
    """x and the last node."""
    x = _scaled(net, erf.input[0])
    plus = net.only_reader(erf.output[0])
    if (
        x is None
        or plus is None
        or plus.op_type != "Add"
        or not _is(net, _other(plus, erf.output[0]), 1.0)
    ):
        return None
    value, halved, times_x = plus.output[0], False, False
    # Two products follow, by x and by a half; or one by x / 2.
    for _ in range(2):
        times = net.only_reader(value)
        if times is None or times.op_type != "Mul":
            return None
        factor = _other(times, value)
        if not halved and _is(net, factor, 0.5):
            halved = True
        elif not times_x and factor == x:
            times_x = True
        elif not halved and not times_x and _half_of(net, factor) == x:
            return x, times
        else:
            return None
        if halved and times_x:
            return x, times
        value = times.output[0]
    return None


def _scaled(net: Net, name: str) -> str | None:
    """x where `name` is x / sqrt 2."""
    if (node := net.made_by(name, "Div")) is not None and _is(net, node.input[1], math.sqrt(2.0)):
        return str(node.input[0])
    node = net.made_by(name, "Mul")
    for one, two in ((0, 1), (1, 0)) if node is not None else ():
        if _is(net, node.input[one], math.sqrt(0.5)):  # type: ignore[union-attr]
            return str(node.input[two])  # type: ignore[union-attr]
    return None


def _half_of(net: Net, name: str) -> str | None:
    node = net.made_by(name, "Mul")
    for one, two in ((0, 1), (1, 0)) if node is not None else ():
        if _is(net, node.input[one], 0.5):  # type: ignore[union-attr]
            return str(node.input[two])  # type: ignore[union-attr]
    return None


def _other(node: onnx.NodeProto, name: str) -> str:
    return str(node.input[1] if node.input[0] == name else node.input[0])


def _is(net: Net, name: str, wanted: float) -> bool:
    value = net.value(name)
    return (
        value is not None
        and value.size == 1
        and math.isclose(float(value.ravel()[0]), wanted, rel_tol=1e-6)
    )
