"""A graph that can be asked who makes and who reads a value, and rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..graphs.model_proto import unused_name

Array = NDArray[Any]


class Net:
    """An index over a copy of a model's graph. Requires one graph without inner graphs that read
    its values; new nodes go in order of computation.
    """

    def __init__(self, model: onnx.ModelProto, *, shapes: bool = False) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self._taken = {value.name for value in (*self.graph.input, *self.graph.initializer)} | {
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
        """Look again at who makes and who reads what."""
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
        except Exception:  # inference is a hint; what it cannot tell is not rewritten
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
        """A constant's numbers, or None for what is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def made_by(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a value, if it is of one of these kinds."""
        node = self.maker.get(name)
        return (
            node
            if node is not None and node.op_type in kinds and node.domain in ("", "ai.onnx")
            else None
        )

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a value once, if nobody else does."""
        readers = self.readers.get(name, [])
        return (
            readers[0]
            if len(readers) == 1
            and name not in self.outputs
            and list(readers[0].input).count(name) == 1
            else None
        )

    def fresh(self, name: str) -> str:
        """A name that nobody has."""
        return unused_name(name, self._taken)

    def constant(self, name: str, value: Array) -> str:
        """A new initializer."""
        name = self.fresh(name)
        tensor = numpy_helper.from_array(np.asarray(value, order="C"), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def node(
        self, kind: str, inputs: Sequence[str], output: str, **attributes: Any
    ) -> onnx.NodeProto:
        """A node of the standard's domain that is not in the graph yet."""
        made: onnx.NodeProto = helper.make_node(
            kind, list(inputs), [output], name=output, **attributes
        )
        return made

    def insert_before(self, at: onnx.NodeProto, nodes: Iterable[onnx.NodeProto]) -> None:
        """Put nodes in front of one."""
        position = next(number for number, node in enumerate(self.graph.node) if node is at)
        for offset, node in enumerate(nodes):
            self.graph.node.insert(position + offset, node)

    def replace_reads(self, old: str, new: str) -> None:
        """Whoever read `old` reads `new`; a value that leaves the graph keeps its name."""
        for node in self.graph.node:
            for number, name in enumerate(node.input):
                if name == old:
                    node.input[number] = new

    def finished(self) -> onnx.ModelProto:
        """The model without nodes and constants that nobody reads, and without shapes of inner
        values.
        """
        while True:
            wanted = set(self.outputs) | {name for node in self.graph.node for name in node.input}
            dead = [
                node for node in self.graph.node if not any(name in wanted for name in node.output)
            ]
            if not dead:
                break
            for node in dead:
                self.graph.node.remove(node)
        wanted = {name for node in self.graph.node for name in node.input} | self.outputs
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in wanted]:
            self.graph.initializer.remove(tensor)
        del self.graph.value_info[:]
        return self.model


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value."""
    found = next((entry for entry in node.attribute if entry.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
