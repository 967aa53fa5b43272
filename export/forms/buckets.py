"""A network with buckets as one ONNX graph: scores, then the branch of the image's bucket.

The graphs of all buckets are equal up to the choice of the last selection. That part is written
once; what follows is a branch of an `If` for each bucket. Branches have weights of their own, since
ONNX Runtime is slower where they share them. The initializer `bucket` is also an optional input: 0
lets the scores choose, a count forces that bucket, so that each can be measured. The second output
`kept` is the number of patches that the image kept; runtimes that request logits skip it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...core.errors import UnsupportedModel
from ..graphs.model_proto import EXTERNAL_ABOVE_BYTES, INDICES

# The optional input that forces a bucket, the value with the patches that a bucket chose, and the
# output with their number.
FORCED, CHOSEN, KEPT = "bucket", f"buckets{INDICES}", "kept"


def join_buckets(
    graphs: Sequence[onnx.ModelProto],
    counts: Sequence[int],
    *,
    selection: str,
    predicted: bool,
    coverage: float,
) -> onnx.ModelProto:
    """Join the graphs of all buckets.

    Args:
        graphs: For each bucket the graph of one image, `images` -> `logits`, in one form.
        counts: The number of patches of each, increasing.
        selection: Name of the last selection.
        predicted: Whether its scores are those of a predictor.
        coverage: The share of the scores that the patches of a bucket hold.

    Returns:
        A graph `images` -> `logits` and `kept` (1,); the value `CHOSEN` holds the patches that were
        kept.

    Raises:
        UnsupportedModel: The weights of all branches exceed the limit of one file.
    """
    parts = [_Parts.of(graph, selection) for graph in graphs]
    written = [[node.SerializeToString() for node in part.shared] for part in parts]
    if any(each != written[0] for each in written):
        raise UnsupportedModel(
            f"buckets: what is before {selection} is not the same in all buckets; use another form"
        )
    shared = parts[-1].shared
    joined = onnx.ModelProto()
    joined.CopyFrom(graphs[-1])
    graph = joined.graph
    del graph.node[:], graph.initializer[:]
    graph.node.extend(shared)
    read = {name for node in shared for name in node.input}
    graph.initializer.extend(
        tensor for tensor in graphs[-1].graph.initializer if tensor.name in read
    )
    _write_conditions(graph, parts[-1].scores, counts, predicted=predicted, coverage=coverage)
    branches = [
        _branch(each, part.rest, count, selection)
        for each, part, count in zip(graphs, parts, counts, strict=True)
    ]
    otherwise = branches[-1]
    for place in reversed(range(len(counts) - 1)):
        names = ["logits", CHOSEN] if place == 0 else [f"buckets.{place}.{end}" for end in "lp"]
        node = helper.make_node(
            "If",
            [f"buckets.is.{counts[place]}"],
            names,
            name=f"buckets.{counts[place]}",
            then_branch=branches[place],
            else_branch=otherwise,
        )
        if place:
            outputs = _outputs(graphs[-1], names)
            otherwise = helper.make_graph([node], f"buckets.above.{place}", [], outputs)
    graph.node.append(node)
    graph.node.append(helper.make_node("Shape", [CHOSEN], [KEPT], name=KEPT, start=1, end=2))
    graph.output.append(helper.make_tensor_value_info(KEPT, TensorProto.INT64, [1]))
    if joined.ByteSize() > EXTERNAL_ABOVE_BYTES:
        raise UnsupportedModel(
            f"buckets: {joined.ByteSize()} bytes of weights in {len(counts)} branches exceed one "
            "ONNX file; use fewer buckets, or int8"
        )
    return joined


@dataclass(frozen=True)
class _Parts:
    """A graph of one bucket: the scores, the nodes without their choice, and those behind it."""

    scores: str
    shared: list[onnx.NodeProto]
    rest: list[onnx.NodeProto]

    @classmethod
    def of(cls, model: onnx.ModelProto, selection: str) -> _Parts:
        makers = {name: node for node in model.graph.node for name in node.output}
        best = makers[makers[f"{selection}{INDICES}"].input[0]]
        made = set(best.output) - {""}
        shared: list[onnx.NodeProto] = []
        rest: list[onnx.NodeProto] = []
        for node in model.graph.node:
            behind = bool(made.intersection((*node.input, *node.output)))
            (rest if behind else shared).append(node)
            made.update(node.output if behind else ())
            made.discard("")
        return cls(best.input[0], shared, rest)


def _write_conditions(
    graph: onnx.GraphProto,
    scores: str,
    counts: Sequence[int],
    *,
    predicted: bool,
    coverage: float,
) -> None:
    """Write for each bucket but the last whether it is the image's, if no smaller one is."""

    def constant(name: str, value: object, kind: type) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, kind), f"buckets.{name}"))
        return f"buckets.{name}"

    def node(operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        label = f"buckets.{name}"
        outputs = [label, "buckets.places"] if operator == "TopK" else [label]
        graph.node.append(
            helper.make_node(operator, list(inputs), outputs, name=label, **attributes)
        )
        return label

    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), FORCED))
    graph.input.append(helper.make_tensor_value_info(FORCED, TensorProto.INT64, []))
    masses = node("Sigmoid" if predicted else "Relu", [scores], "masses")
    total = node("ReduceSum", [masses], "total", keepdims=0)
    least = node("Mul", [total, constant("coverage", coverage, np.float32)], "least")
    sizes = [masses, constant("most", [counts[-2]], np.int64)]
    best = node("TopK", sizes, "best", axis=-1)
    free = node("Equal", [FORCED, constant("free", 0, np.int64)], "chosen_by_scores")
    start, axis = constant("start", [0], np.int64), constant("axis", [-1], np.int64)
    for count in counts[:-1]:
        end = constant(f"end.{count}", [count], np.int64)
        part = node("Slice", [best, start, end, axis], f"part.{count}")
        held = node("ReduceSum", [part], f"held.{count}", keepdims=0)
        enough = node("GreaterOrEqual", [held, least], f"enough.{count}")
        own = constant(f"count.{count}", count, np.int64)
        forced = node("Equal", [FORCED, own], f"forced.{count}")
        both = node("And", [free, enough], f"covers.{count}")
        node("Or", [both, forced], f"is.{count}")


def _branch(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], count: int, selection: str
) -> onnx.GraphProto:
    """The nodes behind a bucket's choice, with names of their own."""
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    own = {name for node in nodes for name in node.output if name}
    own |= {tensor.name for tensor in constants}

    def renamed(name: str) -> str:
        return f"bucket.{count}.{name}" if name in own else name

    copies, weights = [], []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"bucket.{count}.{node.name}"
        for values in (copy.input, copy.output):
            for place, value in enumerate(values):
                values[place] = renamed(value)
        copies.append(copy)
    for tensor in constants:
        weight = onnx.TensorProto()
        weight.CopyFrom(tensor)
        weight.name = renamed(tensor.name)
        weights.append(weight)
    outputs = _outputs(model, [renamed("logits"), renamed(f"{selection}{INDICES}")])
    return helper.make_graph(copies, f"bucket.{count}", [], outputs, weights)


def _outputs(model: onnx.ModelProto, names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    """Describe logits and kept patches under given names."""
    logits = onnx.ValueInfoProto()
    logits.CopyFrom(model.graph.output[0])
    logits.name = names[0]
    return [logits, helper.make_tensor_value_info(names[1], TensorProto.INT64, [1, None])]
