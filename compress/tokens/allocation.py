"""Token counts for a budget of multiply-adds, by dynamic programming over the attentions.

The loss of a count is either the share of the importance of the tokens that are missing there, or
a measured error, paid where a token leaves. The cost of a sub-layer depends on the tokens that it
reads and on those that it computes, so the counts form a chain:

    V_s(m, t) = min over n >= m of V_{s-1}(n, t - macs_s(n, m)) + loss_s(n, m).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..masks.groups import token_sites
from ..network.architecture import Architecture
from ..network.count import branch_macs, count_macs
from .counts import (
    attention_steps,
    macs_share,
    out_of_reach,
    require_share,
    settled,
    whole_counts,
    with_counts,
)

# The budget is divided into at most this many units; costs are rounded up to whole ones.
BINS = 4000
# Larger grids are divided into about this many counts.
_CHOICES = 100
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Stage:
    """An attention and what follows until the next one.

    Attributes:
        step: The number of the step with attention.
        counts: The counts to choose from, increasing.
        losses: The loss of each number of tokens, from 0.
        prices: Multiply-adds for each token read, for each token computed, and for each pair.
    """

    step: int
    counts: tuple[int, ...]
    losses: tuple[float, ...]
    prices: tuple[int, int, int]

    def macs(self, before: int, after: int) -> int:
        """Multiply-adds with `before` tokens read by the attention, and `after` computed."""
        read, computed, pair = self.prices
        return read * before + computed * after + pair * before * after


@dataclass(frozen=True)
class _Problem:
    """The stages, what is paid beside them by the last count, and the unit of the costs.

    With `once` the loss of a stage is paid only for the tokens that leave there.
    """

    stages: Sequence[_Stage]
    rest: Mapping[int, int]
    tokens: int
    unit: int
    once: bool

    def units(self, place: int, before: int, after: int) -> int:
        """The cost of a stage in units, rounded up."""
        cost = self.stages[place].macs(before, after)
        if place == len(self.stages) - 1:
            cost += self.rest[after]
        return -(-cost // self.unit)

    def solve(self, bins: int) -> list[int] | None:
        """The count of each stage; None if no choice fits into `bins` units."""
        # The least loss with a cost of at most b units, by the count of the stage before.
        before: dict[int, _Array] = {self.tokens: np.zeros(bins + 1)}
        chosen: list[dict[int, npt.NDArray[np.int64]]] = []
        for place, stage in enumerate(self.stages):
            after: dict[int, _Array] = {}
            chosen.append({})
            for count in stage.counts:
                best, origin = self._reach(place, count, before, bins)
                after[count], chosen[place][count] = best + stage.losses[count], origin
            before = after
        last = min(before, key=lambda count: (before[count][bins], -count))
        if not math.isfinite(before[last][bins]):
            return None
        found = [last]
        for place in reversed(range(1, len(self.stages))):
            earlier = int(chosen[place][found[-1]][bins])
            bins -= self.units(place, earlier, found[-1])
            found.append(earlier)
        return found[::-1]

    def _reach(
        self, place: int, count: int, before: Mapping[int, _Array], bins: int
    ) -> tuple[_Array, npt.NDArray[np.int64]]:
        """The least loss of the stages before `place`, and the count that it comes from."""
        best, origin = np.full(bins + 1, np.inf), np.zeros(bins + 1, dtype=np.int64)
        losses = self.stages[place].losses
        for earlier, values in before.items():
            cost = self.units(place, earlier, count)
            if earlier < count or cost > bins:
                continue
            reached = values[: bins + 1 - cost]
            if self.once:
                # A network that drops tokens already has fewer here than before.
                reached = reached - losses[min(earlier, len(losses) - 1)]
            better = reached < best[cost:]
            best[cost:][better] = reached[better]
            origin[cost:][better] = earlier
        return best, origin


def allocate_tokens(
    architecture: Architecture,
    losses: Mapping[int, Sequence[float]],
    macs: float,
    name: str = "macs",
    *,
    once: bool = False,
) -> list[int]:
    """Choose the counts of least loss within a budget; the stem keeps all patches.

    Args:
        architecture: The network.
        losses: For each step with attention, the loss of each number of tokens after it, from 0.
        macs: The share of the multiply-adds to keep, as `macs_share` computes it.
        name: What an error calls it.
        once: Whether a loss is paid only for the tokens that leave at a step, instead of for all
            that are missing after it.

    Returns:
        The counts by site.

    Raises:
        InputError: The share is out of range, or even the fewest tokens cost more.
    """
    require_share(macs, name)
    stages = _stages(architecture, losses)
    whole = count_macs(with_counts(architecture, whole_counts(architecture)))
    limit = math.floor(macs * whole)
    unit = max(1, math.ceil(limit / BINS))
    problem = _Problem(stages, _rest(architecture, stages), architecture.tokens, unit, once)
    found = problem.solve(limit // unit)
    if found is None:
        least = _sites(architecture, stages, [stage.counts[0] for stage in stages])
        raise out_of_reach(macs, macs_share(architecture, least), name)
    return _sites(architecture, stages, found)


def dropped_shares(score: Tensor, prefix: int, counts: Sequence[int]) -> list[float]:
    """The share of the importance that is dropped with each count.

    Args:
        score: The importance of each token, (tokens,); numbers below zero are shifted to zero.
        prefix: Number of leading tokens that stay.
        counts: Numbers of tokens, prefix tokens included.
    """
    patches = score[prefix:].double()
    patches = patches - patches.min().clamp(max=0.0)
    ranked = patches.sort(descending=True).values
    total = float(ranked.sum())
    kept = [0.0, *ranked.cumsum(0).tolist()]
    if total <= 0:
        return [1.0 - max(0, count - prefix) / len(patches) for count in counts]
    return [max(0.0, 1.0 - kept[max(0, count - prefix)] / total) for count in counts]


def _stages(architecture: Architecture, losses: Mapping[int, Sequence[float]]) -> list[_Stage]:
    mixing = attention_steps(architecture)
    sizes = list(token_sites(architecture).values())
    found = []
    for number, end in zip(mixing, [*mixing[1:], len(architecture.steps)], strict=True):
        counts, loss = _choices(architecture, sizes[number + 1]), tuple(losses[number])
        if number == mixing[-1] and architecture.pooled_prefix:
            counts, loss = (architecture.pooled_prefix,), (0.0,) * len(loss)
        found.append(_Stage(number, counts, loss, _prices(architecture, number, end)))
    return found


def _prices(architecture: Architecture, start: int, end: int) -> tuple[int, int, int]:
    """The `prices` of the steps from `start`, which has an attention, to `end`."""
    # Multiply-adds are bilinear in the tokens that a sub-layer reads and in those it computes.
    embed, found = architecture.embed, []
    for read, computed in ((1, 0), (0, 1), (1, 1)):
        total = sum(branch_macs(each, embed, read, computed) for each in architecture.steps[start])
        for step in architecture.steps[start + 1 : end]:
            total += sum(branch_macs(branch, embed, computed, computed) for branch in step)
        found.append(total)
    return found[0], found[1], found[2] - found[0] - found[1]


def _choices(architecture: Architecture, size: int) -> tuple[int, ...]:
    prefix = architecture.prefix
    stride = max(1, math.ceil((size - prefix) / _CHOICES))
    return tuple(sorted({*range(prefix + 1, size + 1, stride), size}))


def _rest(architecture: Architecture, stages: Sequence[_Stage]) -> dict[int, int]:
    """What is paid outside the stages, by the number of tokens at the end: stem, pooling, head."""
    first, tokens = stages[0].step + 1, architecture.tokens
    found = {}
    for count in stages[-1].counts:
        counts = [*([tokens] * first), *([count] * (len(architecture.steps) + 1 - first))]
        inside = stages[0].macs(tokens, count)
        inside += sum(stage.macs(count, count) for stage in stages[1:])
        found[count] = count_macs(with_counts(architecture, counts)) - inside
    return found


def _sites(
    architecture: Architecture, stages: Sequence[_Stage], counts: Sequence[int]
) -> list[int]:
    found = list(token_sites(architecture).values())
    for stage, count in zip(stages, counts, strict=True):
        found[stage.step + 1 :] = [count] * (len(found) - stage.step - 1)
    return settled(architecture, found)
