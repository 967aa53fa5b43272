"""Constant folding, with static shapes as constants.

Requires nothing. Ensures that no node of the standard's operators has only constant inputs, except
random ones and those whose result would be more than a mebibyte larger than its inputs.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from .graph_editor import Array, GraphEditor, Pass, Result, attribute, is_standard

GROWTH_BYTES = 1 << 20
_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


def _apply(model: onnx.ModelProto) -> Result:
    """Repeat until folded shapes reveal nothing new."""
    total = 0
    while True:
        folded, count = _round(model)
        if not count:
            return Result(model, total)
        model, total = folded, total + count


def _round(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    editor = GraphEditor(model, shapes=True)
    count = 0
    folded: dict[str, Array] = {}
    for node in list(editor.graph.node):
        if (
            not is_standard(node)
            or node.op_type in _RANDOM
            or any(name in editor.outputs for name in node.output)
        ):
            continue
        found = _shape(editor, node) if node.op_type == "Shape" else _computed(editor, node, folded)
        if found is None:
            continue
        for output, value in zip(node.output, found, strict=False):
            if output:
                folded[output] = value
        editor.graph.node.remove(node)
        count += 1
    for output, value in folded.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(value, order="C"), output)
        editor.graph.initializer.append(tensor)
    return (editor.finished() if count else model), count


def _shape(editor: GraphEditor, node: onnx.NodeProto) -> list[Array] | None:
    shape = editor.shapes.get(node.input[0])
    if shape is None:
        return None
    part = shape[attribute(node, "start", 0) : attribute(node, "end", None)]
    return None if any(side is None for side in part) else [np.array(part, np.int64)]


def _computed(
    editor: GraphEditor, node: onnx.NodeProto, folded: dict[str, Array]
) -> list[Array] | None:
    if not node.input and node.op_type != "Constant":
        return None
    values: dict[str, Array] = {}
    for name in node.input:
        if not name:
            continue
        value = folded.get(name)
        value = editor.value(name) if value is None else value
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
    single = helper.make_model(
        helper.make_graph([node], "single", sides, outputs),
        opset_imports=editor.model.opset_import,
        ir_version=editor.model.ir_version,
    )
    try:
        found = [np.asarray(value) for value in ReferenceEvaluator(single).run(None, values)]
    except Exception:  # operators without a reference implementation stay
        return None
    grown = sum(value.nbytes for value in found) - sum(value.nbytes for value in values.values())
    return None if grown > GROWTH_BYTES else found


FOLD_CONSTANTS = Pass(
    "fold-constants",
    requires="nothing",
    ensures="no node all of whose inputs are constants",
    apply=_apply,
)
