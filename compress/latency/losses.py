"""What each choice loses: the widths of every sub-layer, tokens that leave, a narrower stream.

All losses of a network have one unit, such as the error of the features as a share of their
variance, or the rise of a training loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.groups import SHARED, tied_units
from ..network.architecture import Architecture, AttentionSpec, FfnSpec
from ..oneshot.choice import stream_widths
from ..oneshot.error_curves import Curve
from ..oneshot.prediction import PredictedSubLayer, Prediction

# Scores, or booleans, by dimension and site.
Scores = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Losses:
    """The losses of a network's choices.

    Attributes:
        sublayers: For each sub-layer that can be cut, its curves of error by width, and their
            weight.
        tokens: For each step with attention, the loss of each number of tokens behind it, from 0,
            prefix tokens included; it is paid once, where tokens leave. Under -1 (`STEM`) that of
            each number that the stem returns; without it, all patches are embedded. Empty: all
            tokens stay.
        embed: The loss of narrower streams by their width. Empty: the stream keeps its width.
        embed_order: Channels of the stream from the first to remove to the last; None where the
            stream is rotated first, so that its last channels are removed.
    """

    sublayers: Mapping[str, PredictedSubLayer]
    tokens: Mapping[int, Sequence[float]] = field(default_factory=dict)
    embed: Mapping[int, float] = field(default_factory=dict)
    embed_order: Tensor | None = None

    def scaled(
        self, sublayers: Mapping[str, float], *, tokens: float = 1.0, embed: float = 1.0
    ) -> Losses:
        """These losses with a factor for each sub-layer, for the tokens and for the stream.

        Args:
            sublayers: The factors by sub-layer; those that are missing are 1.
            tokens: The factor of all losses of tokens.
            embed: The factor of all losses of the stream.
        """
        return replace(
            self,
            sublayers={
                name: replace(each, weight=each.weight * sublayers.get(name, 1.0))
                for name, each in self.sublayers.items()
            },
            tokens={step: [tokens * each for each in row] for step, row in self.tokens.items()},
            embed={width: embed * each for width, each in self.embed.items()},
        )


def predicted_losses(
    prediction: Prediction, tokens: Mapping[int, Sequence[float]] | None = None
) -> Losses:
    """The losses of a cut in closed form, from the statistics of unlabeled images.

    Args:
        prediction: What `predict` returned.
        tokens: The losses of tokens, as `leaving_errors` measures them. None: tokens stay.

    Returns:
        Losses as shares of the features' variance.
    """
    return Losses(prediction.curves, tokens or {}, dict(stream_widths(prediction)))


def scored_losses(
    architecture: Architecture,
    scores: Scores,
    round_to: int = 1,
    tokens: Mapping[int, Sequence[float]] | None = None,
    *,
    kept: Scores | None = None,
    gone: Mapping[str, float] | None = None,
) -> Losses:
    """The losses of removing units with additive scores, such as gates' second-order saliencies.

    Args:
        architecture: The network.
        scores: `scores[dimension][site]`, (size,): what is lost with each unit. Dimensions without
            scores stay whole.
        round_to: Widths are multiples of it, or whole.
        tokens: As for `predicted_losses`.
        kept: Booleans in the shapes of the scores: these units leave after all others. Widths of
            heads are then such that those of all heads are multiples of `round_to`.
        gone: What is lost with whole sub-layers, by name; others are not removed. None: the sum
            over the units, for all.

    Returns:
        Losses in the unit of the scores.

    Raises:
        InputError: A site has scores of another size.
    """
    found: dict[str, PredictedSubLayer] = {}
    for branch in architecture.branches:
        curves = []
        for dimension in ("ffn", "head", "qk", "v"):
            score = scores.get(dimension, {}).get(branch.name)
            size = _size(branch.core, dimension)
            if score is None or size is None:
                continue
            if score.shape != (size,):
                raise InputError(
                    f"scores: {dimension}/{branch.name} has shape {tuple(score.shape)}, the "
                    f"network {size} units; score them with `vitrim.compress.masks.saliency`"
                )
            units = tied_units(architecture, dimension, branch.name)
            step = 1 if dimension == "head" else round_to
            if kept is not None and isinstance(branch.core, AttentionSpec) and dimension != "head":
                step = round_to // math.gcd(branch.core.heads, round_to)
            leaves = gone is None or branch.name in gone
            least = max(step, units.shape[1])
            least = 0 if dimension in ("head", "ffn") and leaves else least
            last = None if kept is None else kept[dimension][branch.name]
            curve = _curve(dimension, score.detach().double(), units, step, least, last)
            if gone is not None and curve.widths[-1] == 0:
                whole = max(gone[branch.name], *curve.errors[-2:-1])
                curve = replace(curve, errors=(*curve.errors[:-1], whole))
            curves.append(curve)
        if curves:
            found[branch.name] = PredictedSubLayer(1.0, tuple(curves))
    embed = scores.get("embed", {}).get(SHARED)
    if embed is None:
        return Losses(found, tokens or {})
    every = torch.arange(architecture.embed)[:, None]
    least = max(round_to, architecture.embed // 4 // round_to * round_to, 2)
    last = None if kept is None else kept["embed"][SHARED]
    curve = _curve("embed", embed.detach().double(), every, round_to, least, last)
    widths = dict(zip(curve.widths[1:], curve.errors[1:], strict=True))
    return Losses(found, tokens or {}, widths, curve.order)


def uniform_losses(
    architecture: Architecture,
    round_to: int = 1,
    factor: Callable[[str, str], float] = lambda dimension, site: 1.0,
) -> Losses:
    """Losses without any knowledge of the weights: the square of the share that is removed.

    Args:
        architecture: The network.
        round_to: Widths are multiples of it, or whole.
        factor: What those of a dimension of a sub-layer are multiplied by.
    """
    scores: dict[str, dict[str, Tensor]] = {}
    for branch in architecture.branches:
        for dimension in ("ffn", "head", "qk", "v"):
            size = _size(branch.core, dimension)
            if size is not None:
                # The sum of the first k odd numbers is k squared.
                shares = (2 * torch.arange(size, dtype=torch.float64) + 1) / size**2
                shares *= factor(dimension, branch.name)
                scores.setdefault(dimension, {})[branch.name] = shares
    return scored_losses(architecture, scores, round_to)


def _size(core: object, dimension: str) -> int | None:
    if isinstance(core, FfnSpec):
        return core.hidden if dimension == "ffn" else None
    if isinstance(core, AttentionSpec):
        return {"head": core.heads, "qk": core.qk, "v": core.v}.get(dimension)
    return None


def _curve(
    dimension: str,
    score: Tensor,
    units: Tensor,
    step: int,
    least: int,
    last: Tensor | None = None,
) -> Curve:
    """The loss by width where units go from the lowest score on; tied units go at once."""
    size, members = len(score), units.shape[1]
    tied = score[units].sum(dim=1)
    order = tied.argsort(stable=True)
    if last is not None:
        order = order[last[units[:, 0]][order].to(torch.uint8).argsort(stable=True)]
    totals = tied[order].clamp(min=0.0).cumsum(0).repeat_interleave(members)
    step = -(-step // members) * members
    widths = (size, *range((size - 1) // step * step, least - 1, -step))
    errors = tuple(0.0 if width == size else float(totals[size - width - 1]) for width in widths)
    return Curve(dimension, widths, errors, units[order].flatten())
