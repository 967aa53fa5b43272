"""What the models of a run would need on devices that are not at hand: fit and estimated latency,
as the report's entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from ..bench.estimate.calibration import LEVEL
from ..bench.estimate.prediction import Estimate, can_estimate, estimate
from ..bench.report.model import EstimatedLatency, EstimateEntry
from ..compress.network.architecture import Architecture
from ..compress.network.count import count_params
from ..targets.catalog import load_target
from ..targets.check import check
from ..targets.profile import Precision, TargetProfile
from .network_workload import network_workload
from .peak_activations import peak_activation_bytes


def run_estimates(
    models: Mapping[str, Architecture],
    precisions: Sequence[str],
    targets: Sequence[str],
    file_bytes: Mapping[tuple[str, str], int],
) -> list[EstimateEntry]:
    """Every model in every precision that the estimator knows (fp32, fp16, int8), on every target.

    file_bytes: of each (model, precision) that was exported, in place of parameters times width.
    Errors: InputError for an unknown target.
    """
    known: list[Precision] = [
        precision for precision in get_args(Precision) if precision in precisions
    ]
    profiles = [load_target(name) for name in targets]
    return [
        _entry(name, architecture, precision, profile, file_bytes.get((name, precision)))
        for profile in profiles
        for name, architecture in models.items()
        for precision in known
    ]


def _entry(
    name: str,
    architecture: Architecture,
    precision: Precision,
    profile: TargetProfile,
    weight_bytes: int | None,
) -> EstimateEntry:
    fit = check(
        profile,
        params=count_params(architecture),
        peak_activation_bytes=peak_activation_bytes(architecture, precision),
        precision=precision,
        weight_bytes=weight_bytes,
    )
    why = can_estimate(profile, precision) if fit.fits else "it does not fit"
    return EstimateEntry(
        model=name,
        precision=precision,
        target=profile.name,
        device=profile.title,
        weight_bytes=fit.weight_bytes,
        weight_space_bytes=fit.weight_space_bytes,
        activation_bytes=fit.activation_bytes,
        activation_space_bytes=fit.activation_space_bytes,
        latency=None
        if why
        else _latency(estimate(network_workload(architecture), profile, precision=precision)),
        no_latency=why and why.removeprefix("time: no estimate; "),
    )


def _latency(found: Estimate) -> EstimatedLatency:
    return EstimatedLatency(
        estimated_s=found.likely_s,
        low_s=found.low_s,
        high_s=found.high_s,
        factor=found.factor,
        level=LEVEL,
        runtime=found.runtime,
        threads=found.threads,
        rests_on=found.rests_on,
        held_against=found.held_against,
    )
