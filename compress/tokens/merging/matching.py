"""Which tokens of an image merge or leave, and the merge as a product with an explicit matrix.

A choice is a place for each token in the shorter stream. Tokens of one place merge, and a place
behind the end drops the token. Places follow from comparisons and sums of constant shape, so that
the graph of a network needs no sort, no gather and no scatter; ties go to the lowest index.

References:
    Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3.
    Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import InputError

# A number for all attentions, a number with its trend over the depth, or one for each attention.
Removals = int | tuple[int, float] | list[int]


def removal_schedule(r: Removals, count: int) -> tuple[int, ...]:
    """The number of tokens to remove after each of `count` attentions.

    Args:
        r: A constant number; or a pair (number, trend) with a trend between -1 and 1: from
            number * (1 - trend) at the first attention linearly to number * (1 + trend) at the
            last one, rounded down; or a list with one number for each attention, without trailing
            zeros if wanted.
        count: The number of attentions.

    Returns:
        `count` numbers.

    Raises:
        InputError: A number is negative, the trend is out of range, or the list is too long.
    """
    if isinstance(r, tuple):
        if len(r) != 2:
            raise InputError(f"r = {r}: give (number, trend), or a list with one number each")
        number, trend = r
        if not -1.0 <= trend <= 1.0:
            raise InputError(f"r = {r}: the trend {trend} must lie between -1 and 1")
        first = int(number * (1.0 - trend))
        step = (2 * number - 2 * first) / max(1, count - 1)
        found = [int(first + step * place) for place in range(count)]
    elif isinstance(r, int):
        found = [r] * count
    else:
        found = list(r)
        if len(found) > count:
            raise InputError(
                f"r = {r}: {len(found)} numbers for {count} attentions; "
                "give one for each, or a single number"
            )
        found += [0] * (count - len(found))
    if min(found, default=0) < 0:
        raise InputError(f"r = {r}: a number of removed tokens is negative; give 0 or more")
    return tuple(found)


def most_removable(tokens: int, prefix: int) -> int:
    """How many tokens one matching can remove at most: half of those that are not in the prefix."""
    return max(0, tokens - prefix) // 2


def descending_ranks(scores: Tensor) -> Tensor:
    """The place of each score in descending order: (batch, tokens) -> (batch, tokens), int64.

    Equal scores are ranked by their index, the lowest first.
    """
    own, other = scores[:, :, None], scores[:, None, :]
    before = (other > own) | ((other == own) & _earlier(scores.shape[1], scores.device))
    return before.sum(dim=-1)


def merge_places(keys: Tensor, r: int, prefix: int) -> Tensor:
    """Places after the bipartite matching of ToMe.

    Tokens at even positions are matched with their most similar token at an odd position, by the
    cosine of their keys; of these pairs the `r` most similar ones merge. The shorter stream has
    the prefix tokens, the other tokens of the even positions in their order, then the odd ones. The
    source leaves the even ones unsorted in networks without a class token.

    Args:
        keys: Mean of the keys over heads, (batch, tokens, width).
        r: The number of pairs, from 1 to `most_removable(tokens, prefix)`.
        prefix: The number of leading tokens that never merge.

    Returns:
        (batch, tokens), int64, each below tokens - r.
    """
    keys, tokens = keys.detach(), keys.shape[1]
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    even, odd = unit[:, ::2], unit[:, 1::2]
    evens, fixed_even, fixed_odd = even.shape[1], (prefix + 1) // 2, prefix // 2
    similarity = even @ odd[:, fixed_odd:].transpose(1, 2)
    best = similarity.argmax(dim=-1) + fixed_odd
    number = torch.arange(evens, device=keys.device)
    fixed = number < fixed_even
    nearest = similarity.amax(dim=-1).masked_fill(fixed, -torch.inf)
    merges = descending_ranks(nearest) < r
    # How many even tokens before this one stay.
    staying = (~merges[:, None, :] & _earlier(evens, keys.device)).sum(dim=-1)
    even_places = torch.where(merges, evens - r + best, staying + fixed_odd)
    even_places = torch.where(fixed, 2 * number, even_places)
    odd_places = torch.where(number < fixed_odd, 2 * number + 1, evens - r + number)
    # With an odd number of tokens the last odd place belongs to none.
    pairs = torch.stack([even_places, odd_places.expand_as(even_places)], dim=-1)
    return pairs.flatten(1)[:, :tokens]


def prune_places(scores: Tensor) -> Tensor:
    """Places after the tokens of lowest score have left, in descending order of the score.

    Args:
        scores: (batch, tokens); prefix tokens have the largest ones.

    Returns:
        (batch, tokens), int64; a token with a place behind the end of the shorter stream leaves.
    """
    return descending_ranks(scores.detach())


def merge_matrix(places: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The matrix W of a merge, x' = W x: rows are means, weighted by the sizes of the tokens.

    Args:
        places: The place of each token in the shorter stream, (batch, tokens).
        sizes: The number of original tokens in each, (batch, tokens).
        count: The number of tokens of the shorter stream.

    Returns:
        (batch, count, tokens); each row has the sum 1.
    """
    weights = _membership(places, sizes, count) * sizes[:, None, :]
    return weights / weights.sum(dim=-1, keepdim=True)


def merged_sizes(places: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The number of original tokens in each token of the shorter stream.

    Args:
        places: As for `merge_matrix`.
        sizes: As for `merge_matrix`.
        count: As for `merge_matrix`.

    Returns:
        (batch, count), exact integers.
    """
    return (_membership(places, sizes, count) * sizes[:, None, :]).sum(dim=-1)


def _membership(places: Tensor, like: Tensor, count: int) -> Tensor:
    """1 where a token goes to a place: (batch, count, tokens)."""
    rows = torch.arange(count, device=places.device)
    return (places[:, None, :] == rows[None, :, None]).to(like.dtype)


def _earlier(count: int, device: torch.device) -> Tensor:
    """Whether column j comes before row i, (count, count)."""
    number = torch.arange(count, device=device)
    return number[None, :] < number[:, None]
