"""Fit and estimated latency of a run's models on devices that were not measured.

Everything follows from a network's architecture: its operators, its weights and the memory that its
activations need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import get_args

from ..bench.estimate.calibration import LEVEL
from ..bench.estimate.prediction import Estimate, can_estimate, estimate
from ..bench.estimate.workload import Operator, Workload, attention, pointwise, projection
from ..bench.report.model import EstimatedLatency, EstimateEntry
from ..compress.network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..compress.network.count import branch_tokens, count_params
from ..compress.network.select_specs import (
    SelectSpec,
    SelectWidths,
    select_inputs,
    select_macs,
    select_widths,
)
from ..targets.catalog import load_target
from ..targets.check import check
from ..targets.profile import Precision, TargetProfile

WIDTH_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def run_estimates(
    models: Mapping[str, Architecture],
    precisions: Sequence[str],
    targets: Sequence[str],
    file_bytes: Mapping[tuple[str, str], int],
) -> list[EstimateEntry]:
    """Estimate every model on every target, in every precision that the estimator supports.

    Args:
        models: Architectures by the names that the report uses.
        precisions: Precisions of the run; all but fp32, fp16 and int8 are ignored.
        targets: Names of targets, or paths of target TOMLs.
        file_bytes: Size of each exported (model, precision). Where it is missing, the weights are
            counted as parameters times the width of the precision.

    Returns:
        The entries of report.json, grouped by target.

    Raises:
        InputError: A target does not exist.
    """
    supported = [precision for precision in get_args(Precision) if precision in precisions]
    return [
        _entry(name, architecture, precision, profile, file_bytes.get((name, precision)))
        for profile in map(load_target, targets)
        for name, architecture in models.items()
        for precision in supported
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
    reason = can_estimate(profile, precision) if fit.fits else "it does not fit"
    latency = None
    if not reason:
        latency = estimate(network_workload(architecture), profile, precision=precision)
    return EstimateEntry(
        model=name,
        precision=precision,
        target=profile.name,
        device=profile.title,
        weight_bytes=fit.weight_bytes,
        weight_space_bytes=fit.weight_space_bytes,
        activation_bytes=fit.activation_bytes,
        activation_space_bytes=fit.activation_space_bytes,
        latency=latency and _latency(latency),
        no_latency=reason and reason.removeprefix("time: no estimate; "),
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
        held_against=found.validated_on,
    )


def peak_activation_bytes(architecture: Architecture, precision: str = "fp32") -> int:
    """Peak memory of the activations in bytes at batch 1, each tensor freed after its last use.

    This is a lower bound: it counts the residual stream and the inputs and outputs of one operator
    at a time. A runtime that fuses less or that needs scratch memory uses more.
    """
    channels, height, width = architecture.image
    stream = architecture.tokens * architecture.embed
    moments = [channels * height * width + stream]
    moments += [
        tokens * architecture.embed + _branch_peak(branch, architecture, tokens, queries)
        for branch, tokens, queries in branch_tokens(architecture)
    ]
    # The stream is there while a selection scores it, and while it gathers the rows that stay.
    moments += [
        tokens * architecture.embed + max(_score_peak(widths, tokens), kept * architecture.embed)
        for _, widths, _, tokens, kept in _selections(architecture)
    ]
    return max(moments) * WIDTH_BYTES[precision]


def _branch_peak(branch: BranchSpec, architecture: Architecture, tokens: int, queries: int) -> int:
    core = branch.core
    read = tokens * architecture.read_width(branch.reads)
    written = queries * architecture.read_width(branch.writes)
    if isinstance(core, AttentionSpec):
        each, v = core.heads * core.qk, core.heads * core.v
        inputs = (queries + tokens) * each + tokens * v
        scores = core.heads * queries * tokens
        # In order: projections; scores of queries and keys; softmax in place and the weighted
        # values; the output projection.
        mixed = scores + (tokens + queries) * v
        return max(read + inputs, inputs + scores, mixed, queries * v + written)
    if isinstance(core, FfnSpec):
        hidden = queries * core.hidden * (2 if core.gated else 1)
        return max(read + hidden, hidden + written)
    return 0


def _score_peak(widths: SelectWidths, tokens: int) -> int:
    """The numbers of the largest layer of a predictor with its inputs; of attention the scores."""
    layers: tuple[int, ...] = (widths.reads, widths.local + widths.pooled, *widths.hidden, 1)
    return tokens * max(before + after for before, after in pairwise(layers))


def _selections(
    architecture: Architecture,
) -> Iterator[tuple[SelectSpec, SelectWidths, int, int, int]]:
    """Each selection and its widths; tokens of the step before, before it, and behind it."""
    counts = (architecture.tokens, *architecture.step_tokens())
    for select, before, tokens in select_inputs(architecture, counts):
        kept = architecture.prefix + select.left
        yield select, select_widths(architecture, select), before, tokens, kept


def network_workload(architecture: Architecture, name: str = "network") -> Workload:
    """List the operators of one inference of one image, as vitrim's graphs compute it.

    The last attention has queries only for the tokens that the head reads. Gates, rotary embeddings
    and position biases are left out: they are small beside the products, which are all counted,
    those of selections of tokens included. The rows that a selection gathers count as an addition.
    """
    return Workload(name, tuple(_operators(architecture.model_copy(update={"last_queries": True}))))


def _operators(architecture: Architecture) -> Iterator[Operator]:
    yield from _stem_operators(architecture)
    for branch, tokens_in, tokens_out in branch_tokens(architecture):
        yield from _branch_operators(architecture, branch, tokens_in, tokens_out)
    for select, widths, before, tokens, kept in _selections(architecture):
        macs = select_macs(architecture, select, widths, before, tokens)
        yield from _select_operators(select, widths, macs, tokens - architecture.prefix)
        yield pointwise(f"{select.name}.rows", "add", kept * architecture.embed)
    pooled = architecture.pooled_prefix or architecture.final_tokens
    yield pointwise("norm", "norm", pooled * architecture.embed)
    if architecture.head is not None:
        yield projection("head", 1, architecture.head_width, architecture.classes)


def _select_operators(
    select: SelectSpec, widths: SelectWidths, macs: int, patches: int
) -> Iterator[Operator]:
    """The products of a selection, whose multiply-adds are `macs` in all."""
    if select.predictor is None:
        if macs:
            # Of attention: its weights are read for the sub-layer itself.
            yield Operator(f"{select.name}.scores", "projection", macs, patches * widths.heads)
        return
    if select.norm is not None:
        yield pointwise(f"{select.name}.norm", "norm", patches * widths.reads)
    first = widths.local + widths.pooled
    layers = (first, *widths.hidden, 1)
    yield projection(f"{select.name}.0", patches, widths.reads, first)
    for number, (inner, units) in enumerate(pairwise(layers), 1):
        found = projection(f"{select.name}.{number}", patches, inner, units)
        if number == 1:
            # The mean of the pooled units is one row.
            found = replace(found, macs=(patches * widths.local + widths.pooled) * units)
        yield found
    yield pointwise(f"{select.name}.act", "activation", patches * sum(layers[:-1]))


def _stem_operators(architecture: Architecture) -> Iterator[Operator]:
    stem, channels = architecture.stem, architecture.image[0]
    sizes = stem.sizes(*architecture.image[1:])
    for number, (layer, (height, width)) in enumerate(zip(stem.before, sizes, strict=False)):
        for name, rows, inner, columns in layer.products(channels, height * width):
            yield projection(f"stem.{number}.{name}", rows, inner, columns)
        channels = layer.channels
    window = channels * stem.patch[0] * stem.patch[1]
    written = architecture.read_width(architecture.stem_writes)
    yield projection("stem", architecture.patches, window, written)


def _branch_operators(
    architecture: Architecture, branch: BranchSpec, tokens_in: int, tokens_out: int
) -> Iterator[Operator]:
    read = architecture.read_width(branch.reads)
    written = architecture.read_width(branch.writes)
    core, site = branch.core, branch.name
    yield pointwise(f"{site}.norm", "norm", tokens_in * read)
    if isinstance(core, AttentionSpec):
        qk, values = core.parts * core.qk, core.heads * core.v
        yield projection(f"{site}.q", tokens_out, read, core.heads * qk)
        yield projection(f"{site}.k", tokens_in, read, core.kv_heads * qk)
        yield projection(f"{site}.v", tokens_in, read, core.kv_heads * core.v)
        yield attention(site, core.heads, tokens_out, tokens_in, qk, core.v)
        yield projection(f"{site}.out", tokens_out, values, written)
    elif isinstance(core, FfnSpec):
        yield projection(f"{site}.fc1", tokens_out, read, core.hidden * (2 if core.gated else 1))
        yield pointwise(f"{site}.act", "activation", tokens_out * core.hidden)
        yield projection(f"{site}.out", tokens_out, core.hidden, written)
    yield pointwise(f"{site}.add", "add", tokens_out * written)
