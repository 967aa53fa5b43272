"""Passes that prepare a graph for the others: no identities, and an opset with Gelu."""

from __future__ import annotations

import onnx

from ..graphs.model_proto import STANDARD_DOMAINS, opset_of
from .graph_editor import GraphEditor, Pass, Result, attribute, is_standard

GELU_OPSET = 20


def _drop_identity(model: onnx.ModelProto) -> Result:
    editor = GraphEditor(model, shapes=any(node.op_type == "Cast" for node in model.graph.node))
    count = 0
    for node in list(editor.graph.node):
        if (
            not is_standard(node)
            or node.output[0] in editor.outputs
            or not _is_identity(editor, node)
        ):
            continue
        editor.replace_reads(node.output[0], node.input[0])
        count += 1
    return Result(editor.finished() if count else model, count)


def _is_identity(editor: GraphEditor, node: onnx.NodeProto) -> bool:
    """Return whether a node is an Identity, a Dropout at inference or a Cast to the same type."""
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        mask_read = len(node.output) > 1 and bool(editor.readers.get(node.output[1]))
        if len(node.input) <= 2 or not node.input[2]:
            return not mask_read
        training = editor.value(node.input[2])
        return training is not None and not bool(training) and not mask_read
    if node.op_type == "Cast":
        return bool(editor.types.get(node.input[0]) == attribute(node, "to", -1))
    return False


def _raise_opset(model: onnx.ModelProto) -> Result:
    if (opset_of(model) or 0) >= GELU_OPSET or any(
        entry.domain not in STANDARD_DOMAINS for entry in model.opset_import
    ):
        return Result(model, 0)
    try:
        raised = onnx.version_converter.convert_version(model, GELU_OPSET)
        onnx.checker.check_model(raised)
    except Exception:  # the converter raises many types; the old opset runs as well
        return Result(model, 0)
    return Result(raised, 1)


DROP_IDENTITY = Pass(
    "drop-identity",
    requires="nothing",
    ensures="no Identity, no Dropout, no Cast to the same type, except in front of an output",
    apply=_drop_identity,
)
RAISE_OPSET = Pass(
    "raise-opset",
    requires="operators that onnx's version converter knows",
    ensures="opset 20 or more",
    apply=_raise_opset,
)
