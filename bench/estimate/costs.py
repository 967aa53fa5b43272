"""The cost of an operator on a machine: share of its peak, cycles per vector, cycles per node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.storage import replace_file
from ...targets.cost_fit import nonnegative_least_squares
from .machine import Machine
from .workload import Operator, OperatorKind, Workload

KINDS: tuple[OperatorKind, ...] = ("projection", "attention", "activation", "norm", "add")
FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class OperatorCost:
    """The cost of one kind of operator.

    Attributes:
        over_peak: Time of its multiply-adds over their roofline; 1 is the machine's peak.
        cycles_per_vector: Cycles per vector of numbers that it writes.
        cycles_per_node: Fixed cycles per node.
    """

    over_peak: float
    cycles_per_vector: float
    cycles_per_node: float


@dataclass(frozen=True)
class OperatorCosts:
    """The cost of every kind of operator, calibrated on one machine.

    Other runtimes and machines differ by one factor (calibration.py).
    """

    kinds: dict[OperatorKind, OperatorCost]
    calibrated_on: str

    def seconds(self, workload: Workload, machine: Machine) -> float:
        """Return the roofline time of one inference, without the factor of runtime and machine."""
        reads = workload.weights * machine.weight_bytes > machine.last_cache_bytes
        return sum(
            self.operator_seconds(operator, machine, from_memory=reads)
            for operator in workload.operators
        )

    def operator_seconds(self, operator: Operator, machine: Machine, *, from_memory: bool) -> float:
        """Return max(arithmetic, reading the weights) + vectors + the node's fixed cost."""
        cost = self.kinds[operator.kind]
        peak = machine.float_macs_per_s if operator.kind == "attention" else machine.peak_macs_per_s
        arithmetic = cost.over_peak * operator.macs / peak
        reading = 0.0
        if from_memory and machine.bandwidth_bytes_per_s:
            reading = operator.weights * machine.weight_bytes / machine.bandwidth_bytes_per_s
        vectors = cost.cycles_per_vector * operator.elements / machine.vector_numbers_per_s
        return max(arithmetic, reading) + vectors + cost.cycles_per_node / machine.clock_hz

    def save(self, path: Path = FILE) -> None:
        """Write the JSON file (schema vitrim.operator_costs/1)."""
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
    """A node with its profiled time, and the machine that ran it."""

    operator: Operator
    machine: Machine
    seconds: float


def fit_costs(timed: Sequence[TimedOperator], calibrated_on: str) -> OperatorCosts:
    """Fit the costs of each kind by non-negative least squares of the relative error.

    Every kind needs nodes of at least three sizes.
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
    """Correct the costs by two factors, fitted to latencies of whole networks without a profiler.

    One factor is that of costs that grow with the sizes, the other that of the fixed cost of nodes:
    the profiler adds time to each node, which matters most in a small network.

    Args:
        costs: Costs that were fitted to profiled nodes.
        whole: (workload, machine, seconds) on the calibrated machine.
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
    # A projection's output grows with its arithmetic, so a fit cannot separate the two.
    elements = 0 if operator.kind == "projection" else operator.elements
    return [
        operator.macs / machine.peak_macs_per_s,
        elements / machine.vector_numbers_per_s,
        1 / machine.clock_hz,
    ]
