"""What a pass works on and returns: an index over a graph that can be rewritten, and its contract.

Ideas after onnx/ir-py's passes: a transformation states what it requires and what it ensures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..graphs.model_proto import STANDARD_DOMAINS, unused_name

Array = NDArray[Any]


@dataclass(frozen=True)
class Result:
    """The model after a pass, and how often the pattern was rewritten.

    Where nothing was found, it is the same object that was passed in.
    """

    model: onnx.ModelProto
    count: int

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return self.count > 0


@dataclass(frozen=True)
class Pass:
    """One exact transformation.

    It never changes its argument, and skips every pattern that it cannot prove to be equal.

    Attributes:
        name: Name of its stage in a manifest.
        requires: What a graph must look like for the pass to find anything.
        ensures: What holds afterwards, besides equal outputs.
        apply: Rewrites a copy.
    """

    name: str
    requires: str
    ensures: str
    apply: Callable[[onnx.ModelProto], Result]

    def __call__(self, model: onnx.ModelProto) -> Result:
        """Rewrite a copy."""
        return self.apply(model)


class GraphEditor:
    """An index over a copy of a model's graph: makers, readers, constants, shapes.

    Requires one graph without inner graphs that read its values. New nodes are inserted in order
    of computation; `index` must be called after nodes were added or removed.
    """

    def __init__(self, model: onnx.ModelProto, *, shapes: bool = False) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self._used = {value.name for value in (*self.graph.input, *self.graph.initializer)} | {
            name for node in self.graph.node for name in node.output
        }
        self.constants: dict[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in self.graph.initializer
        }
        self.outputs = {value.name for value in self.graph.output}
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.types: dict[str, int] = {}
        if shapes:
            self._infer()
        self.index()

    def index(self) -> None:
        """Update makers and readers of all values."""
        self.maker: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.output:
                if name:
                    self.maker[name] = node
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def _infer(self) -> None:
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True)
        except Exception:  # inference is a hint; values without a shape are not rewritten
            return
        for tensor in self.graph.initializer:
            self.shapes[tensor.name], self.types[tensor.name] = tuple(tensor.dims), tensor.data_type
        for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
            kind = value.type.tensor_type
            self.types[value.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[value.name] = tuple(
                    entry.dim_value if entry.HasField("dim_value") else None
                    for entry in kind.shape.dim
                )

    def value(self, name: str) -> Array | None:
        """Return a constant's array, or None for computed values."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def made_by(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """Return the node that computes a value, if it is of one of these operators."""
        node = self.maker.get(name)
        if node is None or node.op_type not in kinds or not is_standard(node):
            return None
        return node

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the node that reads a value once, if the value has no other use."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs or list(readers[0].input).count(name) != 1:
            return None
        return readers[0]

    def fresh(self, name: str) -> str:
        """Return a name that is not in use, and reserve it."""
        return unused_name(name, self._used)

    def constant(self, name: str, value: Array) -> str:
        """Add an initializer and return its name."""
        name = self.fresh(name)
        tensor = numpy_helper.from_array(np.asarray(value, order="C"), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def node(
        self, kind: str, inputs: Sequence[str], output: str, **attributes: Any
    ) -> onnx.NodeProto:
        """Make a node of the standard's domain, not yet in the graph.

        Args:
            kind: The operator type.
            inputs: Names of the inputs.
            output: Name of the output and of the node.
            **attributes: Attributes of the node.

        Returns:
            The node.
        """
        made: onnx.NodeProto = helper.make_node(
            kind, list(inputs), [output], name=output, **attributes
        )
        return made

    def insert_before(self, at: onnx.NodeProto, nodes: Iterable[onnx.NodeProto]) -> None:
        """Insert nodes before `at`."""
        position = next(number for number, node in enumerate(self.graph.node) if node is at)
        for offset, node in enumerate(nodes):
            self.graph.node.insert(position + offset, node)

    def replace_reads(self, old: str, new: str) -> None:
        """Make every reader of `old` read `new`; outputs of the graph keep their names."""
        for node in self.graph.node:
            for number, name in enumerate(node.input):
                if name == old:
                    node.input[number] = new

    def finished(self) -> onnx.ModelProto:
        """Return the model without unread nodes and constants and without inner shapes."""
        while True:
            read = set(self.outputs) | {name for node in self.graph.node for name in node.input}
            dead = [
                node for node in self.graph.node if not any(name in read for name in node.output)
            ]
            if not dead:
                break
            for node in dead:
                self.graph.node.remove(node)
        read = {name for node in self.graph.node for name in node.input} | self.outputs
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in read]:
            self.graph.initializer.remove(tensor)
        del self.graph.value_info[:]
        return self.model


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute's value, or `default` where the node does not have it."""
    found = next((entry for entry in node.attribute if entry.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def is_standard(node: onnx.NodeProto) -> bool:
    """Return whether a node's operator is the standard's own."""
    return node.domain in STANDARD_DOMAINS
