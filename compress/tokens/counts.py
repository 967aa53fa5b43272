"""How many tokens a network carries after each sub-layer: schedules, validation and cost.

Counts are listed by site, as `token_sites` names them: after the stem, and after each step. They
include prefix tokens. Tokens exchange information in attention only, so a token that no attention
reads any more leaves at once: counts change after the stem and at steps with attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from ...core.errors import InputError
from ..masks.groups import token_sites
from ..network.architecture import Architecture, least_tokens
from ..network.count import count_macs
from ..network.token_order import require_no_inner

Schedule = Literal["uniform", "linear", "constant"]
# The ratio of a schedule is a multiple of one over this.
_STEPS = 10_000
# Scores and losses by step have those of the stem, where patches leave before they are embedded,
# under this number.
STEM = -1


def attention_steps(architecture: Architecture) -> list[int]:
    """The numbers of the steps with attention, at which counts may change.

    Raises:
        InputError: No token can leave: the network returns all, or has no attention.
    """
    found = list(architecture.attention_steps())
    if architecture.pool.kind == "none":
        raise InputError(
            "tokens: the network returns every token, so none can be dropped; "
            "add a pooling first (reset_classifier)"
        )
    if not found:
        raise InputError("tokens: the network has no attention, so it has no use for patches")
    return found


def whole_counts(architecture: Architecture) -> list[int]:
    """The counts by site of a network that drops nothing which its head could read."""
    return settled(architecture, list(token_sites(architecture).values()))


def fewest_counts(architecture: Architecture) -> list[int]:
    """The counts by site of the cheapest network: one patch, and none where it is not read."""
    sizes = token_sites(architecture).values()
    return settled(architecture, [min(architecture.prefix + 1, size) for size in sizes])


def settled(architecture: Architecture, counts: Sequence[int]) -> list[int]:
    """Remove from counts by site the tokens that are computed and never read.

    After the last attention these are the tokens that the head does not read. Before a sub-layer
    without attention, they are the tokens that it drops.
    """
    found, mixing = list(counts), attention_steps(architecture)
    if architecture.pooled_prefix:
        last = mixing[-1] + 1
        found[last:] = [min(count, architecture.pooled_prefix) for count in found[last:]]
    for number in reversed(range(len(architecture.steps))):
        if number not in mixing:
            found[number] = found[number + 1]
    # A convolution needs an output, which the first attention then reads.
    before = mixing[0] + 1
    found[:before] = [max(count, architecture.prefix + 1) for count in found[:before]]
    return found


def read_counts(
    architecture: Architecture, counts: Sequence[int], name: str = "counts"
) -> list[int]:
    """Validate counts, and list them by site.

    Args:
        architecture: The network.
        counts: The number of tokens, prefix tokens included, after each block (the stem then
            keeps all), or after the stem and each step.
        name: What an error calls them.

    Returns:
        The counts by site, without tokens that are never read; see `settled`.

    Raises:
        InputError: A wrong length, a count that rises, more tokens than there are, or fewer than
            the head needs; the message names the site and the number.
    """
    sizes, blocks = token_sites(architecture), architecture.block_names
    if len(counts) not in (len(blocks), len(sizes)):
        raise InputError(
            f"{name}: {len(counts)} numbers; give one for each of the {len(blocks)} blocks, or "
            f"{len(sizes)}, for the stem and each sub-layer"
        )
    given = list(counts)
    labels = list(blocks) if len(counts) == len(blocks) else list(sizes)
    for label, count, before in zip(labels, given, [None, *given], strict=False):
        if before is not None and count > before:
            raise InputError(
                f"{name}: {count} tokens at {label}, after {before}; tokens do not return, so "
                "the counts cannot rise"
            )
    if len(counts) == len(blocks):
        given = [architecture.tokens] * len(sizes)
        start = 0
        for count, end in zip(counts, architecture.block_ends, strict=True):
            given[start + 1 : end + 1] = [count] * (end - start)
            start = end
    least = least_tokens(architecture)
    for (label, size), count in zip(sizes.items(), given, strict=True):
        if count > size:
            raise InputError(
                f"{name}: {count} tokens at {label}; the network carries at most {size} there"
            )
        if count < least:
            raise InputError(f"{name}: {count} tokens at {label}; the head needs at least {least}")
    if given[0] <= architecture.prefix:
        raise InputError(
            f"{name}: {given[0]} tokens at the stem, which are no patch; "
            f"give at least {architecture.prefix + 1}"
        )
    return settled(architecture, given)


def schedule_counts(architecture: Architecture, schedule: Schedule, ratio: float) -> list[int]:
    """The counts by site of a simple schedule.

    Args:
        architecture: The network.
        schedule: "uniform": each block keeps the share `ratio` of the patches that reach it;
            "linear": the patches decline in equal steps down to the share `ratio`; "constant":
            the first block drops to the share `ratio`.
        ratio: Above 0, at most 1. The last attention of a network whose head reads only prefix
            tokens computes these alone, and is not counted.

    Returns:
        The counts, at least one patch in each block that attention still reads.

    Raises:
        InputError: The schedule is unknown, or the ratio out of range.
    """
    if schedule not in get_args(Schedule):
        raise InputError(f"schedule = {schedule!r}: choose one of {', '.join(get_args(Schedule))}")
    if not 0 < ratio <= 1:
        raise InputError(f"ratio = {ratio}: give the share of the patches to keep, up to 1")
    mixing, prefix = attention_steps(architecture), architecture.prefix
    sizes = list(token_sites(architecture).values())
    levels = len(mixing) - (1 if architecture.pooled_prefix else 0)
    counts, patches = list(sizes), sizes[0] - prefix
    for place, number in enumerate(mixing):
        share = _share(schedule, ratio, place + 1, levels)
        kept = prefix + max(1, math.ceil(share * patches - 1e-9))
        # A network that drops tokens already, drops no fewer.
        counts[number + 1 :] = [min(kept, size) for size in sizes[number + 1 :]]
    return settled(architecture, counts)


def _share(schedule: Schedule, ratio: float, place: int, levels: int) -> float:
    """The share of all patches after the attention number `place`, of `levels` that count."""
    if schedule == "constant":
        return ratio
    if schedule == "uniform":
        return float(ratio**place)
    return 1.0 - (1.0 - ratio) * min(1.0, place / max(1, levels))


def with_counts(architecture: Architecture, counts: Sequence[int]) -> Architecture:
    """The architecture with these counts by site, for counting parameters and multiply-adds."""
    require_no_inner(architecture, "token counts")
    order = architecture.order
    if counts[0] < architecture.tokens:
        embedded = range(architecture.patches) if order is None else order
        order = tuple(embedded)[: counts[0] - architecture.prefix]
    steps = tuple(
        tuple(branch.model_copy(update={"tokens": count}) for branch in step)
        for step, count in zip(architecture.steps, counts[1:], strict=True)
    )
    update = {"order": order, "steps": steps, "last_queries": False}
    return architecture.model_copy(update=update)


def macs_share(architecture: Architecture, counts: Sequence[int]) -> float:
    """The multiply-adds with these counts by site, as a share of those of the whole network.

    The whole network is counted as it is exported: its last attention computes only what the head
    reads.
    """
    whole = count_macs(with_counts(architecture, whole_counts(architecture)))
    return count_macs(with_counts(architecture, counts)) / whole


def counts_for_macs(
    architecture: Architecture, schedule: Schedule, share: float, name: str = "macs"
) -> list[int]:
    """The largest counts of a schedule within a share of the multiply-adds.

    Args:
        architecture: The network.
        schedule: As for `schedule_counts`.
        share: The share to keep, between 0 and 1, as `macs_share` computes it.
        name: What an error calls it.

    Returns:
        The counts by site.

    Raises:
        InputError: The share is out of range, or below that of the fewest tokens.
    """
    require_share(share, name)
    low, high = 1, _STEPS
    least = schedule_counts(architecture, schedule, low / _STEPS)
    if macs_share(architecture, least) > share:
        raise out_of_reach(share, macs_share(architecture, least), name)
    while low < high:
        middle = (low + high + 1) // 2
        counts = schedule_counts(architecture, schedule, middle / _STEPS)
        if macs_share(architecture, counts) <= share:
            low = middle
        else:
            high = middle - 1
    return schedule_counts(architecture, schedule, low / _STEPS)


def require_share(share: float, name: str) -> None:
    """Raise InputError unless `share` is between 0 and 1."""
    if not 0 < share < 1:
        raise InputError(
            f"{name} = {share:g}: give the share of the multiply-adds to keep, between 0 and 1"
        )


def require_reach(architecture: Architecture, share: float, name: str) -> None:
    """Check that counts chosen at the stem and at each attention can meet a budget.

    Args:
        architecture: The network.
        share: The share of the multiply-adds to keep, as `macs_share` computes it.
        name: What an error calls it.

    Raises:
        InputError: The share is out of range, or below that of the fewest tokens.
    """
    require_share(share, name)
    least = macs_share(architecture, fewest_counts(architecture))
    if least > share:
        raise out_of_reach(share, least, name)


def out_of_reach(share: float, least: float, name: str) -> InputError:
    """The error for a budget that tokens alone cannot meet."""
    return InputError(
        f"{name} = {share:g}: with the fewest tokens {least:.3f} of the multiply-adds are left; "
        "give a larger budget, or cut widths, too"
    )
