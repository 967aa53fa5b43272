"""Latency estimates for devices that are not available: a likely value and its error bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ...targets.profile import Precision, TargetProfile
from .calibration import LEVEL, Calibration, LeftOut, error_factor, fit, leave_one_out
from .costs import OperatorCosts
from .machine import machine_of
from .points import device_titles, family_of, known_points
from .workload import Workload


@dataclass(frozen=True)
class Estimate:
    """The estimated latency of one inference; it is never stored as a measurement.

    Attributes:
        target: Name of the device profile.
        runtime: Name of the runtime.
        precision: Precision of the weights.
        threads: Number of threads.
        likely_s: Likely latency in seconds.
        low_s: Lower end of the error bar.
        high_s: Upper end of the error bar.
        factor: high_s over likely_s, and likely_s over low_s.
        rests_on: The measurements that it was calibrated on.
        validated_on: The left-out devices whose prediction errors gave the error bar.
    """

    target: str
    runtime: str
    precision: Precision
    threads: int
    likely_s: float
    low_s: float
    high_s: float
    factor: float
    rests_on: str
    validated_on: tuple[str, ...]

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        bar = f"{time_text(self.low_s)} to {time_text(self.high_s)}"
        return (
            f"time of one inference, estimate: {time_text(self.likely_s)} ({bar}) in "
            f"{self.runtime}, {self.precision}, {threads}; the bar, a factor of {self.factor:.1f}, "
            f"covers {100 * LEVEL:.0f} % of left-out devices; rests on {self.rests_on}; "
            "measure it on the device"
        )


@dataclass(frozen=True)
class _ErrorBar:
    factor: float
    devices: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    calibration: Calibration
    # For a runtime that was measured on the architecture, and for any other one.
    measured_runtime: _ErrorBar
    other_runtime: _ErrorBar
    device_count: int


@cache
def _model() -> _Model:
    points, costs = known_points(), OperatorCosts.load()
    exact = [
        entry
        for entry in leave_one_out(points, costs)
        if entry.cell == (entry.point.family, entry.point.machine.architecture)
    ]
    others = leave_one_out(points, costs, without_runtime=True)
    return _Model(
        calibration=fit(points, costs),
        measured_runtime=_ErrorBar(error_factor(exact), _titles(exact)),
        other_runtime=_ErrorBar(error_factor(others), _titles(others)),
        device_count=len({point.machine.device for point in points}),
    )


def calibration() -> Calibration:
    """The calibration of every estimate, by all known points."""
    return _model().calibration


def _titles(left_out: Sequence[LeftOut]) -> tuple[str, ...]:
    titles = device_titles()
    return tuple(sorted({titles[entry.point.machine.device] for entry in left_out}))


def can_estimate(profile: TargetProfile, precision: Precision) -> str | None:
    """Return None, or why no time can be estimated for the device, in one line."""
    if profile.peak.of(precision) is None and profile.peak.fp32_macs_per_s is None:
        return f"time: no estimate; the profile states no {precision} peak for this device"
    if profile.kind == "gpu" or (profile.tvm_target or {}).get("kind") == "cuda":
        return (
            "time: no estimate; its peak is a GPU's, and no GPU was measured to calibrate one "
            "with; measure it on the device"
        )
    if profile.kind == "microcontroller":
        return "time: no estimate; no microcontroller was measured to calibrate one with"
    return None


def estimate(
    workload: Workload,
    profile: TargetProfile,
    *,
    runtime: str | None = None,
    precision: Precision = "fp32",
    threads: int | None = None,
) -> Estimate:
    """Estimate the latency of a workload on a device.

    Args:
        workload: The operators of one inference.
        profile: The device.
        runtime: The runtime; by default the profile's preferred one.
        precision: Precision of the weights.
        threads: Number of threads; by default every core of the profile's first cluster.

    Returns:
        The estimate; its bar covers a share `LEVEL` of devices left out of the calibration.

    Raises:
        InputError: The profile states no peak, or has fewer cores than threads.
    """
    machine = machine_of(profile, precision, threads)
    runtime = runtime or profile.preferred_runtime
    family, model = family_of(runtime, precision), _model()
    cell = model.calibration.cell(machine, family)
    exact = cell == (family, machine.architecture)
    bar = model.measured_runtime if exact else model.other_runtime
    likely = model.calibration.seconds(workload, machine, family)
    rests = " on ".join(part for part in cell if part) or f"all {model.device_count} devices"
    if not exact and cell[1]:
        rests = f"other runtimes on {cell[1]}"
    return Estimate(
        target=profile.name,
        runtime=runtime,
        precision=precision,
        threads=machine.threads,
        likely_s=likely,
        low_s=likely / bar.factor,
        high_s=likely * bar.factor,
        factor=bar.factor,
        rests_on=rests,
        validated_on=bar.devices,
    )


def time_text(seconds: float) -> str:
    """Format seconds with two or three figures and a unit."""
    if seconds >= 1:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds >= 0.0995:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
