"""Pruning without training as one step: rotate, predict, choose, cut, compensate, check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, BranchSpec
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from ..surgery.compactor import compact
from .allocation import (
    Cost,
    Option,
    allocate,
    branch_costs,
    macs_cost,
    network_cost,
    options,
    params_cost,
)
from .compensation import Fit, compensate
from .error_curves import Curve, Statistics, rotated_curves
from .sensitivity import features, patch_features, stream_weights
from .stream import Activations, Stream, check_images, has_output_projection

# Images for the backward pass of `stream_weights`.
WEIGHING_IMAGES = 48
# Share of the images that is kept for the check at the end.
CHECKED = 0.125
# How often the widths are chosen again after the removal of an attention changed the prices.
PRICINGS = 4
Kind = Literal["macs", "params"]
Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrimOptions:
    """How `trim` chooses widths.

    Attributes:
        round_to: Widths of ffn, qk and v are multiples of it (runtimes are fastest at 16).
        patches: Share of the patch tokens in what has to be preserved: 0 for a classifier (the
            default of a network with a head), 1 for dense prediction. None: 0 with a head, 0.5
            without.
        compensate: Refit the output projections after the cut.
        cost: Cost of a sub-layer in any unit, such as a table of measured latencies; used instead
            of multiply-adds or parameters, with `budget` in the same unit.
        seed: Seed of the random projections.
    """

    round_to: int = 16
    patches: float | None = None
    compensate: bool = True
    cost: Cost | None = None
    seed: int = 0


@dataclass(frozen=True)
class Check:
    """How near the compact network comes to the dense one, on images held out from the fit.

    Attributes:
        images: Their number.
        cosine: Mean cosine similarity of the pooled features.
        patch_cosine: Mean cosine similarity of the normalized patch tokens.
        agreement: Share of images with the same top-1 class; None without a head.
    """

    images: int
    cosine: float
    patch_cosine: float
    agreement: float | None


@dataclass(frozen=True)
class Trimmed:
    """The result of `trim`.

    Attributes:
        model: The compact, compensated network.
        rotated: The dense network in the basis in which it was cut.
        mask: What was kept of `rotated`; `compact(rotated, mask)` is the network before
            compensation.
        predicted_error: The expected error of the features, as a share of their variance, before
            anything was cut.
        check: The measured error.
        cost: Cost of the compact network as a share of the dense one.
        widths: The widths that each sub-layer keeps, by dimension.
        fits: What each refit achieved.
    """

    model: CompactModel
    rotated: CompactModel
    mask: StructuredMask
    predicted_error: float
    check: Check
    cost: float
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fits: tuple[Fit, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What a cut of any size starts from: one pass over the images serves all budgets.

    Attributes:
        source: The dense network.
        rotated: The same function in the basis in which it is cut.
        curves: For each sub-layer the weight of its depth, and its error curves.
        fitting: The images that the widths and the refit come from.
        checking: The images that were held out for the check.
        options: The options of the pass.
    """

    source: CompactModel
    rotated: CompactModel
    curves: Mapping[str, tuple[float, tuple[Curve, ...]]]
    fitting: Tensor
    checking: Tensor
    options: TrimOptions


def trim(
    model: nn.Module,
    images: Tensor,
    *,
    macs: float | None = None,
    params: float | None = None,
    options: TrimOptions = TrimOptions(),
    progress: Stage | None = None,
) -> Trimmed:
    """Prune a trained network without training, from unlabeled images, in minutes on a CPU.

    Args:
        model: A supported Vision Transformer, with or without a head; it is not modified.
        images: Unlabeled images, (images, channels, height, width), normalized as the model
            expects; 256 are a usable minimum, 500 are better. An eighth is held out for the check.
        macs: Share of the multiply-adds to keep, such as 0.7.
        params: Share of the parameters to keep; instead of `macs`.
        options: See `TrimOptions`.
        progress: Called with the name of the stage, the steps done, and the steps in all.

    Returns:
        The compact network, how it was cut, and how near it comes to the dense one.

    Raises:
        InputError: The images do not fit, or the budget is out of reach.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Frantar et al. 2022, "Optimal Brain Compression"; Kwon et al. 2022, "A Fast Post-Training
        Pruning Framework for Transformers".
    """
    _budget(macs, params)
    prediction = predict(model, images, options=options, progress=progress)
    return trim_to(prediction, macs=macs, params=params, progress=progress)


def predict(
    model: nn.Module,
    images: Tensor,
    *,
    options: TrimOptions = TrimOptions(),
    progress: Stage | None = None,
) -> Prediction:
    """Rotate the heads and predict the error of every width, for cuts of any size.

    Args:
        model: A supported Vision Transformer, with or without a head; it is not modified.
        images: Unlabeled images, as for `trim`.
        options: See `TrimOptions`.
        progress: As for `trim`.

    Returns:
        The rotated network with its error curves, for `trim_to`.

    Raises:
        InputError: The images do not fit.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    source = lift(model).eval()
    check_images(source, images)
    held_out = max(1, round(CHECKED * len(images))) if len(images) > 1 else 0
    fitting, checking = images[held_out:], images[:held_out] if held_out else images
    report = progress or (lambda name, done, total: None)
    rotated, found = _prediction(source, fitting, options, report)
    return Prediction(source, rotated, found, fitting, checking, options)


def trim_to(
    prediction: Prediction,
    *,
    macs: float | None = None,
    params: float | None = None,
    progress: Stage | None = None,
) -> Trimmed:
    """Cut a network to one budget, compensate it and check it.

    Args:
        prediction: What `predict` returned; it is not modified.
        macs: As for `trim`.
        params: As for `trim`.
        progress: As for `trim`.

    Returns:
        The compact network, how it was cut, and how near it comes to the dense one.

    Raises:
        InputError: The budget is out of reach.
    """
    kind, share = _budget(macs, params)
    source, rotated, options = prediction.source, prediction.rotated, prediction.options
    report = progress or (lambda name, done, total: None)
    chosen = _choice(rotated.architecture, prediction.curves, kind, share, options)
    mask = _mask(prediction.curves, chosen)
    result = compact(rotated, mask, last_queries=bool(rotated.architecture.pooled_prefix) or None)
    fits: list[Fit] = []
    if options.compensate:
        total = len(result.architecture.branches)

        def done(fit: Fit) -> None:
            fits.append(fit)
            report("compensate", len(fits), total)

        result, _ = compensate(result, rotated, prediction.fitting, mask=mask, progress=done)
    dense_cost = network_cost(_priced(source.architecture), kind)
    return Trimmed(
        model=result,
        rotated=rotated,
        mask=mask,
        predicted_error=_error(chosen),
        check=compare_features(source, result, prediction.checking),
        cost=network_cost(result.architecture, kind) / dense_cost,
        widths={name: option.widths for name, option in chosen.items()},
        fits=tuple(fits),
    )


def _budget(macs: float | None, params: float | None) -> tuple[Kind, float]:
    if (macs is None) == (params is None):
        raise InputError("trim: give one budget, macs or params, as the share to keep, such as 0.7")
    kind: Kind = "macs" if macs is not None else "params"
    share = macs if macs is not None else params
    if share is None or not 0 < share < 1:
        raise InputError(f"trim: {kind} = {share}: give the share to keep, between 0 and 1")
    return kind, share


def _prediction(
    source: CompactModel, images: Tensor, options: TrimOptions, report: Stage
) -> tuple[CompactModel, dict[str, tuple[float, tuple[Curve, ...]]]]:
    """The rotated network, and for each sub-layer the weight of its depth and its error curves."""
    patches = options.patches
    if patches is None:
        patches = 0.0 if source.architecture.head is not None else 0.5
    weighing = images[:WEIGHING_IMAGES]
    batches = iter(range(1, len(weighing) + 1))
    weights = stream_weights(
        source,
        weighing,
        patches=patches,
        seed=options.seed,
        progress=lambda: report("weigh", next(batches), -(-len(weighing) // 8)),
    )
    rotated = copy.deepcopy(source)
    stream = Stream(rotated, images)
    found: dict[str, tuple[float, tuple[Curve, ...]]] = {}
    while not stream.finished:
        step = [branch for branch in stream.step if has_output_projection(branch)]
        statistics = {branch.spec.name: Statistics(branch) for branch in step}

        def add(branch: Branch, seen: Activations, statistics: Any = statistics) -> None:
            statistics[branch.spec.name].add(seen)

        stream.advance(add)
        for branch in step:
            name, of = branch.spec.name, rotated.architecture
            rows = rotated_curves(of, branch, statistics[name], round_to=options.round_to)
            found[name] = (weights[stream.position], rows)
        report("predict", stream.position, len(rotated.steps))
    return rotated, found


def _priced(architecture: Architecture) -> Architecture:
    """The network as it is exported: the last block computes only what the head reads."""
    if not architecture.pooled_prefix:
        return architecture
    return architecture.model_copy(update={"last_queries": True})


def _choice(
    architecture: Architecture,
    found: Mapping[str, tuple[float, tuple[Curve, ...]]],
    kind: Kind,
    share: float,
    settings: TrimOptions,
) -> dict[str, Option]:
    priced = _priced(architecture)
    cost = settings.cost or (macs_cost if kind == "macs" else params_cost)
    specs = {branch.name: branch for branch in architecture.branches}
    dense = sum(price(specs[name]) for name, price in branch_costs(priced, cost).items())
    # What is not cut (the stem, the head) costs the same before and after.
    fixed = 0.0 if settings.cost else network_cost(priced, kind) - dense
    best: dict[str, Option] = {}
    gone: frozenset[str] = frozenset()
    prices: dict[str, Callable[[BranchSpec], float]] = {}
    for _ in range(PRICINGS):
        prices |= branch_costs(priced, cost, gone)
        fronts = {
            name: _front(specs[name], rows, weight, prices[name], name in gone)
            for name, (weight, rows) in found.items()
        }
        chosen = allocate(fronts, share * (fixed + dense) - fixed)
        if not best or _error(chosen) < _error(best):
            best = chosen
        removed = frozenset(name for name, option in chosen.items() if option.removes)
        if removed <= gone:
            break
        gone |= removed
    return best


def _front(
    spec: BranchSpec,
    rows: Sequence[Curve],
    weight: float,
    price: Callable[[BranchSpec], float],
    gone: bool,
) -> list[Option]:
    front = options(spec, rows, weight, price)
    removing = [option for option in front if option.removes]
    return removing if gone and removing else front


def _error(chosen: Mapping[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


def _mask(
    found: Mapping[str, tuple[float, tuple[Curve, ...]]], chosen: Mapping[str, Option]
) -> StructuredMask:
    kept: dict[str, dict[str, Tensor]] = {}
    for name, (_, rows) in found.items():
        for curve in rows:
            width = chosen[name].widths[curve.dimension]
            if width < curve.widths[0]:
                kept.setdefault(curve.dimension, {})[name] = curve.keep(width)
    return StructuredMask(kept, scale="original", note={"method": "without training"})


def compare_features(dense: CompactModel, compact: CompactModel, images: Tensor) -> Check:
    """Compare the features of two networks on images that were not used to fit them.

    Args:
        dense: The reference.
        compact: The network to check, with features of the same width.
        images: (images, channels, height, width), normalized as the networks expect.

    Returns:
        Cosine similarities and, with a head, the agreement of the top-1 classes.
    """
    cosines, patches, same = 0.0, 0.0, 0
    with torch.no_grad():
        for part in images.split(16):
            wanted, found = last_stream(dense, part), last_stream(compact, part)
            cosines += _cosines(features(dense, wanted), features(compact, found))
            patches += _cosines(patch_features(dense, wanted), patch_features(compact, found))
            if dense.head is not None:
                classes = dense.classify(wanted).argmax(dim=-1)
                same += int((classes == compact.classify(found).argmax(dim=-1)).sum())
    total = len(images)
    agreement = None if dense.head is None else same / total
    return Check(total, cosines / total, patches / total, agreement)


def last_stream(model: CompactModel, images: Tensor) -> Tensor:
    """The stream of every token after the last step: (batch, tokens, embed)."""
    stream = Stream(model, images, batch=len(images))
    while not stream.finished:
        stream.advance()
    return stream.batches[0]


def _cosines(wanted: Tensor, found: Tensor) -> float:
    """The sum over the batch of the mean cosine similarity; 0 where there are no vectors."""
    if not wanted.numel() or wanted.shape != found.shape:
        return 0.0
    each = torch.cosine_similarity(wanted, found, dim=-1)
    return float(each.reshape(len(wanted), -1).mean(dim=1).sum())
