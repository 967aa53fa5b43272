"""The number format that a graph is in already, read from its weights and operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..manifest import Precision
from .nested_nodes import PlacedNode, live_nodes

# Elements from which on a constant counts as weights: norms and scalars are often kept in float32.
_LEAST_ELEMENTS = 16
# Share of the weights from which on a narrower type decides.
_LEAST_SHARE = 0.01
_INTEGER_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in (
        *(("INT8", 8), ("UINT8", 8), ("INT16", 16), ("UINT16", 16), ("INT4", 4), ("UINT4", 4)),
        *(("INT2", 2), ("UINT2", 2)),
    )
    if hasattr(TensorProto, name)
}
_FLOATS: dict[int, Precision] = {
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT: "fp32",
}
_ALL_FLOATS = frozenset(
    kind for name, kind in TensorProto.DataType.items() if "FLOAT" in name or name == "DOUBLE"
)
_WIDE = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE})
_DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_INTEGER_PRODUCTS = frozenset(
    {"MatMulInteger", "MatMulInteger16", "ConvInteger", "MatMulIntegerToFloat", "QAttention"}
)
# Four- or eight-bit floats, for which the manifest has no name.
_SMALL_FLOATS = frozenset({"MatMulBnb4", "MatMulFpQ4", "GemmFloat8", "QMoE", "DequantizeBFP"})


@dataclass(frozen=True)
class StoredPrecision:
    """What a graph's weights are stored and multiplied in.

    Attributes:
        precision: The manifest's name of it; None where it has none.
        description: The same in words, with a node or tensor as the evidence.
    """

    precision: Precision | None
    description: str

    @property
    def is_float32(self) -> bool:
        """Whether nothing was quantized or shortened yet."""
        return self.precision == "fp32"


def stored_precision(model: onnx.ModelProto) -> StoredPrecision:
    """Return the precision that a graph is in, its inner graphs and functions included."""
    found = _Evidence()
    for placed in live_nodes(model):
        found.add(placed)
    return found.conclusion()


@dataclass
class _Evidence:
    """What was seen of the nodes so far.

    Attributes:
        elements: Elements of floating constants, by type.
        integers: Elements of quantized constants, by bits.
        dynamic: The first node that quantizes inputs with ranges of each run.
        static: The first node that quantizes inputs with fixed ranges.
        product: The first node that multiplies integers.
        unnamed: The first node or tensor in a format without a name.
        derived: Small integers, and what is computed of them and other constants alone.
        counted: Names of the constants that were counted.
    """

    elements: dict[int, int] = field(default_factory=dict)
    integers: dict[int, int] = field(default_factory=dict)
    dynamic: str | None = None
    static: str | None = None
    product: str | None = None
    unnamed: str | None = None
    derived: dict[str, onnx.TensorProto] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)

    def add(self, placed: PlacedNode) -> None:
        """Record what one node is evidence of."""
        node, kind = placed.node, placed.node.op_type
        constants = {
            name: placed.constants[name] for name in node.input if name in placed.constants
        }
        to = _attribute(node, "to", 0) if kind == "Cast" else 0
        for name, tensor in constants.items():
            self._count_float(name, tensor, to)
        if kind in _DYNAMIC:
            self.dynamic = self.dynamic or str(placed)
        elif kind == "QuantizeLinear":
            # On a constant it rounds the weights of a network that was trained for eight bits.
            if node.input[0] in placed.constants:
                self._count_integers(node.input[0], placed.constants[node.input[0]], 8)
            else:
                self.static = self.static or str(placed)
        elif kind in _SMALL_FLOATS or kind.startswith("MatMulBlockQuantized"):
            self.unnamed = self.unnamed or f"{placed} multiplies small floats"
        if "NBits" in kind or kind == "GatherBlockQuantized":
            bits = _attribute(node, "bits", 4)
            self.integers[bits] = self.integers.get(bits, 0) + _packed_elements(node, constants)
            return
        if kind.startswith(("QLinear", "QGemm", "QOrdered")):
            self.static = self.static or str(placed)
        self._follow_integers(placed, constants)

    def _count_float(self, name: str, tensor: onnx.TensorProto, to: int) -> None:
        """Count a constant in the type that it is in, or in the narrower one that it is cast to."""
        size = int(np.prod(tensor.dims))
        if tensor.data_type not in _ALL_FLOATS or size < _LEAST_ELEMENTS or name in self.counted:
            return
        self.counted.add(name)
        kind = to if tensor.data_type in _WIDE and to in _FLOATS else tensor.data_type
        self.elements[kind] = self.elements.get(kind, 0) + size

    def _count_integers(self, name: str, tensor: onnx.TensorProto, bits: int) -> None:
        size = int(np.prod(tensor.dims))
        if tensor.data_type in _ALL_FLOATS and name in self.counted:
            self.elements[tensor.data_type] -= size
        elif name in self.counted:
            return
        self.counted.add(name)
        self.integers[bits] = self.integers.get(bits, 0) + size

    def _follow_integers(self, placed: PlacedNode, constants: dict[str, onnx.TensorProto]) -> None:
        """Count small integers where they become floats or are multiplied, not where they index."""
        node, kind = placed.node, placed.node.op_type
        small = {
            name: tensor
            for name, tensor in constants.items()
            if tensor.data_type in _INTEGER_BITS and np.prod(tensor.dims) >= _LEAST_ELEMENTS
        }
        small.update({name: self.derived[name] for name in node.input if name in self.derived})
        if not small:
            return
        multiplies = kind in _INTEGER_PRODUCTS or kind.startswith(("QLinear", "QGemm", "QOrdered"))
        becomes_float = kind == "DequantizeLinear" or (
            kind == "Cast" and _attribute(node, "to", 0) in _ALL_FLOATS
        )
        if kind in _INTEGER_PRODUCTS:
            self.product = self.product or str(placed)
        if multiplies or becomes_float or kind.startswith("DynamicQuantize"):
            for name, tensor in small.items():
                self._count_integers(name, tensor, _INTEGER_BITS[tensor.data_type])
        elif node.op_type not in ("Cast", "Equal", "Greater", "Less") and all(
            name in placed.constants or name in self.derived for name in node.input if name
        ):
            tensor = next(iter(small.values()))
            self.derived.update(dict.fromkeys(node.output, tensor))

    def conclusion(self) -> StoredPrecision:
        """Return the precision that fits what was seen."""
        if self.unnamed is not None:
            return StoredPrecision(None, self.unnamed)
        quantized = sum(self.integers.values())
        if quantized and quantized >= _LEAST_SHARE * (quantized + sum(self.elements.values())):
            return self._quantized(quantized + sum(self.elements.values()))
        if where := self.dynamic or self.static:
            return StoredPrecision(None, f"{where} quantizes values, but no weight is quantized")
        return self._floating()

    def _quantized(self, total: int) -> StoredPrecision:
        bits = max(self.integers, key=self.integers.__getitem__)
        weights = f"{100 * self.integers[bits] / total:.0f} % of its weights have {bits} bits"
        where = self.dynamic or self.static or self.product
        if where is None:
            names: dict[int, Precision] = {8: "int8-weights", 4: "int4-weights"}
            return StoredPrecision(names.get(bits), weights)
        inputs: Precision = "int8-static" if self.static and not self.dynamic else "int8"
        verb = "multiplies" if where == self.product else "quantizes"
        return StoredPrecision(
            inputs if bits == 8 else None, f"{weights}, and {where} {verb} their inputs"
        )

    def _floating(self) -> StoredPrecision:
        total = sum(self.elements.values())
        shares = {kind: size / total for kind, size in self.elements.items()}
        for kind in self.elements:
            if kind not in _FLOATS and shares[kind] >= _LEAST_SHARE:
                name = TensorProto.DataType.Name(kind).lower().replace("double", "float64")
                return StoredPrecision(
                    None, f"{100 * shares[kind]:.0f} % of its weights are {name}"
                )
        for kind, precision in _FLOATS.items():
            if shares.get(kind, 0.0) >= _LEAST_SHARE:
                weights = f"{100 * shares[kind]:.0f} % of its weights are {precision}"
                return StoredPrecision(precision, weights)
        return StoredPrecision("fp32", "it has no weights")


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    found: Iterator[int] = (
        int(helper.get_attribute_value(entry))
        for entry in node.attribute
        if entry.name == name and not entry.ref_attr_name
    )
    return next(found, default)


def _packed_elements(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int:
    """Return the number of weights of a product in blocks, at least one."""
    product = _attribute(node, "N", 0) * _attribute(node, "K", 0)
    return product or max((int(np.prod(entry.dims)) for entry in constants.values()), default=1)
