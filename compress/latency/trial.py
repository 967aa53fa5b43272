"""What the solver makes of sizes alone: a network of a latency before its weights are known."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import torch

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ..masks.groups import token_sites
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture
from ..network.modules.model import CompactModel
from ..oneshot.choice import priced
from ..surgery.compactor import compact
from ..tokens.counts import STEM
from .losses import Losses, uniform_losses
from .search import solve_architecture
from .solution import Limits

# Deviations of the logarithms of drawn losses: between dimensions, and of one within the network.
BETWEEN, WITHIN = 1.0, 0.5
# What is lost with a patch that never enters, times that with one which leaves at an attention.
STEM_LOSS = 2.0


def trial_network(
    start: CompactModel,
    latency_ms: float,
    table: CostTable,
    round_to: int,
    *,
    tokens: bool,
    rng: np.random.Generator | None = None,
) -> CompactModel | None:
    """A network that the solver chooses without any knowledge of the weights; None without one.

    Args:
        start: The network that is cut.
        latency_ms: The latency by the table.
        table: The cost table.
        round_to: Kept widths are multiples of this.
        tokens: Whether patches leave, too, at the stem or at attentions.
        rng: Draws what a network loses with each dimension of each sub-layer, with tokens at the
            stem and at attentions, and, in every other network, with channels of the stream. None:
            with all alike, with patches at the stem twice as much, and the stream stays.
    """
    architecture = priced(start.architecture)
    if rng is None:
        losses = uniform_losses(architecture, round_to)
    else:
        losses = _drawn_losses(architecture, round_to, rng)
    if tokens:
        every, stem = (1.0, 1.0) if rng is None else rng.lognormal(0.0, BETWEEN, 2).tolist()
        losses = replace(losses, tokens=_token_losses(architecture, every, STEM_LOSS * stem))
    with contextlib.suppress(InputError):
        found = solve_architecture(architecture, losses, Limits(latency_ms), table)
        mask = found.mask()
        if tokens:
            counts = (found.stem_tokens, *found.counts)
            entries = {**mask.kept, "token": _first_tokens(architecture, counts)}
            mask = StructuredMask(entries, scale=mask.scale)
        last = bool(architecture.pooled_prefix) or None
        return compact(start, mask, last_queries=last).eval()
    return None


def _drawn_losses(architecture: Architecture, round_to: int, rng: np.random.Generator) -> Losses:
    """Losses of a network in which some dimensions and sub-layers matter more than others."""
    dimensions = {name: rng.lognormal(0.0, BETWEEN) for name in ("ffn", "head", "qk", "v")}

    def factor(dimension: str, site: str) -> float:
        return float(dimensions[dimension] * rng.lognormal(0.0, WITHIN))

    losses = uniform_losses(architecture, round_to, factor)
    if rng.random() < 0.5:
        size, weight = architecture.embed, len(losses.sublayers) * rng.lognormal(0.0, BETWEEN)
        widths = range(round_to * (size // 4 // round_to + 1), size, round_to)
        stream = {width: float(weight * (1 - width / size) ** 2) for width in widths}
        losses = replace(losses, embed=stream, embed_order=torch.arange(size))
    return losses


def _token_losses(architecture: Architecture, factor: float, stem: float) -> dict[int, list[float]]:
    """The square of the share of tokens that leave, times a factor; `stem` times it at the stem."""
    size = architecture.tokens
    row = [factor * ((size - count) / size) ** 2 for count in range(size + 1)]
    found = dict.fromkeys(architecture.attention_steps(), row)
    return {STEM: [stem * each for each in row], **found}


def _first_tokens(architecture: Architecture, counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Token sets of these numbers behind the stem and each step."""
    sizes = list(token_sites(architecture).items())
    # At least one patch is left, which the head need not read.
    least = architecture.prefix + 1
    return {
        site: torch.arange(size) < max(least, count)
        for (site, size), count in zip(sizes, counts, strict=True)
    }
