"""Writes an ONNX graph node by node, with the few calls that the forms need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..graphs.model_proto import keeps_single_precision, unused_name

Array = NDArray[Any]
State = dict[str, Array]
RUNTIME = "com.microsoft"


class Graph:
    """Nodes and constants in the order of computation.

    Values are referred to by name; a node's name states which part of the network it belongs to.

    Args:
        reserved: Names that no node gets.
    """

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._used: set[str] = set(reserved)
        self._shared: dict[tuple[str, tuple[int, ...], bytes, bool], str] = {}
        self._shared_nodes: dict[tuple[object, ...], str] = {}
        self._uses_runtime = False
        # How a Linear is written: one Gemm where rows are a matrix, always a product and a sum (as
        # quantizers need it), or in eight bits.
        self.linears: Literal["gemm", "product", "int8"] = "gemm"
        self.weight_bits = 8
        # Which of the standard's operators are written; see `Form.operators`.
        self.operators: Literal["standard", "pnnx"] = "standard"
        # Whether RMSNorm may be written as ONNX Runtime's operator.
        self.runtime_norm = False

    def constant(self, name: str, value: Array, *, shared: bool = False) -> str:
        """Add a weight. Equal arrays are stored once if they are small or `shared`.

        Those whose names reduced precisions spare are stored apart from the others.
        """
        value = np.asarray(value, order="C")
        key = (
            value.dtype.str,
            value.shape,
            value.tobytes() if value.nbytes <= 256 or shared else b"",
            keeps_single_precision(name),
        )
        if key[2] and key in self._shared:
            return self._shared[key]
        name = unused_name(name, self._used)
        self.constants[name] = numpy_helper.from_array(value, name)
        if key[2]:
            self._shared[key] = name
        return name

    def scalar(self, name: str, value: float) -> str:
        """Add a float32 constant without dimensions."""
        return self.constant(name, np.array(value, np.float32))

    def sizes(self, values: Sequence[int]) -> str:
        """Add an int64 vector, the type of shapes, axes and indices."""
        return self.constant(
            "sizes." + "_".join(str(value).replace("-", "m") for value in values),
            np.array(values, dtype=np.int64),
        )

    def sizes_row(self, values: Sequence[int]) -> str:
        """Add an int64 matrix of one row."""
        return self.constant("indices", np.array([values], dtype=np.int64), shared=True)

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node with one output.

        Args:
            operator: The operator type.
            inputs: Names of the inputs; an empty name is an input left out.
            name: Name of the node and of its output; a number is appended if it is in use.
            domain: The operator's domain, by default the standard's.
            **attributes: Attributes of the node.

        Returns:
            The name of the output.
        """
        return self._add(operator, inputs, name, 1, domain, attributes)[0]

    def shared_node(
        self, operator: str, inputs: Sequence[str], name: str, **attributes: Any
    ) -> str:
        """Add a node with one output, or return that of an equal one which is there.

        Args:
            operator: The operator type.
            inputs: As for `node`.
            name: As for `node`; of equal nodes that of the first is taken, unless reduced
                precisions treat the names differently.
            **attributes: Attributes of the node.

        Returns:
            The name of the output.
        """
        spared = keeps_single_precision(name)
        key = (operator, *inputs, *sorted(attributes.items()), spared)
        if key not in self._shared_nodes:
            self._shared_nodes[key] = self.node(operator, inputs, name, **attributes)
        return self._shared_nodes[key]

    def node_outputs(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        outputs: int,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs.

        Args:
            operator: The operator type.
            inputs: Names of the inputs; an empty name is an input left out.
            name: Name of the node; its outputs are `name.0`, `name.1`, ...
            outputs: Number of outputs.
            domain: The operator's domain, by default the standard's.
            **attributes: Attributes of the node.

        Returns:
            The names of the outputs.
        """
        return self._add(operator, inputs, name, outputs, domain, attributes)

    def _add(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        outputs: int,
        domain: str,
        attributes: dict[str, Any],
    ) -> list[str]:
        name = unused_name(name, self._used)
        names = [name] if outputs == 1 else [f"{name}.{number}" for number in range(outputs)]
        self.nodes.append(
            helper.make_node(operator, list(inputs), names, name=name, domain=domain, **attributes)
        )
        self._uses_runtime |= domain == RUNTIME
        return names

    def reshape(self, x: str, shape: Sequence[int], name: str) -> str:
        """Add a Reshape to a constant shape (0 copies a dimension, -1 infers one)."""
        return self.node("Reshape", [x, self.sizes(shape)], name)

    def product(self, x: str, weight: Array, weight_name: str, name: str) -> str:
        """Add a MatMul with a constant.

        Args:
            x: Values (…, rows, in).
            weight: The constant (…, in, out).
            weight_name: Name of the constant.
            name: Name of the node.

        Returns:
            Values (…, rows, out).
        """
        # pnnx takes a constant of one element for a number, of which there is no matrix product.
        single = self.operators == "pnnx" and weight.size == 1
        operator = "Mul" if single else "MatMul"
        return self.node(operator, [x, self.constant(weight_name, weight)], name)

    def drop_outputs(self, unused: Sequence[int]) -> None:
        """Mark outputs of the last node as unused."""
        for number in unused:
            self.nodes[-1].output[number] = ""

    def model(
        self,
        input_shape: Sequence[int | str],
        outputs: Sequence[tuple[str, str, Sequence[int]]],
        opset: int,
    ) -> onnx.ModelProto:
        """Return the finished model, `images` -> the outputs.

        Args:
            input_shape: Shape of `images`; a free dimension is given by its name.
            outputs: Name, value and shape for one image of each output.
            opset: Version of the standard's operators.

        Returns:
            The model, with its constants as initializers.
        """
        renamed: dict[str, str] = {}
        for name, value, shape in outputs:
            value = renamed.get(value, value)
            if value in renamed.values():
                self._copy(value, name, shape)
                continue
            self.rename(value, name)
            renamed[value] = name
        self._drop_unused({name for name, _, _ in outputs})
        graph = helper.make_graph(
            self.nodes,
            "vitrim",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, list(input_shape))],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [input_shape[0], *shape])
                for name, _, shape in outputs
            ],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", opset)]
        if self._uses_runtime:
            opsets.append(helper.make_opsetid(RUNTIME, 1))
        model: onnx.ModelProto = helper.make_model(
            graph, producer_name="vitrim", opset_imports=opsets, ir_version=10
        )
        return model

    def _drop_unused(self, used: set[str]) -> None:
        """Drop the nodes and constants that no output depends on."""
        nodes = []
        for node in reversed(self.nodes):
            if used.intersection(node.output):
                used.update(node.input)
                nodes.append(node)
        self.nodes = nodes[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in used}

    def _copy(self, value: str, name: str, shape: Sequence[int]) -> None:
        """Give a value a second name; `shape` is that of an image."""
        if self.operators == "pnnx":
            # pnnx ends at an Identity whose input is an output as well.
            inputs = [value, self.sizes([1, *shape])]
            self.nodes.append(helper.make_node("Reshape", inputs, [name], name=name))
            return
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))

    def rename(self, old: str, new: str) -> None:
        """Give a value another name."""
        for node in self.nodes:
            for values in (node.output, node.input):
                for number, value in enumerate(values):
                    if value == old:
                        values[number] = new


def entries_below(state: State, prefix: str) -> State:
    """Return the entries of `state` whose names start with `prefix.`, without it."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
    }
