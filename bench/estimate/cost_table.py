"""The costs of operators as a cost table, for latency budgets of devices that were not measured."""

from __future__ import annotations

import math
from typing import cast

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ...targets.profile import Precision, TargetProfile
from .machine import machine_of
from .points import family_of
from .prediction import calibration, can_estimate, estimate
from .workload import OperatorKind, Workload

# The nodes of each sub-layer and of the ends, as `pipeline.estimates.network_workload` has them.
ATTENTION: tuple[OperatorKind, ...] = ("norm", *("projection",) * 4, "attention", "add")
FFN: tuple[OperatorKind, ...] = ("norm", "projection", "activation", "projection", "add")
ENDS: tuple[OperatorKind, ...] = ("projection", "norm", "projection")
# A predictor of two layers; choosing and gathering count as two additions.
SELECTION: tuple[OperatorKind, ...] = ("norm", "projection", "activation", "projection")
SELECTION = (*SELECTION, "add", "add")


def estimated_table(
    profile: TargetProfile,
    *,
    runtime: str | None = None,
    precision: str = "fp32",
    threads: int = 1,
) -> CostTable:
    """The cost table of the estimates' operator costs; budgets by it are estimates.

    Weights that are read from memory count as arithmetic alone, so networks of few tokens take
    longer than this where a device's memory is slow.

    Args:
        profile: The device.
        runtime: The runtime; by default the profile's preferred one.
        precision: Precision of the artifacts.
        threads: Threads of the runtime.

    Returns:
        A table with `estimated` set.

    Raises:
        InputError: No time can be estimated for the device; the message has the reason.
    """
    runtime = runtime or profile.preferred_runtime
    weights = cast("Precision", "int8" if precision.startswith("int8") else precision)
    reason = can_estimate(profile, weights)
    if reason is not None:
        raise InputError(
            f"{profile.name}: {reason.removeprefix('time: ')}; give a cost table that "
            "`vitrim bench --cost-table FILE --on DEVICE` measured"
        )
    machine = machine_of(profile, weights, threads)
    found = calibration()
    level = found.levels[found.cell(machine, family_of(runtime, weights))]
    unit_ms = 1e3 * math.exp(level + found.threads_power * math.log(machine.threads))
    kinds = found.costs.kinds

    def nodes(names: tuple[OperatorKind, ...]) -> float:
        return sum(kinds[name].cycles_per_node for name in names) / machine.clock_hz

    def vectors(name: OperatorKind) -> float:
        return kinds[name].cycles_per_vector / machine.vector_numbers_per_s

    product = kinds["projection"].over_peak / machine.peak_macs_per_s
    seconds = {
        "attention": nodes(ATTENTION),
        "projections": product,
        "attention products": kinds["attention"].over_peak / machine.float_macs_per_s,
        "output": product,
        "softmax": vectors("attention"),
        "attention norms": vectors("norm"),
        "attention residual": vectors("add"),
        "ffn": nodes(FFN),
        "ffn products": product,
        "ffn norms": vectors("norm") + vectors("add"),
        "activation": vectors("activation"),
        "call": nodes(ENDS),
        "stem": product,
        "classes": product,
        "selection": nodes(SELECTION),
        "selection products": product,
        "selection scores": vectors("add"),
        "selection norms": vectors("norm"),
        "selection rows": vectors("add"),
    }
    bar = estimate(
        Workload("none", ()), profile, runtime=runtime, precision=weights, threads=threads
    )
    return CostTable(
        target=profile.name,
        target_features=tuple(profile.features),
        runtime=runtime,
        precision=precision,
        threads=threads,
        costs_ms={part: unit_ms * each for part, each in seconds.items()},
        estimated=f"operator costs within a factor of {bar.factor:.1f}, rests on {bar.rests_on}",
    )
