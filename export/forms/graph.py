"""Writes an ONNX graph node by node: the few calls that the forms need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..graphs.names import unused_name

Array = NDArray[Any]


class Graph:
    """Nodes and constants in the order of computation. Values are names; a node's name says which
    part of the network it belongs to.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._taken: set[str] = set()
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._uses_runtime = False
        # How a Linear is written: one Gemm where rows are a matrix, always a product and a sum (as
        # quantizers want it), or in eight bits.
        self.linears: Literal["gemm", "product", "int8"] = "gemm"
        self.weight_bits = 8
        # Whether RMSNorm may be written as ONNX Runtime's operator.
        self.runtime_norm = False

    def constant(self, name: str, value: Array, *, shared: bool = False) -> str:
        """A weight; the same small array, or `shared` one, is kept once."""
        value = np.asarray(value, order="C")
        key = (
            value.dtype.str,
            value.shape,
            value.tobytes() if value.nbytes <= 256 or shared else b"",
        )
        if key[2] and key in self._known:
            return self._known[key]
        name = unused_name(name, self._taken)
        self.constants[name] = numpy_helper.from_array(value, name)
        if key[2]:
            self._known[key] = name
        return name

    def sizes(self, values: Sequence[int]) -> str:
        """An int64 vector, as shapes and axes are given."""
        return self.constant(
            "sizes." + "_".join(str(value).replace("-", "m") for value in values),
            np.array(values, dtype=np.int64),
        )

    def sizes_row(self, values: Sequence[int]) -> str:
        """An int64 matrix of one row."""
        return self.constant("indices", np.array([values], dtype=np.int64), shared=True)

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node and return the name of its output, or a list of names for several; empty ones
        are unused.
        """
        name = unused_name(name, self._taken)
        names = [name] if outputs == 1 else [f"{name}.{number}" for number in range(outputs)]
        self.nodes.append(
            helper.make_node(operator, list(inputs), names, name=name, domain=domain, **attributes)
        )
        self._uses_runtime |= domain == "com.microsoft"
        return names[0] if outputs == 1 else names

    def drop_outputs(self, unused: Sequence[int]) -> None:
        """Mark outputs of the last node as not wanted."""
        for number in unused:
            self.nodes[-1].output[number] = ""

    def model(
        self,
        input_shape: Sequence[int | str],
        output_shape: Sequence[int | str],
        output: str,
        opset: int,
    ) -> onnx.ModelProto:
        """The finished model: `images` in, `logits` out."""
        self._rename(output, "logits")
        graph = helper.make_graph(
            self.nodes,
            "vitrim",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, list(input_shape))],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(output_shape))],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", opset)]
        if self._uses_runtime:
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        model: onnx.ModelProto = helper.make_model(
            graph, producer_name="vitrim", opset_imports=opsets, ir_version=10
        )
        return model

    def _rename(self, old: str, new: str) -> None:
        for node in self.nodes:
            for number, output in enumerate(node.output):
                if output == old:
                    node.output[number] = new
