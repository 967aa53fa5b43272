"""Claims of publications, each tested on the runs of a study by an exact test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95


@dataclass(frozen=True)
class Finding:
    """One claim of a publication, and what the runs of a study show.

    Attributes:
        claim: The claim as a sentence.
        source: The publication.
        number: What was measured here, in `unit`; None: no run allows to measure it.
        interval: Its 95 % interval in `unit`; None: too few runs for one.
        holds: Whether the claim holds here; None: these runs do not decide it.
        unit: E.g. "points" for differences of accuracies in percent.
        note: What `number` is of, how many runs or pairs, and the test.
    """

    claim: str
    source: str
    number: float | None
    interval: tuple[float, float] | None
    holds: bool | None
    unit: str = "points"
    note: str = ""


@dataclass(frozen=True)
class Differences:
    """Paired differences, with the exact tests of them.

    Attributes:
        count: Their number.
        median: The Hodges-Lehmann estimate: the median of the means of all pairs of differences.
        interval: The 95 % interval of it, from Wilcoxon's signed-rank distribution; None for fewer
            than six differences, which allow none.
        above: How many are above zero.
        below: How many are below zero.
        p: The two-sided p value of the signed-rank test.

    References:
        Hollander, Wolfe, Chicken 2014, "Nonparametric Statistical Methods", section 3.1 to 3.3.
    """

    count: int
    median: float
    interval: tuple[float, float] | None
    above: int
    below: int
    p: float

    @property
    def holds(self) -> bool | None:
        """Whether the differences are above zero; None where their interval contains zero."""
        if self.interval is None or self.interval[0] <= 0.0 <= self.interval[1]:
            return None
        return self.interval[0] > 0.0

    @property
    def note(self) -> str:
        """The number of pairs and the test in one line."""
        return f"{self.count} pairs, {self.above} above zero, signed-rank p = {self.p:.2g}"


def paired(differences: Sequence[float]) -> Differences | None:
    """Summarise paired differences without assuming a distribution other than a symmetric one.

    Args:
        differences: One for each pair, e.g. of the runs of two methods with equal other settings.

    Returns:
        The estimate, its interval and the tests; None without a difference.
    """
    values = [float(value) for value in differences]
    if not values:
        return None
    walsh = sorted(
        0.5 * (one + other) for place, one in enumerate(values) for other in values[place:]
    )
    least = _lowest_rank(len(values))
    interval = None if least is None else (walsh[least - 1], walsh[-least])
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return Differences(
        len(values), _median(walsh), interval, above, below, exact_signed_rank_p(values)
    )


def of_differences(
    claim: str,
    source: str,
    found: Differences | None,
    note: str,
    rule: Callable[[Differences], bool | None] = lambda found: found.holds,
) -> Finding:
    """The finding of paired differences in points.

    Args:
        claim: The claim as a sentence.
        source: The publication.
        found: The differences; None: there is no pair.
        note: What they are of.
        rule: Whether the claim holds for differences with an interval (default: above zero).

    Returns:
        The finding, undecided without an interval.
    """
    if found is None:
        return Finding(claim, source, None, None, None, note=note)
    holds = None if found.interval is None else rule(found)
    return Finding(claim, source, found.median, found.interval, holds, note=f"{note}: {found.note}")


def exact_signed_rank_p(differences: Sequence[float]) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test, over all signs of the differences.

    Zeros are left out, equal differences have their mean rank.
    """
    values = [value for value in differences if value != 0]
    ordered = sorted(map(abs, values))
    # Twice the mean rank, a whole number: ranks first + 1 to first + count.
    doubled = {value: 2 * ordered.index(value) + 1 + ordered.count(value) for value in ordered}
    ranks = [doubled[abs(value)] for value in values]
    chances = _sum_chances(ranks)
    observed = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    tail = min(float(chances[: observed + 1].sum()), float(chances[observed:].sum()))
    return min(1.0, 2.0 * tail)


def share_interval(hits: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a share.

    Args:
        hits: How many of them.
        count: Of how many, at least one.
        level: The confidence level.

    Returns:
        The lowest and the highest share, 0 to 1.
    """
    tail = 0.5 * (1.0 - level)
    # P(X >= hits) and P(X <= hits) are monotonic in the share.
    low = 0.0 if not hits else _root(lambda share: _at_least(hits, count, share) - tail)
    high = 1.0
    if hits < count:
        high = _root(lambda share: tail - (1.0 - _at_least(hits + 1, count, share)))
    return low, high


def _at_least(hits: int, count: int, share: float) -> float:
    return sum(
        math.comb(count, number) * share**number * (1.0 - share) ** (count - number)
        for number in range(hits, count + 1)
    )


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return 0.5 * (low + high)


def _sum_chances(ranks: Sequence[int]) -> NDArray[np.float64]:
    """The probability of each sum from 0 of the ranks of positive differences, by random signs."""
    chances = np.zeros(sum(ranks) + 1)
    chances[0] = 1.0
    for rank in ranks:
        chances[rank:] = 0.5 * (chances[rank:] + chances[:-rank])
        chances[:rank] *= 0.5
    return chances


def _lowest_rank(count: int) -> int | None:
    """The place of the lower end of the interval in the sorted means of pairs, from 1."""
    tails = np.cumsum(_sum_chances(range(1, count + 1)))
    return int(np.searchsorted(tails, 0.5 * (1.0 - LEVEL), side="right")) or None


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
