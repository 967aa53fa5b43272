"""Vectors of fp32 numbers in TIR: explicit loads, stores and multiply-adds, so that nothing is left
to an automatic vectoriser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from ...targets.vector import VectorUnit

# A TIR expression, or a Python number.
Expr = Any
Buffer = Any


@dataclass(frozen=True)
class Lanes:
    """`count` numbers that one register holds. fused: multiply and add round once, in one
    instruction.
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
        """The elements from `index` on."""
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
        """a * b + c."""
        return T.call_llvm_pure_intrin(self.dtype, "llvm.fma", a, b, c) if self.fused else a * b + c

    def round(self, value: Expr) -> Expr:
        """The nearest whole number, ties to even."""
        return T.call_llvm_pure_intrin(self.dtype, "llvm.nearbyint", value)

    def whole(self, value: Expr) -> Expr:
        """As int32."""
        return T.Cast("int32" if self.count == 1 else f"int32x{self.count}", value)

    def whole_splat(self, value: int) -> Expr:
        """One int32 in all lanes."""
        return T.int32(value) if self.count == 1 else T.Broadcast(T.int32(value), self.count)

    def bits_as_float(self, value: Expr) -> Expr:
        """int32 bits read as fp32."""
        return T.reinterpret(self.dtype, value)

    def first(self, wanted: int, value: Expr, other: Expr) -> Expr:
        """`value` in the first `wanted` lanes, `other` (a number, or a vector) in the rest."""
        if wanted >= self.count:
            return value
        rest = self.splat(other) if isinstance(other, int | float) else other
        return T.Select(
            T.Ramp(0, 1, self.count) < T.Broadcast(T.int32(wanted), self.count), value, rest
        )

    def total(self, value: Expr) -> Expr:
        """The sum over the lanes, in a tree."""
        # reduce.fadd adds one lane after the other, and multiplies a long chain of latencies,
        # unless told that order does not matter.
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
