"""The widths for a budget, with the width of the stream and the absorption of removed sub-layers.

Two choices do not fit the sum over sub-layers of `allocation`. The stream has one width for all, so
its widths are tried one by one while their own error is below the best total. What a removed
sub-layer loses depends on the units that the sub-layer before it keeps, so the allocation is
repeated with the widths just chosen, and the best consistent choice is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, BranchSpec
from ..network.modules.model import CompactModel
from ..surgery.plan import plan
from .absorption import absorbed_error
from .allocation import Option, allocate, branch_costs, options
from .budgets import Budget
from .prediction import PredictedSubLayer, Prediction
from .stream_rotation import principal_basis, turned_stream

# How often the widths are chosen again after a removal changed the prices.
PRICINGS = 4
# Shares of the stream's channels that are tried.
STREAM_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
Prices = Mapping[str, Callable[[BranchSpec], float]]


@dataclass(frozen=True)
class Choice:
    """Widths for a budget.

    Attributes:
        options: The option of each sub-layer.
        errors: The predicted error of each sub-layer, as a share of the features' variance.
        embed: Channels of the stream that remain, in the basis of `stream_rotation`; None: all, in
            the basis of the source.
        stream_error: The predicted error of the removed channels.
        turned: The network with its stream in that basis.
    """

    options: Mapping[str, Option]
    errors: Mapping[str, float]
    embed: int | None = None
    stream_error: float = 0.0
    turned: CompactModel | None = None

    @property
    def error(self) -> float:
        """The predicted error of the features."""
        return sum(self.errors.values()) + self.stream_error


def choose(prediction: Prediction, budget: Budget, *, stream: bool = True) -> Choice:
    """Choose the widths of least predicted error for a budget.

    Args:
        prediction: What `predict` returned.
        budget: What the network may cost.
        stream: Whether the stream may become narrower.

    Returns:
        The widths.

    Raises:
        InputError: Even the smallest network costs more.
    """
    architecture = priced(prediction.rotated.architecture)
    limit = budget.limit(budget.network(architecture))
    best, problem, turned = None, None, None
    try:
        best = _at_width(prediction.curves, architecture, budget, limit)
    except InputError as error:
        problem = error
    for embed, lost in stream_widths(prediction) if stream else ():
        if best is not None and lost >= best.error:
            break
        if turned is None:
            turned = turned_stream(prediction.rotated, stream_basis(prediction))
        keep = torch.arange(architecture.embed) < embed
        narrow = plan(priced(turned.architecture), StructuredMask({"embed": {SHARED: keep}}))
        try:
            found = _at_width(prediction.curves, narrow.architecture, budget, limit)
        except InputError:
            continue
        if best is None or found.error + lost < best.error:
            best = Choice(found.options, found.errors, embed, lost, turned)
    if best is None:
        assert problem is not None
        raise problem
    return best


def stream_basis(prediction: Prediction) -> Tensor:
    """The basis of the stream, (embed, embed), its columns by falling importance."""
    assert prediction.stream is not None
    return principal_basis(prediction.stream)[0]


def priced(architecture: Architecture) -> Architecture:
    """The network as it is exported: the last block computes only what the head reads."""
    if not architecture.pooled_prefix:
        return architecture
    return architecture.model_copy(update={"last_queries": True})


def stream_widths(prediction: Prediction) -> list[tuple[int, float]]:
    """Narrower widths of the stream and their predicted errors, the widest first."""
    if prediction.stream is None or not prediction.options.stream:
        return []
    variances = principal_basis(prediction.stream)[1]
    embed, round_to = len(variances), prediction.options.round_to
    widths = {int(share * embed) // round_to * round_to for share in STREAM_SHARES}
    # RMSNorm of few channels is too coarse.
    found = sorted((width for width in widths if width >= max(2, round_to)), reverse=True)
    return [(width, float(variances[width:].sum())) for width in found]


def _at_width(
    predicted: Mapping[str, PredictedSubLayer],
    architecture: Architecture,
    budget: Budget,
    limit: float,
) -> Choice:
    specs = {branch.name: branch for branch in architecture.branches}
    prices: dict[str, Callable[[BranchSpec], float]] = dict(branch_costs(architecture, budget.cost))
    # What is not cut (the stem, the head) costs the same before and after.
    fixed = budget.network(architecture) - sum(price(specs[name]) for name, price in prices.items())
    best: Choice | None = None
    gone: frozenset[str] = frozenset()
    chosen: Mapping[str, Option] = {}
    for _ in range(PRICINGS):
        prices |= branch_costs(architecture, budget.cost, gone)
        fronts = {
            name: _front(
                specs[name], each, prices[name], absorbed_share(each, chosen), name in gone
            )
            for name, each in predicted.items()
        }
        chosen = allocate(fronts, limit - fixed)
        found = Choice(chosen, true_errors(predicted, chosen))
        if best is None or found.error < best.error:
            best = found
        removed = frozenset(name for name, option in chosen.items() if option.removes)
        if removed <= gone:
            break
        gone |= removed
    assert best is not None
    return best


def _front(
    spec: BranchSpec,
    predicted: PredictedSubLayer,
    price: Callable[[BranchSpec], float],
    absorbed: float | None,
    gone: bool,
) -> list[Option]:
    front = options(spec, predicted.curves, predicted.weight, price, absorbed)
    removing = [option for option in front if option.removes]
    return removing if gone and removing else front


def absorbed_share(predicted: PredictedSubLayer, chosen: Mapping[str, Option]) -> float | None:
    """The squared error of the removed sub-layer beside the widths chosen for its absorber."""
    if predicted.absorber is None:
        return None
    option = chosen.get(predicted.absorber)
    width = None if option is None else option.widths.get("ffn", option.widths.get("head"))
    if width is None:
        width = predicted.absorbed[0][0]
    return absorbed_error(predicted.absorbed, width)


def true_errors(
    predicted: Mapping[str, PredictedSubLayer], chosen: Mapping[str, Option]
) -> dict[str, float]:
    """The predicted error of each sub-layer, given the widths chosen for all of them."""
    found = {}
    for name, option in chosen.items():
        each = predicted[name]
        error = each.weight * sum(
            curve.errors[curve.widths.index(option.widths[curve.dimension])]
            for curve in each.curves
        )
        if option.removes:
            absorbed = absorbed_share(each, chosen)
            if absorbed is not None:
                error = min(error, each.weight * absorbed)
        found[name] = error
    return found


def mask_of(
    predicted: Mapping[str, PredictedSubLayer], choice: Choice, embed: int
) -> StructuredMask:
    """The mask that keeps the chosen widths.

    Args:
        predicted: The sub-layers with their curves.
        choice: The widths.
        embed: Channels of the dense stream.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    for name, each in predicted.items():
        for curve in each.curves:
            width = choice.options[name].widths[curve.dimension]
            if width < curve.widths[0]:
                kept.setdefault(curve.dimension, {})[name] = curve.keep(width)
    if choice.embed is not None:
        kept["embed"] = {SHARED: torch.arange(embed) < choice.embed}
    return StructuredMask(kept, scale="original", note={"method": "without training"})
