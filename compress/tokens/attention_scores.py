"""Scores of tokens by the attention that they receive, and the choice from the first block up.

The score of a token after an attention comes from the maps of that attention, averaged over heads
and images. The maps are those of the network as pruned so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..masks.groups import token_sites
from ..network.architecture import Architecture
from ..network.architecture_checks import pinned_tokens
from ..network.modules.model import CompactModel
from .counts import STEM, attention_steps, whole_counts
from .streaming import Attended, Progress, batches, observed_step, run_step

# Of one step and one batch: the score of each key, summed over the batch.
Score = Callable[[Architecture, Sequence[Attended], Tensor], Tensor]


def class_attention(
    architecture: Architecture, attended: Sequence[Attended], keep: Tensor
) -> Tensor:
    """Attention of the class token, mean over heads; that of all tokens without a class token.

    Args:
        architecture: The network.
        attended: The attentions of a step.
        keep: Which keys are kept, (keys,).

    Returns:
        The sum over the batch, (keys,).

    References:
        Liang et al. 2022, "Not All Patches are What You Need" (EViT), eq. 2.
    """
    rows = pinned_tokens(architecture)
    found = []
    for each in attended:
        maps = each.maps[:, :, :rows] if rows else each.maps[:, :, _rows(each, keep)]
        found.append(maps.mean(dim=(1, 2)).sum(dim=0))
    return _mean(found)


def column_attention(
    architecture: Architecture, attended: Sequence[Attended], keep: Tensor
) -> Tensor:
    """Attention that a token receives from all, times the norm of its value over all heads.

    Args:
        architecture: The network.
        attended: The attentions of a step.
        keep: Which keys are kept, (keys,).

    Returns:
        The sum over the batch, (keys,).

    References:
        Fayyaz et al. 2022, "Adaptive Token Sampling for Efficient Vision Transformers", eq. 3,
        with the attention of all tokens in place of that of the class token.
    """
    del architecture
    found = []
    for each in attended:
        received = each.maps[:, :, _rows(each, keep)].mean(dim=(1, 2))
        size = each.values.square().sum(dim=(1, 3)).sqrt()
        found.append((received * size).sum(dim=0))
    return _mean(found)


def significance_rank(
    architecture: Architecture, attended: Sequence[Attended], keep: Tensor
) -> Tensor:
    """The share of the tokens of an image that receive less attention from other tokens.

    Args:
        architecture: The network.
        attended: The attentions of a step.
        keep: Which keys are kept, (keys,).

    Returns:
        The sum over the batch, (keys,).

    References:
        Goyal et al. 2020, "PoWER-BERT", section 3.2 (significance scores and their ranks).
    """
    total = torch.zeros(())
    for each in attended:
        rows = _rows(each, keep)
        received = each.maps[:, :, rows].sum(dim=(1, 2))
        own = each.maps.diagonal(dim1=2, dim2=3).sum(dim=1)
        queries = own.shape[-1]
        received[:, :queries] -= own
        total = total + received
    candidates = keep.clone()
    candidates[: architecture.prefix] = False
    total = total.masked_fill(~candidates, -torch.inf)
    ranks = total.argsort(dim=-1).argsort(dim=-1).double() - int((~candidates).sum())
    return ranks.clamp(min=0).sum(dim=0) / max(1, int(candidates.sum()) - 1)


SCORES: dict[str, Score] = {
    "class-attention": class_attention,
    "column-attention": column_attention,
    "power-bert": significance_rank,
}


def _rows(each: Attended, keep: Tensor) -> Tensor:
    """The queries that are kept."""
    return torch.nonzero(keep[: each.maps.shape[2]]).flatten()


def _mean(found: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.double() for each in found]).mean(dim=0)


def bottom_up(
    model: CompactModel,
    images: Tensor,
    counts: Sequence[int] | None,
    score: Score,
    progress: Progress,
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Choose tokens from the stem up, each time by the attention of the network so far.

    Args:
        model: A working copy.
        images: (images, channels, height, width).
        counts: Tokens to keep by site; None: only the scores of the whole network are computed.
        score: Of one step.
        progress: Called after each batch of each step.

    Returns:
        The kept tokens by site, and the score of each token by step with attention; `STEM` has that
        of the stem, unless given counts keep all patches there.
    """
    architecture = model.architecture
    mixing, sizes = attention_steps(architecture), list(token_sites(architecture).values())
    whole = counts is None
    counts = whole_counts(architecture) if counts is None else counts
    parts = batches(model, images)
    total, done = len(parts) * len(mixing), 0
    with torch.no_grad():
        streams = [model.embed(part) for part in parts]
        sets, scores = [torch.ones(sizes[0], dtype=torch.bool)], dict[int, Tensor]()
        for number in range(len(architecture.steps)):
            if number == mixing[0] and counts[number] < sizes[number]:
                # What leaves before the first attention is chosen by what that would read.
                found = _scored(model, number, streams, sets[-1], score)[1]
                scores[STEM] = found / len(images)
                first = top_tokens(architecture, found, sets[-1], counts[number])
                sets = [first[:size] for size in sizes[: number + 1]]
            if number not in mixing:
                streams = [run_step(model, number, x, sets[-1]) for x in streams]
                sets.append(sets[-1][: sizes[number + 1]])
                continue
            streams, found = _scored(model, number, streams, sets[-1], score)
            done += len(parts)
            progress("score", done, total)
            if whole and number == mixing[0]:
                scores[STEM] = found / len(images)
            after = sets[-1][: sizes[number + 1]]
            scores[number] = found[: sizes[number + 1]] / len(images)
            sets.append(top_tokens(architecture, scores[number], after, counts[number + 1]))
    return sets, scores


def _scored(
    model: CompactModel, number: int, streams: Sequence[Tensor], keep: Tensor, score: Score
) -> tuple[list[Tensor], Tensor]:
    """The streams after a step, and the score of each of its keys summed over all images."""
    total = torch.zeros(len(keep), dtype=torch.float64)
    after = []
    for x in streams:
        y, attended = observed_step(model, number, x, keep)
        total += score(model.architecture, attended, keep).double()
        after.append(y)
    return after, total


def top_tokens(
    architecture: Architecture, score: Tensor, among: Tensor, count: int, kept: Tensor | None = None
) -> Tensor:
    """Choose the tokens of highest score.

    Args:
        architecture: The network, whose prefix tokens come first.
        score: Of each token, (tokens,). Equal scores go to the first token.
        among: Which tokens may be kept, (tokens,) booleans.
        count: How many tokens are kept, prefix tokens included.
        kept: Tokens that are kept in any case. None: none.

    Returns:
        (tokens,) booleans with `count` tokens.
    """
    prefix = architecture.prefix
    found = torch.zeros(len(among), dtype=torch.bool)
    if kept is not None:
        found[: len(kept)] |= kept[: len(among)]
    found[: min(prefix, count)] = among[: min(prefix, count)]
    candidates = among & ~found
    candidates[:prefix] = False
    missing = count - int(found.sum())
    ranked = score.double().masked_fill(~candidates, -torch.inf)
    order = torch.argsort(ranked, descending=True, stable=True)
    found[order[: max(0, min(missing, int(candidates.sum())))]] = True
    return found


def with_stem(architecture: Architecture, scores: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The scores of a method with those of `STEM`: its own, or those after the first attention.

    Args:
        architecture: The network.
        scores: Of each token by step with attention.
    """
    first = attention_steps(architecture)[0]
    size = list(token_sites(architecture).values())[first]
    return {STEM: _padded(scores[first], size), **scores}


def _padded(score: Tensor, size: int) -> Tensor:
    """A score of `size` tokens; those that it does not have come last."""
    missing = max(0, size - len(score))
    return torch.cat([score, score.min().expand(missing)])[:size]


def by_fixed_scores(
    architecture: Architecture, scores: Mapping[int, Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """Choose tokens from the stem up by scores that do not depend on the choice.

    Args:
        architecture: The network.
        scores: Of each token by step with attention.
        counts: Tokens to keep by site.

    Returns:
        The kept tokens by site.
    """
    sizes, mixing = list(token_sites(architecture).values()), attention_steps(architecture)
    sets: list[Tensor] = []
    current = torch.ones(sizes[0], dtype=torch.bool)
    for site, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        # The score after the last attention before this site; at the stem that of the first one.
        step = max((number for number in mixing if number < site), default=mixing[0])
        current = current[:size]
        if count < int(current.sum()):
            score = _padded(scores[step], size)
            current = top_tokens(architecture, score, current, count)
        sets.append(current)
    return sets
