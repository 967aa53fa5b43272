"""The impact of a patch on the output of a network: eq. (6) of Patch Slimming, without its paths.

Eq. (6) sums over the heads h_t .. h_L of a path: s_ti = sum || A[:, i] U[i, :] ||_F^2, where
A = D_L P_L ... D_{t+1} P_{t+1} has one attention map P of each later block, D_l selects the tokens
that block l keeps, and U = P_t |Z_{t-1}|. The product is an outer product, so its norm is
||A[:, i]||^2 ||U[i, :]||^2, and the sums separate. With G = I at the end and, from the last block
down, G <- sum_h P_h^T D G D P_h, the sum of ||A[:, i]||^2 over all paths is G_ii.

Shortcuts and weights do not occur in eq. (6). The maps are those of the network as pruned so far:
the softmax runs over the keys that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks.groups import token_sites
from ..network.modules.model import CompactModel
from .attention_scores import top_tokens
from .counts import STEM, attention_steps, whole_counts
from .streaming import (
    Attended,
    DenseStreams,
    Progress,
    observed_step,
    position_tables,
    run_step,
    silent,
)


def received(attended: Sequence[Attended]) -> Tensor:
    """The sum over heads of ||P_t |Z_{t-1}| [i, :]||^2 for each token: (batch, queries)."""
    total = torch.zeros(())
    for each in attended:
        # One head at a time, so that memory does not grow with their number.
        stream = each.read.abs()
        for head in each.maps.unbind(dim=1):
            total = total + (head @ stream).square().sum(dim=-1)
    return total


def passed_down(gram: Tensor, maps: Tensor) -> Tensor:
    """One step of the recursion.

    Args:
        gram: G over the tokens that a block keeps, (batch, queries, queries).
        maps: Attention weights of these queries, (batch, heads, queries, keys).

    Returns:
        G over the keys, (batch, keys, keys).
    """
    total = maps.new_zeros(())
    for head in maps.unbind(dim=1):
        total = total + head.transpose(1, 2) @ gram @ head
    return total


def impacts(
    model: CompactModel,
    streams: DenseStreams,
    sets: Sequence[Tensor],
    steps: Sequence[int],
    start: int = 0,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """The impact of each token after some steps with attention, averaged over images.

    Args:
        model: A working copy.
        streams: The images, and their streams in the whole network.
        sets: The kept tokens by site, (tokens at the site,); before step `start` all are kept.
        steps: The steps with attention after which impacts are computed, all at or after `start`;
            `STEM` is what step `start` reads.
        start: The first step that runs with these sets; with `STEM` the first with attention.
        progress: Called with "score", the batches done, and the batches in all.

    Returns:
        By step, the impact of each token that the network carries after it, (tokens,), float64.
    """
    sizes = list(token_sites(model.architecture).values())
    totals = {step: torch.zeros(sizes[step + 1], dtype=torch.float64) for step in steps}
    images, order = 0, exit_order(sets)
    with torch.no_grad():
        for batch in range(len(streams)):
            x = streams.before(start, batch)
            images += len(x)
            observed = _observed(model, x, sets, order, start)
            maps = {number: _maps(attended) for number, attended in observed.items()}
            for step, gram in _grams(maps, sets, min(totals)).items():
                if step in totals:
                    places = order[: gram.shape[1]]
                    read = step == STEM
                    sums = x[:, places].square().sum(-1) if read else received(observed[step])
                    found = (gram.diagonal(dim1=1, dim2=2) * sums[:, : len(places)]).double()
                    totals[step].index_add_(0, places, found.sum(dim=0))
            progress("score", batch + 1, len(streams))
    return {step: total / images for step, total in totals.items()}


def exit_order(sets: Sequence[Tensor]) -> Tensor:
    """The tokens of the stem sorted by the number of sites that keep them, deepest first.

    In this order every set consists of leading tokens. Prefix tokens, which leave last, come first.
    """
    depth = torch.zeros(len(sets[0]), dtype=torch.long)
    for keep in sets:
        depth[: len(keep)] += keep
    return depth.argsort(descending=True, stable=True)


def _observed(
    model: CompactModel, x: Tensor, sets: Sequence[Tensor], order: Tensor, start: int
) -> dict[int, list[Attended]]:
    """What each attention from step `start` on computes, with its tokens in `order`."""
    x = x[:, order[: x.shape[1]]]
    found = {}
    with position_tables(model, order):
        for number in range(start, len(model.steps)):
            count = int(sets[number + 1].sum())
            x, attended = observed_step(model, number, x, count=count)
            if attended:
                found[number] = attended
    return found


def _maps(attended: Sequence[Attended]) -> Tensor:
    return torch.cat([each.maps for each in attended], dim=1)


def _grams(maps: dict[int, Tensor], sets: Sequence[Tensor], end: int) -> dict[int, Tensor]:
    """G after each step with attention, from the last one down to `end`; -1 is the stem.

    Each is (batch, tokens, tokens), over the leading tokens that the next attention reads.
    """
    last = next(iter(maps.values()))
    gram = torch.eye(int(sets[-1].sum())).to(last).expand(len(last), -1, -1)
    found = {}
    for number in sorted(maps, reverse=True):
        found[number] = gram
        if number == end:
            return found
        # What no later attention reads has no impact.
        gram = passed_down(gram, maps[number][:, :, : gram.shape[1]])
    return {**found, -1: gram}


def top_down(
    model: CompactModel, images: Tensor, counts: Sequence[int], progress: Progress
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Choose tokens from the last block down, so that each set contains that of the next block.

    Args:
        model: A working copy.
        images: (images, channels, height, width).
        counts: Tokens to keep by site.
        progress: Called after each step with attention.

    Returns:
        The kept tokens by site, and the impact of each token by step with attention where it was
        needed; -1 is the stem.

    References:
        Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers", eq. 6, Algorithm 1.
    """
    architecture = model.architecture
    sizes, mixing = list(token_sites(architecture).values()), attention_steps(architecture)
    streams = DenseStreams(model, images, mixing)
    sets = [torch.ones(size, dtype=torch.bool) for size in sizes]
    scores: dict[int, Tensor] = {}
    ends = [*mixing[1:], len(architecture.steps)]
    for done, (number, end) in enumerate(zip(reversed(mixing), reversed(ends), strict=True)):
        after = sets[end + 1] if end < len(architecture.steps) else sets[end][:0]
        count = counts[number + 1]
        chosen = top_tokens(
            architecture, torch.zeros(sizes[number + 1]), sets[number + 1], count, after
        )
        if architecture.prefix < count < sizes[number + 1] and count > int(after.sum()):
            scores[number] = impacts(model, streams, sets, [number], number)[number]
            chosen = top_tokens(architecture, scores[number], sets[number + 1], count, after)
        for site in range(number + 1, end + 1):
            sets[site] = chosen[: sizes[site]]
        progress("score", done + 1, len(mixing))
    first = mixing[0]
    if counts[first] < sizes[first]:
        scores[-1] = stem_impact(model, streams, sets)
        chosen = top_tokens(architecture, scores[-1], sets[0], counts[0], sets[first + 1])
        for site in range(first + 1):
            sets[site] = chosen[: sizes[site]]
    return sets, scores


def image_impacts(model: CompactModel, images: Tensor, steps: Sequence[int]) -> dict[int, Tensor]:
    """The impact of each token on the output for each image; every patch stays to the end.

    Args:
        model: A network whose tokens are not selected by content, in evaluation mode.
        images: (images, channels, height, width), on the device of the model.
        steps: The steps with attention after which impacts are computed; -1 is the stem.

    Returns:
        By step, (images, tokens). What no later attention reads has the impact 0.
    """
    sizes = list(token_sites(model.architecture).values())
    sets = [
        torch.arange(size) < count
        for size, count in zip(sizes, whole_counts(model.architecture), strict=True)
    ]
    mixing = attention_steps(model.architecture)
    start = max(min(steps), mixing[0])
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        x = model.embed(images)
        for number in range(start):
            x = run_step(model, number, x)
        observed = {}
        y = x
        for number in range(start, len(model.steps)):
            y, attended = observed_step(model, number, y, count=int(sets[number + 1].sum()))
            if attended:
                observed[number] = attended
        maps = {number: _maps(attended) for number, attended in observed.items()}
        for step, gram in _grams(maps, sets, min(steps)).items():
            if step in steps:
                sums = x.square().sum(dim=-1) if step < 0 else received(observed[step])
                kept = gram.diagonal(dim1=1, dim2=2)
                whole = kept.new_zeros(len(images), sizes[step + 1])
                whole[:, : kept.shape[1]] = kept * sums[:, : kept.shape[1]]
                found[step] = whole
    return found


def stem_impact(model: CompactModel, streams: DenseStreams, sets: Sequence[Tensor]) -> Tensor:
    """The impact of each token that the first attention reads: ||A[:, i]||^2 ||Z_0[i, :]||^2.

    Args:
        model: A working copy.
        streams: The images.
        sets: The kept tokens by site.

    Returns:
        (tokens,), float64, averaged over images.
    """
    first = attention_steps(model.architecture)[0]
    return impacts(model, streams, sets, [STEM], first)[STEM]
