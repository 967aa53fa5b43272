"""What an operator costs on a machine, in the machine's own units: shares of its peak, cycles a
vector, cycles a node.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..local.cost_table import nonnegative_least_squares
from .machine import Machine
from .workload import Operator, OperatorKind, Workload

KINDS: tuple[OperatorKind, ...] = ("projection", "attention", "activation", "norm", "add")
FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class OperatorCost:
    """Of one kind of operator: time over the roofline of its multiply-adds (1 is the peak), cycles
    a vector of numbers, cycles a node.
    """

    over_peak: float
    cycles_per_vector: float
    cycles_per_node: float


@dataclass(frozen=True)
class OperatorCosts:
    """The cost of every kind, and where it was calibrated. A machine of another make is told apart
    by one factor (calibration.py).
    """

    kinds: dict[OperatorKind, OperatorCost]
    calibrated_on: str

    def seconds(self, workload: Workload, machine: Machine) -> float:
        """Roofline time of one inference, before the factor of the runtime and machine."""
        reads = workload.weights * machine.weight_bytes > machine.last_cache_bytes
        return sum(
            self.operator_seconds(operator, machine, from_memory=reads)
            for operator in workload.operators
        )

    def operator_seconds(self, operator: Operator, machine: Machine, *, from_memory: bool) -> float:
        """max(arithmetic, reading the weights) + vectors + the node's fixed cost."""
        cost = self.kinds[operator.kind]
        peak = machine.float_macs_per_s if operator.kind == "attention" else machine.peak_macs_per_s
        arithmetic = cost.over_peak * operator.macs / peak
        bandwidth = machine.bandwidth_bytes_per_s
        reading = (
            operator.weights * machine.weight_bytes / bandwidth
            if bandwidth and from_memory
            else 0.0
        )
        vectors = cost.cycles_per_vector * operator.elements / machine.vector_numbers_per_s
        return max(arithmetic, reading) + vectors + cost.cycles_per_node / machine.clock_hz

    def save(self, path: Path = FILE) -> None:
        """Write the JSON file (schema vitrim.operator_costs/1)."""
        from ...core.storage import replace_file

        content = {
            "schema": "vitrim.operator_costs/1",
            "calibrated_on": self.calibrated_on,
            "kinds": {k: asdict(c) for k, c in self.kinds.items()},
        }
        replace_file(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path = FILE) -> OperatorCosts:
        """Read the calibrated costs."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            {kind: OperatorCost(**data["kinds"][kind]) for kind in KINDS}, data["calibrated_on"]
        )


@dataclass(frozen=True)
class TimedOperator:
    """A node as a runtime's profiler saw it, on the machine that ran it."""

    operator: Operator
    machine: Machine
    seconds: float


def fit_costs(timed: Sequence[TimedOperator], calibrated_on: str) -> OperatorCosts:
    """Non-negative least squares of the relative error, one kind at a time. Needs nodes of every
    kind, in at least three sizes.
    """
    kinds: dict[OperatorKind, OperatorCost] = {}
    for kind in KINDS:
        rows = [entry for entry in timed if entry.operator.kind == kind]
        matrix = np.array([_features(entry) for entry in rows]) / np.array(
            [[entry.seconds] for entry in rows]
        )
        kinds[kind] = OperatorCost(
            *(float(value) for value in nonnegative_least_squares(matrix, np.ones(len(rows))))
        )
    return OperatorCosts(kinds, calibrated_on)


def rescale(
    costs: OperatorCosts, whole: Sequence[tuple[Workload, Machine, float]]
) -> OperatorCosts:
    """Two factors, for what grows with the sizes and for the fixed cost of nodes, from latencies of
    whole networks without a profiler.

    The profiler costs time at each node, which a small network feels most. whole: (workload,
    machine, seconds) of the calibrated machine.
    """
    fixed = [
        sum(costs.kinds[operator.kind].cycles_per_node for operator in workload.operators)
        / machine.clock_hz
        for workload, machine, _ in whole
    ]
    sized = [
        costs.seconds(workload, machine) - part
        for (workload, machine, _), part in zip(whole, fixed, strict=True)
    ]
    seconds = np.array([entry[2] for entry in whole])
    grow, node = nonnegative_least_squares(
        np.array([sized, fixed]).T / seconds[:, None], np.ones(len(whole))
    )
    kinds = {
        kind: OperatorCost(
            cost.over_peak * float(grow),
            cost.cycles_per_vector * float(grow),
            cost.cycles_per_node * float(node),
        )
        for kind, cost in costs.kinds.items()
    }
    return OperatorCosts(kinds, costs.calibrated_on)


def _features(entry: TimedOperator) -> list[float]:
    operator, machine = entry.operator, entry.machine
    # A projection's own output is part of its arithmetic; counting its vectors too would leave the
    # split between both to chance.
    elements = 0 if operator.kind == "projection" else operator.elements
    return [
        operator.macs / machine.peak_macs_per_s,
        elements / machine.vector_numbers_per_s,
        1 / machine.clock_hz,
    ]
