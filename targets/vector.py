"""What a core's vector unit offers to a schedule: how wide a register is, how many there are, and
what multiplies fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["avx512", "avx2", "avx", "sse", "neon", "scalar"]
# (kind, needs, bits of a register, registers). AVX-512 doubles both; NEON of AArch64 has 32
# registers of 128 bits.
UNITS: tuple[tuple[Kind, frozenset[str], int, int], ...] = (
    ("avx512", frozenset({"avx512f"}), 512, 32),
    ("avx2", frozenset({"avx2"}), 256, 16),
    ("avx", frozenset({"avx"}), 256, 16),
    ("neon", frozenset({"asimd"}), 128, 32),
)


@dataclass(frozen=True)
class VectorUnit:
    """The widest vector instructions: register width in bits, number of registers, a multiply-add
    in one instruction, int8 dot products.
    """

    kind: Kind
    bits: int
    registers: int
    fused: bool
    int8_dot: bool

    @property
    def lanes(self) -> int:
        """fp32 numbers in a register."""
        return max(1, self.bits // 32)


def vector_unit(architecture: str, features: Iterable[str]) -> VectorUnit:
    """The unit that a profile's features name; a scalar one where they name none."""
    have = set(features)
    dot = bool(have & {"avx512_vnni", "avx_vnni", "asimddp"})
    for kind, needs, bits, registers in UNITS:
        if needs <= have:
            return VectorUnit(
                kind,
                bits,
                registers,
                fused=kind in ("avx512", "neon") or "fma" in have,
                int8_dot=dot,
            )
    if architecture == "x86_64":
        return VectorUnit("sse", 128, 16, fused=False, int8_dot=False)
    return VectorUnit("scalar", 32, 16, fused="fpu" in have, int8_dot=False)
