"""Masks without training: score every unit, rank, keep the best. One-shot starts, and the baselines
of the literature.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..network.modules.model import CompactModel
from .gate_saliency import sensitivity, taylor
from .groups import DIMENSIONS, ScaleRule, Sharing, groups
from .magnitude import magnitude, unit_costs
from .ranking import Scope, rank, require_scope

Criterion = Literal["l1", "l2", "taylor", "head", "random"]
Scores = dict[str, dict[str, Tensor]]
Data = Iterable[tuple[Tensor, Tensor]]

# Dimensions that a ratio without names is for; whole sub-layers go only when asked for by name.
USUAL = ("embed", "head", "qk", "v", "ffn")


def saliency(
    model: nn.Module,
    criterion: Criterion = "l2",
    *,
    sharing: Sharing = "residual",
    data: Data | None = None,
    dimensions: Sequence[str] = USUAL,
    scale: ScaleRule = "original",
    seed: int = 0,
) -> Scores:
    """A score for every unit, higher is kept first: `scores[dimension][site]`, (size,) each, for
    the groups of a sharing.

    `l1`, `l2`: sum of absolute or squared weights. `taylor`: first-order estimate of the loss's
    change. `head`: sensitivity of heads alone (Michel et al. 2019). `random`: uniform. `data`:
    batches of (images, class numbers), for `taylor` and `head`. Errors: InputError.
    """
    require_criterion(criterion)
    for name in dimensions:
        if name not in DIMENSIONS:
            raise InputError(
                f"saliency: unknown dimension {name!r}; known: {', '.join(DIMENSIONS)}"
            )
    source = lift(model)
    architecture = source.architecture
    if criterion in ("l1", "l2"):
        found = magnitude(architecture, dict(source.named_parameters()), int(criterion[1]), sharing)
        return {dimension: found[dimension] for dimension in dimensions if dimension in found}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        wanted = groups(architecture, sharing)
        return {
            dimension: {
                site: torch.rand(size, generator=generator)
                for site, size in wanted[dimension].items()
            }
            for dimension in dimensions
            if dimension in wanted
        }
    if data is None:
        raise InputError(
            f"saliency = {criterion!r} needs data: batches of (images, class numbers); 'l1', 'l2' and 'random' need none"
        )
    if criterion == "head":
        return sensitivity(source, data, ["head"], sharing, scale=scale)
    return taylor(source, data, dimensions, sharing, scale=scale)


def require_criterion(name: str) -> None:
    """Errors: InputError with the nearest name if no saliency is called so."""
    known = get_args(Criterion)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"saliency = {name!r}: choose {', '.join(map(repr, known))}{hint}")


@dataclass(frozen=True)
class SaliencyOptions:
    """How `StructuredMask.from_saliency` ranks and cuts; the fields are its keyword arguments."""

    keep_ratio: float | Mapping[str, float] = 0.5
    scope: Scope = "global"
    sharing: Sharing = "residual"
    data: Data | None = None
    fixed: tuple[str, ...] = ()
    scale: ScaleRule = "original"
    seed: int = 0


def kept_units(
    model: nn.Module, criterion: Criterion, options: SaliencyOptions
) -> tuple[dict[str, dict[str, Tensor]], Scores]:
    """Booleans of the most salient units of every group, and the scores that they were ranked
    by.
    """
    require_criterion(criterion)
    require_scope(options.scope)
    ratios = _ratios(options.keep_ratio, criterion, options.fixed)
    source: CompactModel = lift(model)
    scores = saliency(
        source,
        criterion,
        sharing=options.sharing,
        data=options.data,
        dimensions=tuple(ratios),
        scale=options.scale,
        seed=options.seed,
    )
    costs = unit_costs(source.architecture, dict(source.named_parameters()), options.sharing)
    if criterion == "random":
        # Ranking divides by the cost, which would keep the cheap units first; every unit is to have
        # the same chance.
        for dimension, entries in scores.items():
            for site, values in entries.items():
                values *= costs[dimension][site]
    return rank(source.architecture, scores, costs, ratios, options.scope), scores


def _ratios(
    keep_ratio: float | Mapping[str, float], criterion: str, fixed: Sequence[str]
) -> dict[str, float]:
    usual = ("head",) if criterion == "head" else USUAL
    ratios = (
        dict(keep_ratio)
        if isinstance(keep_ratio, Mapping)
        else dict.fromkeys(usual, float(keep_ratio))
    )
    for name in (*ratios, *fixed):
        if name not in DIMENSIONS:
            raise InputError(
                f"keep_ratio or fixed names {name!r}; known dimensions: {', '.join(DIMENSIONS)}"
            )
    for name, ratio in ratios.items():
        if not 0 < ratio <= 1:
            raise InputError(f"keep_ratio {name} = {ratio}: give a number above 0 and at most 1")
        if criterion == "head" and name != "head":
            raise InputError(
                f"saliency = 'head' scores heads only, not {name}; use 'taylor' for the others"
            )
    left = {name: ratio for name, ratio in ratios.items() if name not in fixed}
    if not left:
        raise InputError(
            "every dimension is fixed: nothing is left to remove; take one out of `fixed`"
        )
    return left
