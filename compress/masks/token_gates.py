"""Learned token sets: what each attention, and a pooling head, reads of the patches.

A set is learned where something reads it. Dropping patch i from site a on removes it from every
later reader too, so with D_b = dLoss/dM_b, the gradient of the gate of the patch at reader b, the
loss of leaving at a is estimated as

    F_a = mean (sum over b >= a of D_b)²,        F = 0 for a patch that never leaves,

the empirical Fisher information of the gates that close together. For each patch the depth is
wanted that minimises F_a + price * (cost of the sites before a). Its solutions for all prices are
the concave envelope of -F over the costs: the slopes of that envelope fall along the depth, so
that "slope >= price" is a nested set at every price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture, AttentionSpec
from ..network.token_order import require_no_inner
from .groups import token_sites


@dataclass(frozen=True)
class TokenPlace:
    """A set of patches that one reader reads.

    Attributes:
        site: The site of the mask entry: the stem or the step before the reader.
        reader: The number of the step whose attention reads the tokens; for a head that pools
            patches, the number of steps.
        attentions: The names of these attentions; none for the head.
        patches: The number of patches that the stream carries there; they are its first ones.
    """

    site: str
    reader: int
    attentions: frozenset[str]
    patches: int


def token_places(architecture: Architecture) -> tuple[TokenPlace, ...]:
    """The sets of patches of a network that can be learned, in order.

    Raises:
        InputError: The network returns every token.
    """
    if architecture.pool.kind == "none":
        raise InputError(
            "tokens: the network returns every token, so none can be dropped; add a pooling first "
            "(reset_classifier)"
        )
    require_no_inner(architecture, "tokens")
    # Site number n is the stem or the step before step n.
    places = list(token_sites(architecture).items())
    readers = {
        number: frozenset(branch.name for branch in step if isinstance(branch.core, AttentionSpec))
        for number, step in enumerate(architecture.steps)
    }
    if not architecture.pooled_prefix:
        readers[len(architecture.steps)] = frozenset()
    return tuple(
        TokenPlace(places[number][0], number, names, places[number][1] - architecture.prefix)
        for number, names in readers.items()
        if (names or number == len(architecture.steps)) and places[number][1] > architecture.prefix
    )


class _Hard(torch.autograd.Function):
    """A mask in the forward pass, the identity of the scores in the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def nested_gates(scores: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """Gates of 0 and 1 that pass gradients: 1 where this and all earlier scores reach a threshold.

    Args:
        scores: One tensor (patches,) for each place, the shorter ones later.
        threshold: The least score of a patch that is kept.

    Returns:
        Gates in the shapes of the scores. The patch of the largest last score is always kept.
    """
    if not scores:
        return []
    with torch.no_grad():
        always = scores[-1].argmax()
        masks: list[Tensor] = []
        for values in scores:
            keep = (values >= threshold).index_fill(0, always, True)
            masks.append(keep if not masks else keep & masks[-1][: len(keep)])
    return [_Hard.apply(values, mask) for values, mask in zip(scores, masks, strict=True)]


def close_upwards(kept: Sequence[Tensor]) -> list[Tensor]:
    """The smallest nested sets that contain `kept`: what a later set keeps, earlier ones keep."""
    nested = [keep.clone() for keep in kept]
    for before, after in zip(reversed(nested[:-1]), reversed(nested[1:]), strict=True):
        before[: len(after)] |= after
    return nested


def exit_gradients(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Sums of gradients over this and all later places: that of leaving here.

    Args:
        gradients: One tensor (patches,) for each place, the shorter ones later.

    Returns:
        The sums, in the same shapes.
    """
    sums: list[Tensor] = []
    for gradient in reversed(gradients):
        found = gradient.clone()
        if sums:
            found[: len(sums[-1])] += sums[-1]
        sums.append(found)
    return sums[::-1]


def nested_values(losses: Sequence[Tensor], costs: Sequence[float]) -> list[Tensor]:
    """Saliency per cost of each patch at each place, falling along the depth.

    Args:
        losses: One tensor (patches,) for each place, the shorter ones later: the loss of leaving
            there. 0 for leaving behind the last place that a patch reaches.
        costs: The cost of one patch at each place, above 0.

    Returns:
        The slopes of the concave envelope of -loss over the cost, in the shapes of `losses`. Those
        of at least any price are nested sets.

    References:
        Barlow and Brunk 1972, "The Isotonic Regression Problem and Its Dual" (the min-max form).
    """
    if not losses:
        return []
    places, patches = len(losses), max(map(len, losses))
    loss = torch.zeros(places + 1, patches, dtype=torch.float64)
    reached = torch.zeros(places, patches, dtype=torch.bool)
    for number, values in enumerate(losses):
        loss[number, : len(values)] = values
        reached[number, : len(values)] = True
    spent = torch.tensor([0.0, *costs], dtype=torch.float64).cumsum(0)
    # Axes: the first and the last place of a segment, patches.
    slopes = (loss[:-1, None] - loss[None, 1:]) / (spent[1:] - spent[:-1, None])[..., None]
    segments = torch.ones(places, places, dtype=torch.bool).triu()[..., None] & reached
    slopes = slopes.masked_fill(~segments, -torch.inf)
    best_end = slopes.flip(1).cummax(dim=1).values.flip(1)
    found = torch.stack([best_end[: number + 1, number].amin(dim=0) for number in range(places)])
    return [found[number, : len(values)] for number, values in enumerate(losses)]
