"""Does a model fit a device? Weights and activations against its memory, and an estimate of the time, said to be one."""

from __future__ import annotations

from dataclasses import dataclass

from .profile import Precision, TargetProfile

BYTES_PER_WEIGHT: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
# The share of a device's memory that an application may count on; the rest belongs to the system, or to the program's own stack and code.
USABLE_SHARE = 0.75
# An inference library reaches between these shares of the peak on a ViT. Measured: 71 % for DeiT-T in fp32 on an AVX-512 server core
# (its sgemm peak taken as the limit); the lower end is a cautious guess for small widths and for boards.
BEST_SHARE, LIKELY_SHARE, WORST_SHARE = 0.75, 0.4, 0.1


@dataclass(frozen=True)
class Fit:
    """The answer: needed and available bytes, and the time of one inference as (low, likely, high) seconds, an estimate."""

    target: str
    fits: bool
    weight_bytes: int
    weight_space_bytes: int
    activation_bytes: int
    activation_space_bytes: int
    estimate_s: tuple[float, float, float] | None
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def check(
    target: TargetProfile,
    *,
    params: int,
    macs: int,
    peak_activation_bytes: int,
    precision: Precision = "fp32",
    weight_bytes: int | None = None,
) -> Fit:
    """Hold a model against a device.

    params and macs of one inference, peak_activation_bytes at the given precision; weight_bytes replaces params x width where a file's size is
    known. On a microcontroller weights must fit its flash and activations its RAM; elsewhere both share the RAM. The time is the roofline
    max(macs / (share of the peak), weights / bandwidth): an estimate with a wide range, never a measurement.
    """
    weights = params * BYTES_PER_WEIGHT[precision] if weight_bytes is None else weight_bytes
    ram = int(target.memory.ram_bytes * USABLE_SHARE)
    if target.memory.flash_bytes is not None:
        weight_space, activation_space = target.memory.flash_bytes, ram
    else:
        weight_space, activation_space = ram, max(0, ram - weights)
    lines = [f"{target.name}: {target.title}"]
    weights_fit = _line(lines, f"weights ({precision})", weights, weight_space, "flash" if target.memory.flash_bytes else "usable memory")
    activations_fit = _line(lines, "peak activation", peak_activation_bytes, activation_space, "usable memory beside the weights")
    estimate = _estimate(target, macs, weights, precision)
    if estimate is None:
        lines.append(f"time: not known; the profile states no {precision} peak for this device")
    else:
        low, likely, high = estimate
        lines.append(f"time of one inference, estimate: about {_time(likely)} ({_time(low)} to {_time(high)}); measure it on the device")
        if (source := target.source_of(f"peak.{precision}_macs_per_s")) and source.startswith("unverified"):
            lines.append(f"  (its {precision} peak is unverified)")
    fits = weights_fit and activations_fit
    lines.append("it fits" if fits else "it does not fit; cut further, quantise to int8, or choose a larger device")
    return Fit(target.name, fits, weights, weight_space, peak_activation_bytes, activation_space, estimate, tuple(lines))


def _estimate(target: TargetProfile, macs: int, weight_bytes: int, precision: Precision) -> tuple[float, float, float] | None:
    # A CPU without a unit for a precision runs it at fp32's rate; a device that states neither cannot be estimated.
    peak = target.peak.of(precision) or (target.peak.fp32_macs_per_s if precision != "fp32" else None)
    if peak is None:
        return None
    bandwidth = target.memory.bandwidth_bytes_per_s
    reading = weight_bytes / bandwidth if bandwidth else 0.0
    low, likely, high = (max(macs / (peak * share), reading) for share in (BEST_SHARE, LIKELY_SHARE, WORST_SHARE))
    return low, likely, high


def _line(lines: list[str], what: str, need: int, space: int, where: str) -> bool:
    if need <= space:
        lines.append(f"{what}: {_size(need)} of {_size(space)} {where}")
        return True
    times = f", {need / space:.1f} times too large" if space else ""
    lines.append(f"{what}: {_size(need)}, but only {_size(space)} {where}: {_size(need - space)} too much{times}")
    return False


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
