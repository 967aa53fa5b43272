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

from ...compress.tokens.bucket_rules import Divergence
from ...compress.tokens.buckets import BucketedModel
from ...core.errors import UnsupportedModel
from ..graphs.model_proto import EXTERNAL_ABOVE_BYTES, INDICES

# The optional input that forces a bucket, the value with the patches that a bucket chose, and the
# output with their number.
FORCED, CHOSEN, KEPT = "bucket", f"buckets{INDICES}", "kept"


def join_buckets(graphs: Sequence[onnx.ModelProto], model: BucketedModel) -> onnx.ModelProto:
    """Join the graphs of all buckets.

    Args:
        graphs: For each bucket the graph of one image, `images` -> `logits`, in one form.
        model: The network.

    Returns:
        A graph `images` -> `logits` and `kept` (1,); the value `CHOSEN` holds the patches that were
        kept.

    Raises:
        UnsupportedModel: The weights of all branches exceed the limit of one file.
    """
    counts, selection = model.buckets.counts, model.selection.spec.name
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
    _Conditions(graph, model).write(parts[-1])
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
    """A graph of one bucket: the scores, the nodes without their choice, and those behind it.

    Attributes:
        scores: The scores of the patches.
        stream: The rows of which the choice keeps some.
        token_axis: The dimension of the rows.
        shared: The nodes that are the same in all buckets.
        rest: The nodes behind the choice.
    """

    scores: str
    stream: str
    token_axis: int
    shared: list[onnx.NodeProto]
    rest: list[onnx.NodeProto]

    @classmethod
    def of(cls, model: onnx.ModelProto, selection: str) -> _Parts:
        makers = {name: node for node in model.graph.node for name in node.output}
        best = makers[makers[f"{selection}{INDICES}"].input[0]]
        kept = makers[f"{selection}.kept"]
        axis = next(entry.i for entry in kept.attribute if entry.name == "axis")
        made = set(best.output) - {""}
        shared: list[onnx.NodeProto] = []
        rest: list[onnx.NodeProto] = []
        for node in model.graph.node:
            behind = bool(made.intersection((*node.input, *node.output)))
            (rest if behind else shared).append(node)
            made.update(node.output if behind else ())
            made.discard("")
        return cls(best.input[0], kept.input[0], axis, shared, rest)


class _Conditions:
    """Writes for each bucket but the last whether it is the image's, if no smaller one is.

    Args:
        graph: Gets the nodes.
        model: The network, with the rule of its buckets.
    """

    def __init__(self, graph: onnx.GraphProto, model: BucketedModel) -> None:
        self.graph, self.model, self.counts = graph, model, model.buckets.counts

    def write(self, parts: _Parts) -> None:
        """Write the conditions, and the input that forces a bucket."""
        graph = self.graph
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), FORCED))
        graph.input.append(helper.make_tensor_value_info(FORCED, TensorProto.INT64, []))
        divergence = self.model.buckets.divergence
        if divergence is None:
            enough = self._covering(parts.scores)
        else:
            enough = self._near(parts, divergence)
        free = self._node("Equal", [FORCED, self._constant("free", 0, np.int64)], "chosen")
        for count, each in zip(self.counts, enough, strict=False):
            own = self._constant(f"count.{count}", count, np.int64)
            forced = self._node("Equal", [FORCED, own], f"forced.{count}")
            both = self._node("And", [free, each], f"suffices.{count}")
            self._node("Or", [both, forced], f"is.{count}")

    def _covering(self, scores: str) -> list[str]:
        """Whether the best patches of each bucket hold enough of the scores."""
        masses = self._node("Sigmoid" if self.model.predicted else "Relu", [scores], "masses")
        total = self._node("ReduceSum", [masses], "total", keepdims=0)
        share = self._constant("coverage", self.model.buckets.coverage, np.float32)
        least = self._node("Mul", [total, share], "least")
        sizes = [masses, self._constant("most", [self.counts[-2]], np.int64)]
        best = self._node("TopK", sizes, "best", axis=-1)
        start, axis = self._constant("start", [0], np.int64), self._constant("axis", [-1], np.int64)
        found = []
        for count in self.counts[:-1]:
            end = self._constant(f"end.{count}", [count], np.int64)
            part = self._node("Slice", [best, start, end, axis], f"part.{count}")
            held = self._node("ReduceSum", [part], f"held.{count}", keepdims=0)
            found.append(self._node("GreaterOrEqual", [held, least], f"enough.{count}"))
        return found

    def _near(self, parts: _Parts, divergence: Divergence) -> list[str]:
        """Whether the logits of each bucket are predicted to be near those of the last."""
        architecture = self.model.architecture
        axis = self._constant("axis", [parts.token_axis], np.int64)

        def rows(start: int, end: int, name: str) -> str:
            ends = [self._constant(f"{name}.{each}", [each], np.int64) for each in (start, end)]
            return self._node("Slice", [parts.stream, *ends, axis], name)

        patches = rows(architecture.prefix, self.model.tokens_before, "patches")
        features = self._node("ReduceMean", [patches, axis], "mean", keepdims=1)
        if architecture.prefix:
            inputs = [rows(0, 1, "first"), features]
            features = self._node("Concat", inputs, "features", axis=-1)
        weights = divergence.centred_weights(architecture.embed)
        found = []
        for count, row, bias in zip(self.counts, weights, divergence.bias, strict=False):
            column = self._constant(f"weights.{count}", row.reshape(-1, 1), np.float32)
            product = self._node("MatMul", [features, column], f"product.{count}")
            one = self._node("ReduceSum", [product], f"predicted.{count}", keepdims=0)
            most = self._constant(f"most.{count}", divergence.threshold - bias, np.float32)
            found.append(self._node("LessOrEqual", [one, most], f"enough.{count}"))
        return found

    def _constant(self, name: str, value: object, kind: type) -> str:
        tensor = numpy_helper.from_array(np.array(value, kind), f"buckets.{name}")
        self.graph.initializer.append(tensor)
        return tensor.name

    def _node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        label = f"buckets.{name}"
        outputs = [label, "buckets.places"] if operator == "TopK" else [label]
        self.graph.node.append(
            helper.make_node(operator, list(inputs), outputs, name=label, **attributes)
        )
        return label


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
