"""Products of whole numbers: a few neighbouring codes times as many weights, added into 32 bits, by
the best instruction that a unit has for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm.tirx.script import builder as T

from ...targets.vector import VectorUnit
from .lanes import Buffer, Expr, Lanes

# unsigned: four bytes without sign times four with one (x86's VNNI). signed: four bytes with a sign
# each (ARM's dot products). pairs: two numbers of 16 bits each (AVX2's pmaddwd, exact, where
# pmaddubsw would saturate). plain: one at a time, in 32 bits, which any unit can.
Kind = Literal["unsigned", "signed", "pairs", "plain"]
GROUPS: dict[Kind, int] = {"unsigned": 4, "signed": 4, "pairs": 2, "plain": 1}
STORED: dict[Kind, str] = {"unsigned": "uint8", "signed": "int8", "pairs": "int16", "plain": "int8"}
SIZES_BYTES: dict[Kind, int] = {"unsigned": 1, "signed": 1, "pairs": 2, "plain": 1}
INSTRUCTIONS: dict[Kind, str] = {
    "unsigned": "products of eight bits by vpdpbusd, four multiply-adds a lane",
    "signed": "products of eight bits by sdot, four multiply-adds a lane",
    "pairs": "products of eight bits by vpmaddwd in 16 bits: this target's profile names no instruction for eight, so int8 saves bytes and less time",
    "plain": "products of eight bits one by one in 32 bits: this target has no instruction for them, so int8 saves bytes and may cost time",
}


@dataclass(frozen=True)
class Dot:
    """How whole numbers are multiplied. Codes are one of 256, from `low` on; weights are int8,
    `group` rows of one column side by side.
    """

    kind: Kind
    lanes: Lanes

    @staticmethod
    def of(unit: VectorUnit) -> Dot:
        """The best that a unit offers."""
        lanes = Lanes.of(unit)
        if unit.int8_dot:
            return Dot("signed" if unit.kind == "neon" else "unsigned", lanes)
        return Dot("pairs" if unit.kind == "avx2" else "plain", lanes)

    @property
    def count(self) -> int:
        """Sums in a register."""
        return self.lanes.count

    @property
    def group(self) -> int:
        """Codes of a row that one lane takes at once."""
        return GROUPS[self.kind]

    @property
    def stored(self) -> str:
        """TIR's type of a code."""
        return STORED[self.kind]

    @property
    def stored_bytes(self) -> int:
        """Size of a code."""
        return SIZES_BYTES[self.kind]

    @property
    def low(self) -> int:
        """The smallest code; the largest is 255 more."""
        return -128 if self.stored == "int8" else 0

    def groups(self, depth: int) -> int:
        """Steps that `depth` codes take."""
        return -(-depth // self.group)

    def zero(self) -> Expr:
        """No sum yet."""
        return self.lanes.whole_splat(0)

    def load(self, buffer: Buffer, index: Expr) -> Expr:
        """Sums, or other whole numbers of 32 bits."""
        return self.lanes.load(buffer, index)

    def store(self, buffer: Buffer, index: Expr, value: Expr) -> None:
        """Sums back."""
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
        if self.kind == "pairs":
            return T.Cast(f"int16x{size}", found)
        if self.kind == "plain":
            return T.Cast("int32" if size == 1 else f"int32x{size}", found)
        return found

    def fma(self, codes: Expr, weights: Expr, sums: Expr) -> Expr:
        """sums + codes * weights."""
        kind = f"int32x{self.count}"
        if self.kind == "unsigned":
            # From LLVM 22 on the operands are bytes; before they were words (TVM 0.27 comes with
            # 22).
            return T.call_llvm_pure_intrin(
                kind, f"llvm.x86.avx512.vpdpbusd.{32 * self.count}", sums, codes, weights
            )
        if self.kind == "signed":
            return T.call_llvm_pure_intrin(
                kind, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, codes, weights
            )
        if self.kind == "pairs":
            return sums + T.call_llvm_pure_intrin(kind, "llvm.x86.avx2.pmadd.wd", codes, weights)
        return sums + codes * weights

    def as_float(self, sums: Expr) -> Expr:
        """The same numbers in fp32."""
        return T.Cast(self.lanes.dtype, sums)

    def as_codes(self, whole: Expr) -> Expr:
        """Numbers of 32 bits as codes."""
        return T.Cast(self.stored if self.count == 1 else f"{self.stored}x{self.count}", whole)
