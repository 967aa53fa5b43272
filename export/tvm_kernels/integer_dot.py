"""Products of quantized numbers: groups of neighbouring codes times weights, summed in int32.

The best instruction depends on the vector unit. A code is the integer that represents a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm.tirx.script import builder as T

from ...targets.vector import VectorUnit
from .lanes import Buffer, Expr, Lanes

# unsigned: four uint8 times four int8 (x86 VNNI). signed: four int8 each (ARM dot products).
# pairs: four uint8 times four int8, whose products AVX2's pmaddubsw adds in pairs in 16 bits; the
# weights are scaled so that no pair saturates. plain: one at a time in int32, on any unit.
Kind = Literal["unsigned", "signed", "pairs", "plain"]
GROUPS: dict[Kind, int] = {"unsigned": 4, "signed": 4, "pairs": 4, "plain": 1}
STORED: dict[Kind, str] = {
    "unsigned": "uint8",
    "signed": "int8",
    "pairs": "uint8",
    "plain": "int8",
}
# Lines for the manifest.
INSTRUCTIONS: dict[Kind, str] = {
    "unsigned": "products of eight bits by vpdpbusd, four multiply-adds a lane",
    "signed": "products of eight bits by sdot, four multiply-adds a lane",
    "pairs": (
        "products of eight bits by vpmaddubsw, which adds pairs in 16 bits; weights are scaled so "
        "that no pair saturates"
    ),
    "plain": (
        "products of eight bits one by one in 32 bits: this target has no instruction for them, "
        "so int8 saves bytes and may cost time"
    ),
}


@dataclass(frozen=True)
class IntegerDot:
    """How quantized numbers are multiplied.

    Codes are one of 256 integers, from `low` on. Weights are int8, `group` rows of a column side by
    side.
    """

    kind: Kind
    lanes: Lanes

    @staticmethod
    def of(unit: VectorUnit) -> IntegerDot:
        """The best instruction of a unit."""
        lanes = Lanes.of(unit)
        if unit.int8_dot:
            return IntegerDot("signed" if unit.kind == "neon" else "unsigned", lanes)
        return IntegerDot("pairs" if unit.kind == "avx2" else "plain", lanes)

    @property
    def count(self) -> int:
        """Sums in a register."""
        return self.lanes.count

    @property
    def group(self) -> int:
        """Codes of a row that one lane multiplies at once."""
        return GROUPS[self.kind]

    @property
    def stored(self) -> str:
        """TIR's type of a code."""
        return STORED[self.kind]

    @property
    def low(self) -> int:
        """The smallest code; the largest is 255 more."""
        return -128 if self.stored == "int8" else 0

    @property
    def limits_pairs(self) -> bool:
        """Whether the weights of neighbouring rows must not add up to more than one can be."""
        return self.kind == "pairs"

    def groups(self, depth: int) -> int:
        """Groups that `depth` codes form."""
        return -(-depth // self.group)

    def zero(self) -> Expr:
        """Zero in all sums."""
        return self.lanes.splat_int(0)

    def load(self, buffer: Buffer, index: Expr) -> Expr:
        """Load a register of sums."""
        return self.lanes.load(buffer, index)

    def store(self, buffer: Buffer, index: Expr, value: Expr) -> None:
        """Store a register of sums."""
        self.lanes.store(buffer, index, value)

    def codes(self, buffer: Buffer, index: Expr) -> Expr:
        """The `group` codes from `index` on, in every lane."""
        count, group = self.count, self.group
        if self.kind == "plain":
            one = T.Cast("int32", buffer[index])
            return one if count == 1 else T.Broadcast(one, count)
        word = T.reinterpret("int32", buffer[T.Ramp(index, 1, group)])
        return T.reinterpret(f"{self.stored}x{count * group}", T.Broadcast(word, count))

    def weights(self, buffer: Buffer, index: Expr) -> Expr:
        """`group` weights of each of `count` columns."""
        size = self.count * self.group
        found = buffer[index if size == 1 else T.Ramp(index, 1, size)]
        if self.kind == "plain":
            return T.Cast("int32" if size == 1 else f"int32x{size}", found)
        return found

    def fma(self, codes: Expr, weights: Expr, sums: Expr) -> Expr:
        """The expression sums + codes * weights."""
        kind = f"int32x{self.count}"
        if self.kind == "unsigned":
            # The operands are bytes since LLVM 22, which TVM 0.27 contains; before they were words.
            return T.call_llvm_pure_intrin(
                kind,
                f"llvm.x86.avx512.vpdpbusd.{32 * self.count}",
                sums,
                codes,
                weights,
            )
        if self.kind == "signed":
            return T.call_llvm_pure_intrin(
                kind, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, codes, weights
            )
        if self.kind == "pairs":
            pairs = T.call_llvm_pure_intrin(
                f"int16x{2 * self.count}", "llvm.x86.avx2.pmadd.ub.sw", codes, weights
            )
            ones = T.Broadcast(T.int16(1), 2 * self.count)
            return sums + T.call_llvm_pure_intrin(kind, "llvm.x86.avx2.pmadd.wd", pairs, ones)
        return sums + codes * weights

    def as_float(self, sums: Expr) -> Expr:
        """Cast sums to fp32."""
        return T.Cast(self.lanes.dtype, sums)

    def as_codes(self, integers: Expr) -> Expr:
        """Cast int32 lanes to codes."""
        return T.Cast(self.stored if self.count == 1 else f"{self.stored}x{self.count}", integers)
