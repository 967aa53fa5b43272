"""Exact tests of paired differences and of shares, against the tables that books print."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrim.pipeline.studies.findings import exact_signed_rank_p, paired, share_interval

DIFFERENCES = st.lists(st.integers(-5, 5), min_size=1, max_size=9)


@given(DIFFERENCES)
def test_the_p_value_is_that_of_all_signs(differences: list[int]) -> None:
    values = [value for value in differences if value]
    ordered = sorted(map(abs, values))
    ranks = [ordered.index(abs(v)) + (ordered.count(abs(v)) + 1) / 2 for v in values]
    observed = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((False, True), repeat=len(ranks))
    ]
    lower, upper = (sum(s <= observed for s in sums), sum(s >= observed for s in sums))
    expected = min(1.0, 2 * min(lower, upper) / len(sums))
    assert exact_signed_rank_p(differences) == pytest.approx(expected)


@given(DIFFERENCES)
def test_the_estimate_lies_in_its_interval_and_changes_sign_with_the_differences(
    differences: list[int],
) -> None:
    found = paired(differences)
    opposite = paired([-value for value in differences])
    assert found is not None
    assert opposite is not None
    assert opposite.median == pytest.approx(-found.median)
    assert (found.interval is None) == (len(differences) < 6)
    if found.interval is not None and opposite.interval is not None:
        low, high = found.interval
        assert low <= found.median <= high
        assert opposite.interval == pytest.approx((-high, -low))


def test_the_interval_has_the_places_of_the_printed_table() -> None:
    # Ten differences: the tail of 8 has the probability 0.0244, so that the ninth mean is the end.
    values = [float(2**place) for place in range(10)]
    means = sorted(0.5 * (a + b) for i, a in enumerate(values) for b in values[i:])
    found = paired(values)
    assert found is not None
    assert found.interval == (means[8], means[-9])
    assert found.p == pytest.approx(2 / 2**10)
    assert found.holds is True


def test_few_or_mixed_differences_decide_nothing() -> None:
    few, mixed, opposed = paired([1.0] * 5), paired([1.0, -1.0] * 5), paired([-1.0] * 8)
    assert few is not None
    assert few.holds is None
    assert mixed is not None
    assert mixed.holds is None
    assert opposed is not None
    assert opposed.holds is False
    assert paired([]) is None


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129), (1, 20, 0.0013, 0.2487)],
)
def test_the_interval_of_a_share_is_clopper_and_pearsons(
    hits: int, count: int, low: float, high: float
) -> None:
    assert share_interval(hits, count) == pytest.approx((low, high), abs=5e-5)
