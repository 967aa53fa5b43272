"""Vectors of fp32 numbers in TIR, and rows in flat buffers.

Loads, stores and multiply-adds are explicit, so that nothing depends on an automatic vectorizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from ...targets.vector import VectorUnit

# Added to a number below 2^22 in size, it leaves the nearest integer in the lowest bits: the last
# bit of such a sum is worth 1. One addition instead of a rounding and a conversion.
ROUNDING = 1.5 * 2**23
# A TIR expression, or a Python number.
Expr = Any
Buffer = Any


def bind(value: Expr) -> Expr:
    """Bind a value to a variable, so that it is computed once however often it is used."""
    return T.Bind(value)


@dataclass(frozen=True)
class Lanes:
    """The numbers that one register holds.

    Attributes:
        count: How many there are.
        fused: Whether one instruction multiplies and adds, and rounds once.
    """

    count: int
    fused: bool = True

    @staticmethod
    def of(unit: VectorUnit) -> Lanes:
        """The vectors of a device."""
        return Lanes(unit.lanes, unit.fused)

    @property
    def dtype(self) -> str:
        """TIR's name of the vector type."""
        return "float32" if self.count == 1 else f"float32x{self.count}"

    def up(self, width: int) -> int:
        """`width` rounded up to whole vectors."""
        return -(-width // self.count) * self.count

    def at(self, index: Expr) -> Expr:
        """The index expression of the elements from `index` on."""
        return index if self.count == 1 else T.Ramp(index, 1, self.count)

    def load(self, buffer: Buffer, index: Expr) -> Expr:
        """`buffer[index : index + count]`."""
        return buffer[self.at(index)]

    def gather(self, buffer: Buffer, index: Expr, stride: int) -> Expr:
        """Every `stride`-th element from `index` on."""
        return buffer[index if self.count == 1 else T.Ramp(index, stride, self.count)]

    def store(self, buffer: Buffer, index: Expr, value: Expr) -> None:
        """`buffer[index : index + count] = value`."""
        T.buffer_store(buffer, value, [self.at(index)])

    def splat(self, value: Expr) -> Expr:
        """One number in all lanes."""
        value = T.float32(value) if isinstance(value, int | float) else value
        return value if self.count == 1 else T.Broadcast(value, self.count)

    def zero(self) -> Expr:
        """Zero in all lanes."""
        return self.splat(0.0)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """The expression a * b + c."""
        return T.call_llvm_pure_intrin(self.dtype, "llvm.fma", a, b, c) if self.fused else a * b + c

    def round(self, value: Expr) -> Expr:
        """The nearest integers, ties to even, in fp32."""
        return T.call_llvm_pure_intrin(self.dtype, "llvm.nearbyint", value)

    def to_int(self, value: Expr) -> Expr:
        """Cast to int32."""
        return T.Cast("int32" if self.count == 1 else f"int32x{self.count}", value)

    def bits(self, value: Expr) -> Expr:
        """The bits of fp32 lanes as int32."""
        return T.reinterpret("int32" if self.count == 1 else f"int32x{self.count}", value)

    def splat_int(self, value: int) -> Expr:
        """One int32 in all lanes."""
        return T.int32(value) if self.count == 1 else T.Broadcast(T.int32(value), self.count)

    def bits_as_float(self, value: Expr) -> Expr:
        """The bits of int32 lanes as fp32."""
        return T.reinterpret(self.dtype, value)

    def first(self, valid: int, value: Expr, other: Expr) -> Expr:
        """`value` in the first `valid` lanes, `other` (a number, or a vector) in the rest."""
        if valid >= self.count:
            return value
        rest = self.splat(other) if isinstance(other, int | float) else other
        return T.Select(
            T.Ramp(0, 1, self.count) < T.Broadcast(T.int32(valid), self.count),
            value,
            rest,
        )

    def total(self, value: Expr) -> Expr:
        """The sum over the lanes, as a tree.

        LLVM's reduce.fadd without reassociation adds one lane after the other, a long chain of
        latencies.
        """
        return self._tree(value, lambda a, b: a + b)

    def largest(self, value: Expr) -> Expr:
        """The largest lane."""
        return self._tree(value, T.max)

    def smallest(self, value: Expr) -> Expr:
        """The smallest lane."""
        return self._tree(value, T.min)

    def _tree(self, value: Expr, join: Any) -> Expr:
        lanes = self.count
        while lanes > 1:
            lanes //= 2
            value = join(_part(value, 0, lanes), _part(value, lanes, lanes))
        return value


def _part(value: Expr, start: int, lanes: int) -> Expr:
    if lanes == 1:
        return T.Shuffle([value], [start])
    return T.Shuffle([value], list(range(start, start + lanes)))


@dataclass(frozen=True)
class RowLayout:
    """Rows in a flat buffer: row r of image b starts at (b * per_image + first + r) * width.

    Attributes:
        per_image: Rows of each image; 0 where all images share the same rows.
        width: Elements from one row to the next.
        first: Rows of each image that are skipped.
    """

    per_image: int
    width: int
    first: int = 0

    def start(self, image: Expr, row: Expr) -> Expr:
        """The index of a row's first element."""
        return (image * self.per_image + self.first + row) * self.width

    def size(self, images: int, rows: int) -> int:
        """Elements of a buffer that holds `rows` rows of each image."""
        return self.width * (images * self.per_image if self.per_image else self.first + rows)
