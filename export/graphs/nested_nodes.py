"""The nodes of a model in order of computation, with those of inner graphs and local functions."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, helper, numpy_helper

from .model_proto import STANDARD_DOMAINS

RANDOM_OPERATORS = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "Sampling",
    }
)
# Position of the input that switches training on.
_TRAINING_INPUT = {
    "Dropout": 2,
    "BiasDropout": 4,
    "BitmaskDropout": 2,
    "BitmaskBiasDropout": 4,
}
RUNTIME_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class PlacedNode:
    """A node, and where it is.

    Attributes:
        node: The node.
        path: The node or function that contains it, in words; empty in the main graph.
        constants: The constants that it can read, by name.
    """

    node: onnx.NodeProto
    path: str
    constants: Mapping[str, onnx.TensorProto]

    def __str__(self) -> str:
        node = self.node
        name = node.name or next((output for output in node.output if output), "")
        return f"node {name!r} ({node.op_type}{', ' if self.path else ''}{self.path})"

    @property
    def is_known(self) -> bool:
        """Whether the operator is the standard's or the runtime's own."""
        return self.node.domain in (*STANDARD_DOMAINS, RUNTIME_DOMAIN)

    def constant(self, position: int) -> NDArray[Any] | None:
        """Return the constant that an input reads, or None."""
        name = self.node.input[position] if position < len(self.node.input) else ""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that a node holds, such as the branches of an If."""
    found: list[onnx.GraphProto] = []
    for entry in node.attribute:
        found.extend([entry.g] if entry.HasField("g") else entry.graphs)
    return found


def constants_of(
    nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto] = ()
) -> dict[str, onnx.TensorProto]:
    """Return initializers and the tensors of Constant nodes, by name."""
    found = {tensor.name: tensor for tensor in initializers}
    for node in nodes:
        if node.op_type == "Constant" and node.domain in STANDARD_DOMAINS:
            for entry in node.attribute:
                if entry.type == AttributeProto.TENSOR:
                    found[node.output[0]] = entry.t
    return found


def live_nodes(model: onnx.ModelProto) -> Iterator[PlacedNode]:
    """Yield the nodes that the outputs depend on, each before the nodes that it contains."""
    functions = {(entry.domain, entry.name): entry for entry in model.functions}
    yield from _live_in_graph(model.graph, "", {}, functions, ())


_Functions = Mapping[tuple[str, str], onnx.FunctionProto]
_Constants = Mapping[str, onnx.TensorProto]


def _live_in_graph(
    graph: onnx.GraphProto,
    path: str,
    outer: _Constants,
    functions: _Functions,
    called: tuple[str, ...],
) -> Iterator[PlacedNode]:
    constants = {**outer, **constants_of(graph.node, graph.initializer)}
    outputs = [value.name for value in graph.output]
    yield from _live(graph.node, outputs, path, constants, functions, called)


def _live(
    nodes: Sequence[onnx.NodeProto],
    outputs: Iterable[str],
    path: str,
    constants: _Constants,
    functions: _Functions,
    called: tuple[str, ...],
) -> Iterator[PlacedNode]:
    for node in needed_nodes(nodes, outputs):
        yield PlacedNode(node, path, constants)
        place = f"in {node.op_type} {node.name or node.output[0]!r}"
        for inner in inner_graphs(node):
            yield from _live_in_graph(inner, place, constants, functions, called)
        function = functions.get((node.domain, node.op_type))
        if function is not None and function.name not in called:
            inside = f"in function {function.name}"
            own = constants_of(function.node)
            further = (*called, function.name)
            yield from _live(function.node, function.output, inside, own, functions, further)


def needed_nodes(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs depend on, in order of computation."""
    needed, kept = set(outputs), []
    for node in reversed(sorted_nodes(nodes)):
        if needed.intersection(node.output):
            needed |= names_read(node)
            kept.append(node)
    return kept[::-1]


def names_read(node: onnx.NodeProto) -> set[str]:
    """Return the values that a node reads, those that its inner graphs capture among them."""
    found = set(node.input) - {""}
    for graph in inner_graphs(node):
        inside = {value.name for value in (*graph.input, *graph.initializer)}
        inside |= {name for inner in graph.node for name in inner.output}
        read = {value.name for value in graph.output}
        for inner in graph.node:
            read |= names_read(inner)
        found |= read - inside
    return found


def sorted_nodes(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return nodes in order of computation, otherwise as they were; unchanged if in a circle."""
    makers = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    waits = [
        {makers[name] for name in names_read(node) if name in makers} - {place}
        for place, node in enumerate(nodes)
    ]
    readers: dict[int, list[int]] = {}
    for place, before in enumerate(waits):
        for maker in before:
            readers.setdefault(maker, []).append(place)
    missing = [len(before) for before in waits]
    ready = [place for place, count in enumerate(missing) if not count]
    found = []
    while ready:
        place = heapq.heappop(ready)
        found.append(nodes[place])
        for reader in readers.get(place, ()):
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    return found if len(found) == len(nodes) else list(nodes)


def order_problem(graph: onnx.GraphProto, outer: frozenset[str] = frozenset()) -> str | None:
    """Return why a sorted graph cannot be computed in order, or None.

    Args:
        graph: The graph.
        outer: The values that an outer graph offers.
    """
    made = set(outer) | {""} | {value.name for value in (*graph.input, *graph.initializer)}
    made |= {sparse.values.name for sparse in graph.sparse_initializer}
    anywhere = {name for node in graph.node for name in node.output}
    for node in graph.node:
        title = f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"
        for name in node.input:
            if name not in made:
                where = "is made of its own output" if name in anywhere else "is missing"
                return f"{title} reads {name!r}, which {where}"
        for inner in inner_graphs(node):
            if problem := order_problem(inner, frozenset(made)):
                return f"{problem}, in {title}"
        made.update(node.output)
    return next(
        (f"output {value.name!r} is missing" for value in graph.output if value.name not in made),
        None,
    )


def sort_nodes(model: onnx.ModelProto) -> None:
    """Sort the nodes of a model, of its inner graphs and of its functions, in place."""
    for holder in (model.graph, *model.functions):
        _sort(holder)


def _sort(holder: onnx.GraphProto | onnx.FunctionProto) -> None:
    for node in holder.node:
        for graph in inner_graphs(node):
            _sort(graph)
    order = sorted_nodes(holder.node)
    if any(left is not right for left, right in zip(order, holder.node, strict=True)):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
        del holder.node[:]
        holder.node.extend(copies)


def variable_node(model: onnx.ModelProto) -> str | None:
    """Return why an image's outputs vary from run to run or with its batch, or None.

    Random operators, and Dropout or BatchNormalization in training mode, are described by the
    first node that the outputs depend on. A mode that is computed is not seen here.
    """
    for placed in live_nodes(model):
        if not placed.is_known:
            continue
        if placed.node.op_type in RANDOM_OPERATORS or _drops(placed):
            return f"{placed} draws random numbers, so two runs on one image differ"
        if placed.node.op_type == "BatchNormalization" and _is_training(placed.node):
            return f"{placed} is in training mode, so outputs depend on the other images of a batch"
    return None


def _drops(placed: PlacedNode) -> bool:
    position = _TRAINING_INPUT.get(placed.node.op_type)
    if position is None:
        return False
    training, ratio = placed.constant(position), placed.constant(position - 1)
    never = ratio is not None and not np.any(ratio)
    return training is not None and bool(np.any(training)) and not never


def _is_training(node: onnx.NodeProto) -> bool:
    return any(
        entry.name == "training_mode" and bool(helper.get_attribute_value(entry))
        for entry in node.attribute
        if not entry.ref_attr_name
    )
