"""Whether a model fits a device: weights and activations compared with its memory."""

from __future__ import annotations

from dataclasses import dataclass

from .profile import Precision, TargetProfile

BYTES_PER_WEIGHT: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
# The share of a device's memory that an application may count on; the rest belongs to the system,
# or to the program's own stack and code.
USABLE_SHARE = 0.75


@dataclass(frozen=True)
class Fit:
    """Required and available bytes of a model on a device.

    Attributes:
        target: The profile's name.
        fits: Whether both weights and activations fit.
        weight_bytes: Bytes of the weights.
        weight_space_bytes: Bytes available for weights.
        activation_bytes: Bytes of the largest activations that exist at one moment.
        activation_space_bytes: Bytes available for activations.
        lines: The same as lines of text.
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
        """By how many bytes the weights are too large, 0 where they fit."""
        return max(0, self.weight_bytes - self.weight_space_bytes)

    @property
    def activation_excess_bytes(self) -> int:
        """By how many bytes the activations are too large, 0 where they fit."""
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
    """Compare a model's memory with a device's.

    On a microcontroller the weights must fit its flash and the activations its RAM; elsewhere both
    share the RAM. Latency is estimated in `bench/estimate`.

    Args:
        target: The device.
        params: Number of weights.
        peak_activation_bytes: Bytes of the largest activations at one moment, at `precision`.
        precision: The number format of weights and activations.
        weight_bytes: Bytes of the weights where a file's size is known, by default `params` times
            the width of the format.

    Returns:
        Both comparisons, as figures and as lines of text.
    """
    weights = params * BYTES_PER_WEIGHT[precision] if weight_bytes is None else weight_bytes
    ram = int(target.memory.ram_bytes * USABLE_SHARE)
    if target.memory.flash_bytes is not None:
        weight_space, activation_space = target.memory.flash_bytes, ram
    else:
        weight_space, activation_space = ram, max(0, ram - weights)
    fits = weights <= weight_space and peak_activation_bytes <= activation_space
    weight_memory = "flash" if target.memory.flash_bytes else "usable memory"
    activation_memory = "usable memory beside the weights"
    verdict = "it does not fit; cut further, quantise to int8, or choose a larger device"
    return Fit(
        target=target.name,
        fits=fits,
        weight_bytes=weights,
        weight_space_bytes=weight_space,
        activation_bytes=peak_activation_bytes,
        activation_space_bytes=activation_space,
        lines=(
            f"{target.name}: {target.title}",
            _comparison(f"weights ({precision})", weights, weight_space, weight_memory),
            _comparison(
                "peak activation", peak_activation_bytes, activation_space, activation_memory
            ),
            "it fits" if fits else verdict,
        ),
    )


def _comparison(what: str, need: int, space: int, where: str) -> str:
    need_text, space_text = size_text(need), size_text(space)
    if need <= space:
        return f"{what}: {need_text} of {space_text} {where}"
    times = f", {need / space:.1f} times too large" if space else ""
    excess = size_text(need - space)
    return f"{what}: {need_text}, but only {space_text} {where}: {excess} too much{times}"


def size_text(count: int) -> str:
    """Format a number of bytes in powers of a thousand: 3200000 -> '3.2 MB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            digits = ".3g" if count < 1000 * scale else ".0f"
            return f"{count / scale:{digits}} {unit}"
    return f"{count} B"
