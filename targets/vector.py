"""The vector unit of a core: register width, number of registers, fast multiplications."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["avx512", "avx2", "avx", "sse", "neon", "scalar"]
# (kind, required features, bits of a register, registers).
UNITS: tuple[tuple[Kind, frozenset[str], int, int], ...] = (
    ("avx512", frozenset({"avx512f"}), 512, 32),
    ("avx2", frozenset({"avx2"}), 256, 16),
    ("avx", frozenset({"avx"}), 256, 16),
    ("neon", frozenset({"asimd"}), 128, 32),
)


@dataclass(frozen=True)
class VectorUnit:
    """The widest vector instructions of a core.

    Attributes:
        kind: The instruction set.
        bits: Width of a register.
        registers: How many there are.
        fused: Whether one instruction multiplies and adds.
        int8_dot: Whether one instruction multiplies int8 numbers and adds them into int32.
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
    """The widest unit among a profile's features, scalar where they contain none."""
    have = set(features)
    dot = bool(have & {"avx512_vnni", "avx_vnni", "asimddp"})
    for kind, required, bits, registers in UNITS:
        if required <= have:
            fused = kind in ("avx512", "neon") or "fma" in have
            return VectorUnit(kind, bits, registers, fused=fused, int8_dot=dot)
    if architecture == "x86_64":
        return VectorUnit("sse", 128, 16, fused=False, int8_dot=False)
    return VectorUnit("scalar", 32, 16, fused="fpu" in have, int8_dot=False)
