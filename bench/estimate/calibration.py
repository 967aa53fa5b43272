"""From measured latencies to the factor between a roofline and the truth, and how far that factor
misses on machines left out of its fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .costs import OperatorCosts
from .machine import Machine
from .points import Point
from .workload import Workload

# Of machines left out, so many lie within the bar.
LEVEL = 0.8


@dataclass(frozen=True)
class Calibration:
    """log(latency / roofline) = level of the machines alike + threads_power * log(threads).

    `levels` holds the logarithm for what is alike, most alike first: (runtime, architecture), then
    any runtime on the architecture, then all.
    """

    costs: OperatorCosts
    threads_power: float
    levels: dict[tuple[str, str], float]
    devices: dict[tuple[str, str], int]

    def seconds(self, workload: Workload, machine: Machine, family: str) -> float:
        """The likely latency."""
        level = self.levels[self.cell(machine, family)]
        return self.costs.seconds(workload, machine) * math.exp(
            level + self.threads_power * math.log(machine.threads)
        )

    def cell(self, machine: Machine, family: str) -> tuple[str, str]:
        """What was measured and is most like the machine with this runtime."""
        wanted = ((family, machine.architecture), ("", machine.architecture), ("", ""))
        return next(cell for cell in wanted if cell in self.levels)


def fit(
    points: Sequence[Point], costs: OperatorCosts, threads_power: float | None = None
) -> Calibration:
    """The scaling over threads from devices measured with several, then for each group the median
    over devices of their own medians.
    """
    power = _threads_power(points, costs) if threads_power is None else threads_power
    residuals = [
        math.log(point.latency_s / costs.seconds(point.workload, point.machine))
        - power * math.log(point.machine.threads)
        for point in points
    ]
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for point, residual in zip(points, residuals, strict=True):
        for cell in (
            (point.family, point.machine.architecture),
            ("", point.machine.architecture),
            ("", ""),
        ):
            cells.setdefault(cell, {}).setdefault(point.machine.device, []).append(residual)
    levels = {
        cell: float(np.median([np.median(values) for values in devices.values()]))
        for cell, devices in cells.items()
    }
    return Calibration(
        costs, power, levels, {cell: len(devices) for cell, devices in cells.items()}
    )


def _threads_power(points: Sequence[Point], costs: OperatorCosts) -> float:
    # A device with one runtime, setting and model at several thread counts tells what is lost by
    # splitting the work.
    groups: dict[tuple[str, str, str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault(
            (
                point.machine.device,
                point.family,
                point.setting,
                point.workload.name,
                point.machine.precision,
            ),
            [],
        ).append(point)
    slopes: dict[str, list[float]] = {}
    for group in groups.values():
        low, high = (
            min(group, key=lambda p: p.machine.threads),
            max(group, key=lambda p: p.machine.threads),
        )
        if low.machine.threads == high.machine.threads:
            continue
        change = (high.latency_s / costs.seconds(high.workload, high.machine)) / (
            low.latency_s / costs.seconds(low.workload, low.machine)
        )
        slopes.setdefault(low.machine.device, []).append(
            math.log(change) / math.log(high.machine.threads / low.machine.threads)
        )
    return float(np.median([np.median(values) for values in slopes.values()])) if slopes else 0.0


@dataclass(frozen=True)
class LeftOut:
    """A point predicted from every other device. ratio: predicted over measured; cell: what the
    prediction rested on.
    """

    point: Point
    predicted_s: float
    cell: tuple[str, str]

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_s / self.point.latency_s


def leave_one_out(
    points: Sequence[Point], costs: OperatorCosts, *, without_runtime: bool = False
) -> list[LeftOut]:
    """Each point, predicted by a calibration that never saw its device with any threads, setting,
    runtime or model.

    without_runtime: nor the level of any point of its runtime, which tells the error where a
    runtime was never measured on a kind of machine.
    """
    found = []
    for device, family in dict.fromkeys((point.machine.device, point.family) for point in points):
        others = [point for point in points if point.machine.device != device]
        seen = [point for point in others if point.family != family] if without_runtime else others
        if not seen:
            continue
        calibration = fit(seen, costs, _threads_power(others, costs))
        for point in points:
            if (point.machine.device, point.family) == (device, family):
                predicted = calibration.seconds(point.workload, point.machine, point.family)
                found.append(
                    LeftOut(point, predicted, calibration.cell(point.machine, point.family))
                )
    return found


def error_factor(left_out: Sequence[LeftOut], level: float = LEVEL) -> float:
    """The factor within which `level` of the devices were predicted, each by its median point
    (split conformal: rather too wide).
    """
    errors = sorted(device_errors(left_out).values())
    # The smallest order statistic that covers one more device with that probability, were devices
    # alike.
    place = min(len(errors), math.ceil((len(errors) + 1) * level))
    return math.exp(errors[place - 1])


def device_errors(left_out: Sequence[LeftOut]) -> dict[str, float]:
    """Of each device the median of |log(predicted / measured)|."""
    devices: dict[str, list[float]] = {}
    for entry in left_out:
        devices.setdefault(entry.point.machine.device, []).append(abs(math.log(entry.ratio)))
    return {device: float(np.median(errors)) for device, errors in devices.items()}
