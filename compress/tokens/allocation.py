"""Token counts for a budget of multiply-adds, by dynamic programming over the stem and attentions.

The loss of a count is either the share of the importance of the tokens that are missing there, or
a measured error, paid where a token leaves. The cost of a sub-layer depends on the tokens that it
reads and on those that it computes, so the counts form a chain:

    V_s(m, t) = min over n >= m of V_{s-1}(n, t - macs_s(n, m)) + loss_s(n, m).

It starts from the patches that the stem embeds, which the first attention reads. What a patch that
is not embedded saves there is part of macs_1.
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
    STEM,
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
    """What the costs and the losses of a choice of counts are.

    Attributes:
        stages: The attentions.
        stem: The loss of each count of the stem, decreasing counts: equal losses keep more.
        saved: Multiply-adds that the stem saves with each of these counts.
        rest: What is paid outside the stages, by the last count, where the stem saves nothing.
        unit: Multiply-adds of a unit of the costs.
        once: Whether the loss of a stage is paid only for the tokens that leave there.
    """

    stages: Sequence[_Stage]
    stem: Mapping[int, float]
    saved: Mapping[int, int]
    rest: Mapping[int, int]
    unit: int
    once: bool

    def units(self, place: int, before: int, after: int) -> int:
        """The cost of a stage in units, rounded up; below 0 where the stem saves more."""
        cost = self.stages[place].macs(before, after)
        if place == 0:
            cost -= self.saved[before]
        if place == len(self.stages) - 1:
            cost += self.rest[after]
        return -(-cost // self.unit)

    def solve(self, bins: int) -> list[int] | None:
        """The counts of the stem and each stage; None if no choice fits into `bins` units."""
        # Credit from the stem, so that what is spent after the first stage is not below 0.
        first = self.stages[0].counts
        credit = max(0, *(-self.units(0, before, after) for before in self.stem for after in first))
        bins += credit
        # The least loss with a cost of at most b units, by the count of the stage before.
        before: dict[int, _Array] = {
            count: np.full(bins + 1, loss) for count, loss in self.stem.items()
        }
        chosen: list[dict[int, npt.NDArray[np.int64]]] = []
        for place, stage in enumerate(self.stages):
            after: dict[int, _Array] = {}
            chosen.append({})
            for count in stage.counts:
                best, origin = self._reach(place, count, before, 0 if place else credit)
                after[count], chosen[place][count] = best + stage.losses[count], origin
            before = after
        last = min(before, key=lambda count: (before[count][bins], -count))
        if not math.isfinite(before[last][bins]):
            return None
        found = [last]
        for place in reversed(range(len(self.stages))):
            earlier = int(chosen[place][found[-1]][bins])
            bins -= self.units(place, earlier, found[-1])
            found.append(earlier)
        return found[::-1]

    def _reach(
        self, place: int, count: int, before: Mapping[int, _Array], credit: int
    ) -> tuple[_Array, npt.NDArray[np.int64]]:
        """The least loss of the stages before `place`, and the count that it comes from."""
        bins = len(next(iter(before.values()))) - 1
        best, origin = np.full(bins + 1, np.inf), np.zeros(bins + 1, dtype=np.int64)
        losses = self.stages[place].losses
        for earlier, values in before.items():
            cost = self.units(place, earlier, count) + credit
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
    """Choose the counts of least loss within a budget.

    Args:
        architecture: The network.
        losses: For each step with attention, the loss of each number of tokens after it, from 0;
            for `STEM`, of each number that the stem embeds. Without these it embeds all patches.
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
    stem = _stem(architecture, stages, losses)
    whole = count_macs(with_counts(architecture, whole_counts(architecture)))
    limit = math.floor(macs * whole)
    unit = max(1, math.ceil(limit / BINS))
    saved, rest = _outside(architecture, stages, list(stem))
    problem = _Problem(stages, stem, saved, rest, unit, once)
    found = problem.solve(limit // unit)
    if found is not None:
        return _sites(architecture, stages, found)
    least = _sites(architecture, stages, [min(stem), *(stage.counts[0] for stage in stages)])
    # Costs are rounded up in the search.
    if macs_share(architecture, least) > macs:
        raise out_of_reach(macs, macs_share(architecture, least), name)
    return least


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


def _stem(
    architecture: Architecture, stages: Sequence[_Stage], losses: Mapping[int, Sequence[float]]
) -> dict[int, float]:
    """The loss of each count that the first attention may read, all tokens first."""
    whole = list(token_sites(architecture).values())[stages[0].step]
    if STEM not in losses:
        return {whole: 0.0}
    return {count: losses[STEM][count] for count in reversed(_choices(architecture, whole))}


def _outside(
    architecture: Architecture, stages: Sequence[_Stage], stem: Sequence[int]
) -> tuple[dict[int, int], dict[int, int]]:
    """What the stem saves by its number of tokens, and what is paid outside the stages without it.

    The latter are the stem, steps before the first attention, pooling and head, by the number of
    tokens at the end.
    """
    first = stages[0].step + 1

    def paid(embedded: int, last: int) -> int:
        counts = [*([embedded] * first), *([last] * (len(architecture.steps) + 1 - first))]
        inside = stages[0].macs(embedded, last)
        inside += sum(stage.macs(last, last) for stage in stages[1:])
        return count_macs(with_counts(architecture, counts)) - inside

    rest = {last: paid(stem[0], last) for last in stages[-1].counts}
    last = stages[-1].counts[0]
    return {count: rest[last] - paid(count, last) for count in stem}, rest


def _sites(
    architecture: Architecture, stages: Sequence[_Stage], counts: Sequence[int]
) -> list[int]:
    """The counts by site for those of the stem and of each stage."""
    found = list(token_sites(architecture).values())
    first = stages[0].step + 1
    found[:first] = [min(counts[0], size) for size in found[:first]]
    for stage, count in zip(stages, counts[1:], strict=True):
        found[stage.step + 1 :] = [count] * (len(found) - stage.step - 1)
    return settled(architecture, found)
