"""Statistics of injected samples; nothing is timed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrim.bench.results.statistics import (
    median_interval,
    rank_sum_p,
    ratio_interval,
    signed_rank_p,
    summarise,
    turn_medians,
)

latencies = st.lists(st.floats(1e-5, 10.0), min_size=1, max_size=40)


@given(latencies)
def test_percentiles_are_ordered_and_inside_the_samples(samples: list[float]) -> None:
    summary = summarise(samples)
    assert (
        min(samples)
        == summary.min_s
        <= summary.p50_s
        <= summary.p90_s
        <= summary.p99_s
        <= summary.max_s
        == max(samples)
    )
    assert summary.min_s * (1 - 1e-9) <= summary.mean_s <= summary.max_s * (1 + 1e-9)
    assert summary.count == len(samples)


def test_throughput_counts_images_not_calls() -> None:
    assert summarise([0.5, 0.5], batch=4).throughput_per_s == pytest.approx(8.0)


def test_statistics_need_at_least_one_sample() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        summarise([])


@given(latencies, st.floats(0.1, 10.0))
def test_the_ratio_of_scaled_samples_is_the_scale(samples: list[float], scale: float) -> None:
    interval = ratio_interval([value * scale for value in samples], samples)
    assert interval.estimate == pytest.approx(scale)
    assert interval.low <= interval.estimate * (1 + 1e-9)
    assert interval.high >= interval.estimate * (1 - 1e-9)


def test_paired_rounds_cancel_a_machine_that_drifts() -> None:
    rng = np.random.default_rng(1)
    drift = np.repeat(np.linspace(1.0, 2.0, 20), 5)
    slow = 1.10 * drift * rng.lognormal(0, 0.01, 100)
    fast = drift * rng.lognormal(0, 0.01, 100)
    turns = [5] * 20
    paired = ratio_interval(slow.tolist(), fast.tolist(), turns, turns, paired=True)
    unpaired = ratio_interval(slow.tolist(), fast.tolist(), turns, turns)
    assert paired.low < 1.10 < paired.high
    assert paired.half_width < unpaired.half_width / 3


def test_the_interval_of_the_median_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = sum(
        interval.low <= 1.0 <= interval.high
        for interval in (median_interval(rng.lognormal(0, 0.1, 60).tolist()) for _ in range(100))
    )
    assert covered >= 88


def test_turns_of_unequal_length_are_resampled_whole() -> None:
    samples = [1.0] * 3 + [2.0] * 2 + [1.5] * 20
    turns = [3, 2] + [2] * 10
    interval = median_interval(samples, turns)
    assert interval.low <= interval.estimate == 1.5 <= interval.high
    assert turn_medians(samples, turns)[:2] == [1.0, 2.0]


def test_turns_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="the turns hold 3 samples, but there are 4"):
        turn_medians([1.0] * 4, [1, 2])


def test_rank_sum_gives_published_values() -> None:
    # Complete separation of 10 and 10 samples: U = 0, z = 49.5 / sqrt(175) = 3.742.
    assert rank_sum_p(range(10), range(10, 20)) == pytest.approx(0.000183, abs=2e-6)
    assert rank_sum_p([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0


def test_signed_rank_gives_published_values() -> None:
    # All of ten differences positive: W = 55, z = (27.5 - 0.5) / sqrt(96.25) = 2.752.
    assert signed_rank_p([float(i) for i in range(1, 11)]) == pytest.approx(0.00592, abs=2e-5)
    assert signed_rank_p([0.0, 0.0]) == 1.0


@given(latencies, latencies)
def test_p_values_are_probabilities_and_symmetric(first: list[float], second: list[float]) -> None:
    p = rank_sum_p(first, second)
    assert 0 <= p <= 1
    assert rank_sum_p(second, first) == pytest.approx(p)
