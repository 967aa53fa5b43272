"""A chain of sub-layers with options and token levels: the least loss for a budget of time.

The dynamic programme runs over sub-layers with the state (token level, quantised time):

    V_s(m, t) = min over n >= m, options p of V_{s-1}(n, t - time_s(n, m, p)) + loss_s(n, m, p).

Times are rounded up to whole bins, so a budget is never exceeded. A price per time gives a lower
bound of the loss in milliseconds of work, and a second solution to compare with.

References:
    Frantar and Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees" (quantised time).
    Kellerer et al. 2004, "Knapsack Problems", section 11 (multiple choice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

# Steps of the search for a price: of a solution, and of a lower bound or a first estimate.
BINS, PRICES, FEW_PRICES = 4000, 50, 16
Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
# A sub-layer's choice: the place of the pair of token levels, and of the option.
Choice = tuple[int, int]
# Below this share of the budget two times are the same.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Stage:
    """A sub-layer and its options.

    Attributes:
        name: The sub-layer.
        pairs: Token levels before and after it that are possible; 0 is all tokens.
        times: The time of each option at each pair, (pairs, options); infinite where an option is
            not possible.
        losses: The loss of each option at each pair, (pairs, options).
    """

    name: str
    pairs: tuple[tuple[int, int], ...]
    times: Numbers
    losses: Numbers

    @cached_property
    def last_level(self) -> int:
        """The highest token level that occurs."""
        return max(max(pair) for pair in self.pairs)


@dataclass(frozen=True)
class Plan:
    """A choice for every stage, its loss and its time."""

    choices: tuple[Choice, ...]
    loss: float
    time: float


def plan_of(stages: Sequence[Stage], choices: Sequence[Choice]) -> Plan:
    """The loss and the time of a choice for every stage."""
    chosen = list(zip(stages, choices, strict=True))
    loss = math.fsum(float(stage.losses[choice]) for stage, choice in chosen)
    time = math.fsum(float(stage.times[choice]) for stage, choice in chosen)
    return Plan(tuple(choices), loss, time)


def least_time(stages: Sequence[Stage]) -> float:
    """The least time of any choice; infinite if no choice is possible."""
    return _path(stages, [stage.times.min(axis=1) for stage in stages])[0]


def solve_stages(stages: Sequence[Stage], budget: float, bins: int = BINS) -> Plan | None:
    """Choose the options of least loss with a total time of at most `budget`.

    Args:
        stages: The sub-layers in order; the first one is reached with token level 0.
        budget: The time, in the unit of `Stage.times`.
        bins: The budget is divided into so many; the result is exact where all times are whole
            bins, and elsewhere up to one bin a sub-layer.

    Returns:
        The plan; None if no choice is possible within the budget.
    """
    if budget < 0:
        return None
    found = [_programme(stages, budget, bins), _by_price(stages, budget, PRICES)[0]]
    plans = [_filled(stages, plan, budget) for plan in found if plan is not None]
    return min(plans, key=lambda plan: (plan.loss, plan.time), default=None)


def lower_bound(stages: Sequence[Stage], budget: float) -> float:
    """A loss that no choice within the budget falls below; infinite if there is none.

    The maximum over prices λ of min (loss + λ time) - λ budget.
    """
    return math.inf if budget < 0 else _by_price(stages, budget, FEW_PRICES)[1]


def solve_quickly(stages: Sequence[Stage], budget: float) -> Plan | None:
    """Choose by one price per time only: many times faster than `solve_stages`, and coarser."""
    plan = None if budget < 0 else _by_price(stages, budget, FEW_PRICES)[0]
    return None if plan is None else _filled(stages, plan, budget)


def _by_price(stages: Sequence[Stage], budget: float, steps: int) -> tuple[Plan | None, float]:
    """The best choice of one price per time, and the lower bound of the loss."""
    most = budget * (1 + TOLERANCE)
    if not least_time(stages) <= most:
        return None, math.inf
    bound = -math.inf

    def at(price: float) -> Plan:
        nonlocal bound
        value, choices = _path(stages, *_priced(stages, price))
        bound = max(bound, value - price * budget)
        return plan_of(stages, choices)

    best = at(0.0)
    if best.time <= most:
        return best, bound
    finite = [stage.losses[np.isfinite(stage.losses)] for stage in stages]
    scale = max([1e-30, *(float(np.abs(each).max(initial=0.0)) for each in finite)])
    low, high = 0.0, scale / max(most, 1e-30)
    for _ in range(PRICES):
        best = at(high)
        if best.time <= most:
            break
        low, high = high, 8.0 * high
    else:
        return None, bound
    for _ in range(steps):
        price = 0.5 * (low + high)
        plan = at(price)
        if plan.time > most:
            low = price
            continue
        high = price
        if plan.loss < best.loss:
            best = plan
    return best, bound


def _priced(stages: Sequence[Stage], price: float) -> tuple[list[Numbers], list[Counts]]:
    values, places = [], []
    for stage in stages:
        with np.errstate(invalid="ignore"):
            # 0 * inf: an option that is not possible has no finite loss at any price.
            cost = np.where(np.isfinite(stage.times), price * stage.times, np.inf)
        total = stage.losses + cost
        place = total.argmin(axis=1)
        values.append(np.take_along_axis(total, place[:, None], axis=1)[:, 0])
        places.append(place)
    return values, places


def _levels(stages: Sequence[Stage]) -> int:
    return 1 + max((stage.last_level for stage in stages), default=0)


def _path(
    stages: Sequence[Stage], values: Sequence[Numbers], places: Sequence[Counts] | None = None
) -> tuple[float, list[Choice]]:
    """The path over token levels of least total value, and its choices if `places` has options."""
    levels = _levels(stages)
    best = [0.0, *([math.inf] * (levels - 1))]
    origins: list[list[int]] = []
    for stage, value in zip(stages, values, strict=True):
        after, origin = [math.inf] * levels, [0] * levels
        for place, ((i, j), each) in enumerate(zip(stage.pairs, value.tolist(), strict=True)):
            total = best[i] + each
            if total < after[j]:
                after[j], origin[j] = total, place
        best = after
        origins.append(origin)
    level = min(range(levels), key=best.__getitem__)
    found = best[level]
    if places is None or not math.isfinite(found):
        return found, []
    choices: list[Choice] = []
    for stage, row, option in zip(
        reversed(stages), reversed(origins), reversed(places), strict=True
    ):
        pair = row[level]
        choices.append((pair, int(option[pair])))
        level = stage.pairs[pair][0]
    return found, choices[::-1]


@dataclass(frozen=True)
class _Column:
    """The options of a pair of levels that no other one beats: bins, losses, original places."""

    bins: Counts
    losses: Numbers
    places: Counts


def _column(times: Numbers, losses: Numbers, unit: float, most: int) -> _Column | None:
    """Round the times of one pair up to whole bins, and leave out what cannot be chosen."""
    possible = np.isfinite(times) & np.isfinite(losses)
    places = np.nonzero(possible)[0]
    bins = np.ceil(times[places] / unit - TOLERANCE).astype(np.int64)
    short = bins <= most
    places, bins = places[short], bins[short]
    if not len(places):
        return None
    order = np.lexsort((losses[places], bins))
    places, bins = places[order], bins[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(losses[places])[:-1]])
    better = losses[places] < before
    return _Column(bins[better], losses[places][better], places[better])


def _programme(stages: Sequence[Stage], budget: float, bins: int) -> Plan | None:
    """The dynamic programme; rounding may leave up to a bin a stage, which is searched, too."""
    unit = budget / bins if budget > 0 else 1.0
    most = bins + len(stages)
    levels = _levels(stages)
    best = np.full((levels, most + 1), np.inf)
    best[0] = 0.0
    tables = []
    for stage in stages:
        best, table = _step(stage, best, unit, most)
        tables.append(table)
    last = best.min(axis=0)
    # Beyond the budget the rounded times exceed it, and the times themselves perhaps do not.
    for limit in range(most, bins - 1, -1):
        if not math.isfinite(last[limit]):
            return None
        if limit > bins and last[limit] >= last[bins]:
            continue
        plan = plan_of(stages, _traced(stages, tables, best, limit))
        if plan.time <= budget * (1 + TOLERANCE):
            return plan
    return None


# For each level and time: the pair, the option, and the bins of the option.
_Table = tuple[Counts, Counts, Counts]


def _step(stage: Stage, before: Numbers, unit: float, most: int) -> tuple[Numbers, _Table]:
    """The least losses behind a stage, (levels, bins), and where each comes from."""
    after = np.full(before.shape, np.inf)
    pairs, options, used = (np.zeros(before.shape, dtype=np.int64) for _ in range(3))
    for place, (i, j) in enumerate(stage.pairs):
        if not np.isfinite(before[i, most]):
            continue
        column = _column(stage.times[place], stage.losses[place], unit, most)
        if column is None:
            continue
        longest = int(column.bins.max())
        padded = np.concatenate([np.full(longest, np.inf), before[i]])
        shifted = np.lib.stride_tricks.sliding_window_view(padded, most + 1)
        reached = shifted[longest - column.bins] + column.losses[:, None]
        option = reached.argmin(axis=0)
        value = np.take_along_axis(reached, option[None], axis=0)[0]
        better = value < after[j]
        after[j][better] = value[better]
        pairs[j][better] = place
        options[j][better] = column.places[option][better]
        used[j][better] = column.bins[option][better]
    return after, (pairs, options, used)


def _traced(
    stages: Sequence[Stage], tables: Sequence[_Table], best: Numbers, limit: int
) -> list[Choice]:
    level = int(best[:, limit].argmin())
    found: list[Choice] = []
    for stage, (pairs, options, used) in zip(reversed(stages), reversed(tables), strict=True):
        pair = int(pairs[level, limit])
        found.append((pair, int(options[level, limit])))
        limit -= int(used[level, limit])
        level = stage.pairs[pair][0]
    return found[::-1]


def _filled(stages: Sequence[Stage], plan: Plan, budget: float) -> Plan:
    """Spend the time that is left on the options that gain most for it, on the same tokens."""
    choices = list(plan.choices)
    while True:
        left = budget * (1 + TOLERANCE) - plan_of(stages, choices).time
        best: tuple[float, int, Choice] | None = None
        for number, (stage, (pair, option)) in enumerate(zip(stages, choices, strict=True)):
            extra = stage.times[pair] - stage.times[pair, option]
            gain = stage.losses[pair, option] - stage.losses[pair]
            fits = (gain > 0) & (extra <= left)
            if not fits.any():
                continue
            rate = np.where(fits, gain / np.maximum(extra, 1e-12 * max(budget, 1e-12)), -np.inf)
            place = int(rate.argmax())
            if best is None or rate[place] > best[0]:
                best = float(rate[place]), number, (pair, place)
        if best is None:
            return plan_of(stages, choices)
        choices[best[1]] = best[2]
