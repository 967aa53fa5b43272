"""One-shot pruning criteria: a score for every unit, and the masks that keep the best units."""

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
from .gate_saliency import fisher, sensitivity, taylor
from .groups import WIDTHS, ScaleRule, Sharing, groups
from .magnitude import magnitude, unit_costs
from .ranking import Scope, rank, require_scope

Criterion = Literal["l1", "l2", "taylor", "fisher", "head", "random"]
Scores = dict[str, dict[str, Tensor]]
Data = Iterable[tuple[Tensor, Tensor]]

# The dimensions that a single ratio applies to; whole sub-layers are removed only by name.
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
    """A score for every unit; units with higher scores are kept first.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`.
        criterion: "l1" or "l2", the sum of absolute or squared weights; "taylor", the first-order
            change of the loss; "fisher", the mean squared change over single images; "head", the
            sensitivity of heads alone; "random", uniform.
        sharing: Which sites share a mask.
        data: Batches of (images, class numbers), shapes (batch, channels, height, width) and
            (batch,); needed by "taylor", "fisher" and "head".
        dimensions: Which dimensions get scores.
        scale: The softmax scale during "taylor", "fisher" and "head".
        seed: For the criterion "random".

    Returns:
        `scores[dimension][site]`, (size,) each.

    Raises:
        InputError: An unknown criterion or dimension, or no data where they are needed.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    require_criterion(criterion)
    for name in dimensions:
        if name not in WIDTHS:
            raise InputError(f"saliency: unknown dimension {name!r}; known: {', '.join(WIDTHS)}")
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
            f"saliency = {criterion!r} needs data: batches of (images, class numbers); "
            "'l1', 'l2' and 'random' need none"
        )
    if criterion == "head":
        return sensitivity(source, data, ["head"], sharing, scale=scale)
    by_gradient = fisher if criterion == "fisher" else taylor
    return by_gradient(source, data, dimensions, sharing, scale=scale)


def require_criterion(name: str) -> None:
    """Raise InputError, with the nearest name, if there is no such criterion."""
    known = get_args(Criterion)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"saliency = {name!r}: choose {', '.join(map(repr, known))}{hint}")


def default_scope(criterion: Criterion) -> Scope:
    """The scope that loses least accuracy with a criterion.

    Gradients of the loss compare across layers. Magnitudes do not, and neither do the scores of
    "head", which are normalized in each layer.
    """
    return "global" if criterion in ("taylor", "fisher") else "layer"


@dataclass(frozen=True)
class SaliencyOptions:
    """The keyword arguments of `StructuredMask.from_saliency`, which documents them."""

    keep_ratio: float | Mapping[str, float] = 0.5
    scope: Scope | None = None
    sharing: Sharing = "residual"
    data: Data | None = None
    fixed: tuple[str, ...] = ()
    scale: ScaleRule = "original"
    seed: int = 0


def kept_units(
    model: nn.Module, criterion: Criterion, options: SaliencyOptions
) -> tuple[dict[str, dict[str, Tensor]], Scores]:
    """Booleans of the most salient units of each group, and the scores behind the ranking."""
    require_criterion(criterion)
    scope = default_scope(criterion) if options.scope is None else options.scope
    require_scope(scope)
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
        # Ranking divides by the cost; multiplied by it, all units have the same probability.
        for dimension, entries in scores.items():
            for site, values in entries.items():
                values *= costs[dimension][site]
    return rank(source.architecture, scores, costs, ratios, scope), scores


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
        if name not in WIDTHS:
            raise InputError(
                f"keep_ratio or fixed names {name!r}; known dimensions: {', '.join(WIDTHS)}"
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
            "every dimension is fixed: nothing is left to remove; remove one from `fixed`"
        )
    return left
