"""Identity, Dropout outside of training, and casts to the type that a value has already.

Requires: nothing. Ensures: no such node, but one whose output leaves the graph.
"""

from __future__ import annotations

import onnx

from .contract import Result
from .net import Net, attribute

name = "drop-identity"
requires = "nothing"
ensures = "no Identity, no Dropout, no Cast to the same type, except in front of an output"


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    net = Net(model, shapes=any(node.op_type == "Cast" for node in model.graph.node))
    count = 0
    for node in list(net.graph.node):
        if (
            node.domain not in ("", "ai.onnx")
            or node.output[0] in net.outputs
            or not _same(net, node)
        ):
            continue
        net.replace_reads(node.output[0], node.input[0])
        count += 1
    return Result(net.finished() if count else model, count)


def _same(net: Net, node: onnx.NodeProto) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        mask_wanted = len(node.output) > 1 and bool(net.readers.get(node.output[1]))
        training = net.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        off = (
            len(node.input) <= 2
            or not node.input[2]
            or (training is not None and not bool(training))
        )
        return off and not mask_wanted
    if node.op_type == "Cast":
        return bool(net.types.get(node.input[0]) == attribute(node, "to", -1))
    return False
