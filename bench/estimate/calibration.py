"""Calibration of rooflines by measured latencies, and its error on machines left out of the fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .costs import OperatorCosts
from .machine import Machine
from .points import Point
from .workload import Workload

# The share of left-out machines that lie within the error bar.
LEVEL = 0.8


@dataclass(frozen=True)
class Calibration:
    """The model log(latency / roofline) = level of the cell + threads_power * log(threads).

    A cell is a group of similar measurements, from the most to the least specific: (runtime,
    architecture), ("", architecture) for any runtime, and ("", "") for all.

    Attributes:
        costs: The costs of operators.
        threads_power: Exponent of the thread count.
        levels: Logarithm of latency over roofline by cell.
        devices: Number of measured devices by cell.
    """

    costs: OperatorCosts
    threads_power: float
    levels: dict[tuple[str, str], float]
    devices: dict[tuple[str, str], int]

    def seconds(self, workload: Workload, machine: Machine, family: str) -> float:
        """Return the likely latency in seconds; `family` is the runtime, see `family_of`."""
        level = self.levels[self.cell(machine, family)]
        return self.costs.seconds(workload, machine) * math.exp(
            level + self.threads_power * math.log(machine.threads)
        )

    def cell(self, machine: Machine, family: str) -> tuple[str, str]:
        """Return the most specific measured cell for the machine with this runtime."""
        wanted = ((family, machine.architecture), ("", machine.architecture), ("", ""))
        return next(cell for cell in wanted if cell in self.levels)


def fit(
    points: Sequence[Point], costs: OperatorCosts, threads_power: float | None = None
) -> Calibration:
    """Fit a calibration.

    The exponent comes from devices that were measured with several thread counts. The level of a
    cell is the median over its devices of each device's median.

    Args:
        points: Measured latencies.
        costs: The costs of operators.
        threads_power: A given exponent; fitted by default.
    """
    power = _threads_power(points, costs) if threads_power is None else threads_power
    residuals = [
        math.log(point.latency_s / costs.seconds(point.workload, point.machine))
        - power * math.log(point.machine.threads)
        for point in points
    ]
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for point, residual in zip(points, residuals, strict=True):
        architecture = point.machine.architecture
        for cell in ((point.family, architecture), ("", architecture), ("", "")):
            cells.setdefault(cell, {}).setdefault(point.machine.device, []).append(residual)
    levels = {
        cell: float(np.median([np.median(values) for values in devices.values()]))
        for cell, devices in cells.items()
    }
    return Calibration(
        costs, power, levels, {cell: len(devices) for cell, devices in cells.items()}
    )


def _threads_power(points: Sequence[Point], costs: OperatorCosts) -> float:
    # Points of one device, runtime, setting and model differ in the thread count only, so they show
    # the loss of splitting the work.
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        machine = point.machine
        key = (machine.device, point.family, point.setting, point.workload.name, machine.precision)
        groups.setdefault(key, []).append(point)
    slopes: dict[str, list[float]] = {}
    for group in groups.values():
        low = min(group, key=lambda point: point.machine.threads)
        high = max(group, key=lambda point: point.machine.threads)
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
    """A point that was predicted from all other devices; `cell` is the one that was used."""

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
    """Predict each point by a calibration without any point of its device.

    Args:
        points: Measured latencies.
        costs: The costs of operators.
        without_runtime: Leave out all points of the point's runtime as well, for the error on
            machines where a runtime was never measured.
    """
    found = []
    for device, family in dict.fromkeys((point.machine.device, point.family) for point in points):
        others = [point for point in points if point.machine.device != device]
        training = (
            [point for point in others if point.family != family] if without_runtime else others
        )
        if not training:
            continue
        calibration = fit(training, costs, _threads_power(others, costs))
        for point in points:
            if (point.machine.device, point.family) == (device, family):
                predicted = calibration.seconds(point.workload, point.machine, point.family)
                found.append(
                    LeftOut(point, predicted, calibration.cell(point.machine, point.family))
                )
    return found


def error_factor(left_out: Sequence[LeftOut], level: float = LEVEL) -> float:
    """Return the factor within which a share `level` of the devices was predicted.

    Each device counts by the median of its points. This is the split-conformal bound, which is
    rather too wide.
    """
    errors = sorted(device_errors(left_out).values())
    # The smallest order statistic that covers one more exchangeable device with that probability.
    place = min(len(errors), math.ceil((len(errors) + 1) * level))
    return math.exp(errors[place - 1])


def device_errors(left_out: Sequence[LeftOut]) -> dict[str, float]:
    """Return the median of |log(predicted / measured)| for each device."""
    devices: dict[str, list[float]] = {}
    for entry in left_out:
        devices.setdefault(entry.point.machine.device, []).append(abs(math.log(entry.ratio)))
    return {device: float(np.median(errors)) for device, errors in devices.items()}
