"""What is computed of constants alone is computed once; a static shape is a constant.

Requires: nothing. Ensures: no node of the standard's operators all of whose inputs are known, but
random ones and those whose result would be more than a mebibyte larger than what it is made of.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from .contract import Result
from .net import Array, Net, attribute

name = "fold-constants"
requires = "nothing"
ensures = "no node all of whose inputs are constants"

GROWTH_BYTES = 1 << 20
_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy, again until shapes say nothing new."""
    total = 0
    while True:
        folded, count = _round(model)
        if not count:
            return Result(model, total)
        model, total = folded, total + count


def _round(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    net = Net(model, shapes=True)
    count = 0
    known: dict[str, Array] = {}
    for node in list(net.graph.node):
        if (
            node.domain not in ("", "ai.onnx")
            or node.op_type in _RANDOM
            or any(name in net.outputs for name in node.output)
        ):
            continue
        found = _shape(net, node) if node.op_type == "Shape" else _computed(net, node, known)
        if found is None:
            continue
        for output, value in zip(node.output, found, strict=False):
            if output:
                known[output] = value
        net.graph.node.remove(node)
        count += 1
    for output, value in known.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(value, order="C"), output)
        net.graph.initializer.append(tensor)
    return (net.finished() if count else model), count


def _shape(net: Net, node: onnx.NodeProto) -> list[Array] | None:
    shape = net.shapes.get(node.input[0])
    if shape is None:
        return None
    part = shape[attribute(node, "start", 0) : attribute(node, "end", None)]
    return None if any(side is None for side in part) else [np.array(part, np.int64)]


def _computed(net: Net, node: onnx.NodeProto, known: dict[str, Array]) -> list[Array] | None:
    if not node.input and node.op_type != "Constant":
        return None
    values: dict[str, Array] = {}
    for name in node.input:
        if not name:
            continue
        value = known.get(name)
        value = net.value(name) if value is None else value
        if value is None:
            return None
        values[name] = value
    if any(
        entry.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        for entry in node.attribute
    ):
        return None
    sides = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape)
        )
        for name, value in values.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    alone = helper.make_model(
        helper.make_graph([node], "alone", sides, outputs),
        opset_imports=net.model.opset_import,
        ir_version=net.model.ir_version,
    )
    try:
        found = [np.asarray(value) for value in ReferenceEvaluator(alone).run(None, values)]
    except Exception:  # an operator that the reference does not know stays where it is
        return None
    grown = sum(value.nbytes for value in found) - sum(value.nbytes for value in values.values())
    return None if grown > GROWTH_BYTES else found
