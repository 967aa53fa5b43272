"""An estimate of a latency on a device that is not at hand: a likely value, its error bar, and what
both rest on.
"""

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
    """Seconds of one inference, likely within low_s and high_s. An estimate is never a measurement
    and never stored as one.
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
    # The devices that were measured, and whose left-out predictions the bar was taken from.
    held_against: tuple[str, ...]

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        bar = f"{time_text(self.low_s)} to {time_text(self.high_s)}"
        return (
            f"time of one inference, estimate: {time_text(self.likely_s)} ({bar}) in {self.runtime}, {self.precision}, {threads}; "
            f"the bar, a factor of {self.factor:.1f}, held {100 * LEVEL:.0f} % of devices left out; rests on {self.rests_on}; measure it on the device"
        )


@dataclass(frozen=True)
class _Known:
    calibration: Calibration
    # The error where the runtime was measured on that kind of machine, and where it was not.
    near: float
    far: float
    near_devices: tuple[str, ...]
    far_devices: tuple[str, ...]
    devices: int


@cache
def _known() -> _Known:
    points, costs = known_points(), OperatorCosts.load()
    near, far = leave_one_out(points, costs), leave_one_out(points, costs, without_runtime=True)
    exact = [
        entry
        for entry in near
        if entry.cell == (entry.point.family, entry.point.machine.architecture)
    ]
    return _Known(
        calibration=fit(points, costs),
        near=error_factor(exact),
        far=error_factor(far),
        near_devices=_titles(exact),
        far_devices=_titles(far),
        devices=len({point.machine.device for point in points}),
    )


def _titles(left_out: Sequence[LeftOut]) -> tuple[str, ...]:
    titles = device_titles()
    return tuple(sorted({titles[entry.point.machine.device] for entry in left_out}))


def can_estimate(profile: TargetProfile, precision: Precision) -> str | None:
    """None, or one line that says why no time is estimated for the device."""
    if profile.peak.of(precision) is None and profile.peak.fp32_macs_per_s is None:
        return f"time: no estimate; the profile states no {precision} peak for this device"
    if profile.kind == "gpu" or (profile.tvm_target or {}).get("kind") == "cuda":
        return "time: no estimate; its peak is a GPU's, and no GPU was measured to calibrate one with; measure it on the device"
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
    """The latency of a workload on a device, from everything that was measured elsewhere.

    runtime: the profile's preferred one by default; threads: every core of the profile's first
    cluster by default. The bar holds `LEVEL` of devices that were left out of the calibration.
    Errors: InputError as `machine_of`.
    """
    machine = machine_of(profile, precision, threads)
    runtime = runtime or profile.preferred_runtime
    family, known = family_of(runtime, precision), _known()
    cell = known.calibration.cell(machine, family)
    exact = cell == (family, machine.architecture)
    factor = known.near if exact else known.far
    likely = known.calibration.seconds(workload, machine, family)
    rests = " on ".join(part for part in cell if part) or f"all {known.devices} devices"
    if not exact and cell[1]:
        rests = f"other runtimes on {cell[1]}"
    held = known.near_devices if exact else known.far_devices
    return Estimate(
        profile.name,
        runtime,
        precision,
        machine.threads,
        likely,
        likely / factor,
        likely * factor,
        factor,
        rests,
        held,
    )


def time_text(seconds: float) -> str:
    """Seconds for people: two or three figures and a unit."""
    if seconds >= 1:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return (
        f"{seconds * 1e3:.2g} ms"
        if seconds < 0.0995 and seconds >= 1e-3
        else f"{seconds * 1e3:.0f} ms"
        if seconds >= 0.0995
        else f"{seconds * 1e6:.0f} µs"
    )
