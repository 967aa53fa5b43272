"""Statistics derived from latency samples: percentiles, spread and intervals.

Samples of one machine are not independent: other processes slow a whole stretch of them. Where the
turn of each sample is known, whole turns are resampled (block bootstrap), so that the interval
includes the machine's slow variation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
FEWEST_TURNS = 10
RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """Statistics of latency samples in seconds.

    `spread` is the distance between the quartiles over the median; `throughput_per_s` counts
    images.
    """

    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    mean_s: float
    min_s: float
    max_s: float
    spread: float
    throughput_per_s: float


def summarise(latency_s: Sequence[float], *, batch: int = 1) -> Summary:
    """Return percentiles (linear between neighbours), mean, spread and throughput.

    Raises ValueError without a sample.
    """
    samples = _array(latency_s)
    p25, p50, p75, p90, p99 = (
        float(value) for value in np.percentile(samples, [25, 50, 75, 90, 99])
    )
    mean = float(samples.mean())
    return Summary(
        count=len(samples),
        p50_s=p50,
        p90_s=p90,
        p99_s=p99,
        mean_s=mean,
        min_s=float(samples.min()),
        max_s=float(samples.max()),
        spread=(p75 - p25) / p50,
        throughput_per_s=batch / mean,
    )


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper bound at the confidence level `level`."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width over the estimate: 0.01 is "± 1 %"."""
        return (self.high - self.low) / 2 / self.estimate


def median_interval(
    latency_s: Sequence[float],
    turns: Sequence[int] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the bootstrap interval of the median.

    Args:
        latency_s: Samples in seconds.
        turns: How many of the samples each turn took, in order.
        level: Confidence level.
        seed: Seed of the resampling.
    """
    samples = _array(latency_s)
    blocks = _blocks(samples, turns)
    medians = _resampled_medians(blocks, _draw(len(blocks), seed))
    return _interval(float(np.median(samples)), medians, level)


def ratio_interval(
    numerator_s: Sequence[float],
    denominator_s: Sequence[float],
    numerator_turns: Sequence[int] | None = None,
    denominator_turns: Sequence[int] | None = None,
    *,
    paired: bool = False,
    level: float = 0.99,
    seed: int = 0,
) -> Interval:
    """Return the percentile-bootstrap interval of median(numerator) / median(denominator).

    With `paired` the estimate is the interquartile mean of the rounds' log ratios of medians: each
    round is compared with its own partner, so a difference shows even where the machine drifts by
    far more.

    Args:
        numerator_s: Samples in seconds.
        denominator_s: Samples in seconds.
        numerator_turns: How many of the samples each turn took, in order.
        denominator_turns: The same of the denominator.
        paired: Whether turn i of both belongs to the same round.
        level: Confidence level.
        seed: Seed of the resampling.
    """
    top, bottom = _array(numerator_s), _array(denominator_s)
    if (
        paired
        and numerator_turns
        and denominator_turns
        and len(numerator_turns) == len(denominator_turns) >= FEWEST_TURNS
    ):
        logs = np.log(turn_medians(numerator_s, numerator_turns)) - np.log(
            turn_medians(denominator_s, denominator_turns)
        )
        ratios = np.exp(_interquartile_mean(logs[_draw(len(logs), seed)]))
        return _interval(float(np.exp(_interquartile_mean(logs[None])[0])), ratios, level)
    top_blocks, bottom_blocks = _blocks(top, numerator_turns), _blocks(bottom, denominator_turns)
    top_medians = _resampled_medians(top_blocks, _draw(len(top_blocks), seed))
    bottom_medians = _resampled_medians(bottom_blocks, _draw(len(bottom_blocks), seed + 1))
    return _interval(float(np.median(top) / np.median(bottom)), top_medians / bottom_medians, level)


def rank_sum_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p value of the Mann-Whitney U test.

    The null hypothesis is that both samples come from one distribution. The normal approximation is
    used, and ties are corrected.
    """
    a, b = _array(first), _array(second)
    n, m = len(a), len(b)
    ranks, ties = _ranks(np.concatenate([a, b]))
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * ((total + 1) - ties / (total * (total - 1))) if total > 1 else 0.0
    return _two_sided(u - n * m / 2, variance)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test.

    The null hypothesis is that the median of the paired differences is zero. The normal
    approximation is used, and ties are corrected.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]
    n = len(values)
    if n == 0:
        return 1.0
    ranks, ties = _ranks(np.abs(values))
    variance = n * (n + 1) * (2 * n + 1) / 24 - ties / 48
    return _two_sided(float(ranks[values > 0].sum()) - n * (n + 1) / 4, variance)


def turn_medians(latency_s: Sequence[float], turns: Sequence[int]) -> list[float]:
    """Return the median of every turn, in order."""
    return [float(np.median(block)) for block in _split(_array(latency_s), turns)]


def _array(samples: Sequence[float]) -> Samples:
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError("a statistic needs at least one sample")
    return array


def _split(samples: Samples, turns: Sequence[int]) -> list[Samples]:
    if sum(turns) != len(samples) or min(turns, default=0) < 1:
        raise ValueError(f"the turns hold {sum(turns)} samples, but there are {len(samples)}")
    return np.split(samples, np.cumsum(turns)[:-1])


def _blocks(samples: Samples, turns: Sequence[int] | None) -> list[Samples]:
    # A block bootstrap needs more than a handful of turns; single samples are resampled instead.
    if turns is None or len(turns) < FEWEST_TURNS:
        return [samples[i : i + 1] for i in range(len(samples))]
    return _split(samples, turns)


def _draw(blocks: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(blocks, size=(RESAMPLES, blocks))


def _resampled_medians(blocks: list[Samples], draw: NDArray[np.int64]) -> Samples:
    if len({len(block) for block in blocks}) == 1:
        table = np.stack(blocks)
        # A few rows at a time: 2,000 resamples of thousands of samples would fill a small machine.
        step = max(1, 2_000_000 // table.size)
        parts = [
            np.median(table[rows].reshape(len(rows), -1), axis=1)
            for rows in np.array_split(draw, max(1, math.ceil(len(draw) / step)))
        ]
        return np.concatenate(parts)
    return np.array([np.median(np.concatenate([blocks[i] for i in row])) for row in draw])


def _interquartile_mean(rows: Samples) -> Samples:
    """Return the mean of each row without its lowest and highest quarter.

    It is nearly as precise as the mean, and robust to a few disturbed rounds.
    """
    ordered = np.sort(rows, axis=1)
    cut = ordered.shape[1] // 4
    return np.asarray(ordered[:, cut : ordered.shape[1] - cut].mean(axis=1))


def _interval(estimate: float, resampled: Samples, level: float) -> Interval:
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high), level)


def _ranks(values: Samples) -> tuple[Samples, float]:
    """Return average ranks from 1, and the sum of t³ − t over groups of t equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    average = last - (counts - 1) / 2
    ties = float((counts.astype(np.float64) ** 3 - counts).sum())
    return average[inverse.reshape(-1)], ties


def _two_sided(distance: float, variance: float) -> float:
    if variance <= 0:
        return 1.0
    # The continuity correction of half a rank.
    z = max(0.0, abs(distance) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))
