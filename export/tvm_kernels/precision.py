"""The number format of a program's products: fp32, or int8 with dynamic or static ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from ...targets.vector import VectorUnit
from .integer_dot import IntegerDot
from .matrices import Stream
from .quantization import Quantizer, Range

Name = Literal["fp32", "int8", "int8-static"]


class RowFormat(NamedTuple):
    """The format of rows that products read.

    Attributes:
        quantizer: How they are quantized; None: fp32.
        range: The range of all rows, if it is static.
    """

    quantizer: Quantizer | None = None
    range: Range | None = None


FP32 = RowFormat()


class Precision(Protocol):
    """Decides the format of rows while a program is written.

    The order of the calls is part of the interface: the n-th rows are the same rows in every
    precision, which is how static ranges find them.
    """

    def output(self, *, whole_rows: bool) -> RowFormat:
        """The format in which a kernel writes rows that only products read.

        Args:
            whole_rows: Whether the kernel has a whole row at once, as dynamic ranges need.
        """
        ...

    def input(self, rows: Stream) -> RowFormat:
        """The format into which fp32 rows are converted for a product; fp32: not at all."""
        ...


class Float:
    """fp32 throughout."""

    def output(self, *, whole_rows: bool) -> RowFormat:
        """See `Precision.output`."""
        return FP32

    def input(self, rows: Stream) -> RowFormat:
        """See `Precision.input`."""
        return FP32


class RangeObserver(Float):
    """fp32; records the rows that products read."""

    def __init__(self) -> None:
        self.rows: list[Stream] = []

    def input(self, rows: Stream) -> RowFormat:
        """See `Precision.input`."""
        if not any(
            known.value.same_as(rows.value) and known.rows >= rows.rows for known in self.rows
        ):
            self.rows.append(rows)
        return FP32


class DynamicInt8:
    """int8, each row with its own range."""

    def __init__(self, dot: IntegerDot) -> None:
        self.format = RowFormat(Quantizer(dot, static=False))

    def output(self, *, whole_rows: bool) -> RowFormat:
        """See `Precision.output`."""
        return self.format if whole_rows else FP32

    def input(self, rows: Stream) -> RowFormat:
        """See `Precision.input`."""
        return self.format


class StaticInt8:
    """int8, with one range for each place where products read rows."""

    def __init__(self, dot: IntegerDot, ranges: Sequence[Range]) -> None:
        self.quantizer, self._ranges = Quantizer(dot, static=True), iter(ranges)

    def output(self, *, whole_rows: bool) -> RowFormat:
        """See `Precision.output`."""
        return RowFormat(self.quantizer, next(self._ranges))

    def input(self, rows: Stream) -> RowFormat:
        """See `Precision.input`."""
        return RowFormat(self.quantizer, next(self._ranges))


def precision_named(name: Name, unit: VectorUnit, ranges: Sequence[Range] | None) -> Precision:
    """A precision for one program; each program needs a new one.

    Args:
        name: The number format.
        unit: The vector unit of the target.
        ranges: The ranges of int8-static, from `calibration.find_ranges`.
    """
    if name == "fp32":
        return Float()
    if name == "int8":
        return DynamicInt8(IntegerDot.of(unit))
    assert ranges is not None
    return StaticInt8(IntegerDot.of(unit), ranges)
