"""Does a model fit a device? Weights and activations against its memory, and what does not fit told
by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

from .profile import Precision, TargetProfile

BYTES_PER_WEIGHT: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
# The share of a device's memory that an application may count on; the rest belongs to the system,
# or to the program's own stack and code.
USABLE_SHARE = 0.75


@dataclass(frozen=True)
class Fit:
    """The answer: needed and available bytes. weight_excess_bytes and activation_excess_bytes are 0
    where they fit.
    """

    target: str
    fits: bool
    weight_bytes: int
    weight_space_bytes: int
    activation_bytes: int
    activation_space_bytes: int
    lines: tuple[str, ...]

    @property
    def weight_excess_bytes(self) -> int:
        """By how much the weights are too large."""
        return max(0, self.weight_bytes - self.weight_space_bytes)

    @property
    def activation_excess_bytes(self) -> int:
        """By how much the activations are too large."""
        return max(0, self.activation_bytes - self.activation_space_bytes)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def check(
    target: TargetProfile,
    *,
    params: int,
    peak_activation_bytes: int,
    precision: Precision = "fp32",
    weight_bytes: int | None = None,
) -> Fit:
    """Hold a model against a device.

    peak_activation_bytes at the given precision; weight_bytes replaces params x width where a
    file's size is known. On a microcontroller weights must fit its flash and activations its RAM;
    elsewhere both share the RAM. How long it takes is estimated in bench/estimate/.
    """
    weights = params * BYTES_PER_WEIGHT[precision] if weight_bytes is None else weight_bytes
    ram = int(target.memory.ram_bytes * USABLE_SHARE)
    if target.memory.flash_bytes is not None:
        weight_space, activation_space = target.memory.flash_bytes, ram
    else:
        weight_space, activation_space = ram, max(0, ram - weights)
    lines = [f"{target.name}: {target.title}"]
    weights_fit = _line(
        lines,
        f"weights ({precision})",
        weights,
        weight_space,
        "flash" if target.memory.flash_bytes else "usable memory",
    )
    activations_fit = _line(
        lines,
        "peak activation",
        peak_activation_bytes,
        activation_space,
        "usable memory beside the weights",
    )
    fits = weights_fit and activations_fit
    lines.append(
        "it fits"
        if fits
        else "it does not fit; cut further, quantise to int8, or choose a larger device"
    )
    return Fit(
        target.name,
        fits,
        weights,
        weight_space,
        peak_activation_bytes,
        activation_space,
        tuple(lines),
    )


def _line(lines: list[str], what: str, need: int, space: int, where: str) -> bool:
    if need <= space:
        lines.append(f"{what}: {size_text(need)} of {size_text(space)} {where}")
        return True
    times = f", {need / space:.1f} times too large" if space else ""
    lines.append(
        f"{what}: {size_text(need)}, but only {size_text(space)} {where}: {size_text(need - space)} too much{times}"
    )
    return False


def size_text(count: int) -> str:
    """Bytes for people, in powers of a thousand."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return (
                f"{count / scale:.3g} {unit}"
                if count < 1000 * scale
                else f"{count / scale:.0f} {unit}"
            )
    return f"{count} B"
