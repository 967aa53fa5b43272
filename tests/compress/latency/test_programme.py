"""The dynamic programme: within the budget, as good as brute force, and never worse than greedy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrim.compress.latency.programme import (
    Plan,
    Stage,
    least_time,
    lower_bound,
    plan_of,
    solve_quickly,
    solve_stages,
)


def stages(
    seed: int, count: int, levels: int, options: int, *, whole: bool, stem: bool = False
) -> list[Stage]:
    """Attentions, at which the token level may fall, and FFNs in turn; a stem before them."""
    rng = np.random.default_rng(seed)
    found = []
    if stem:
        falling = np.sort(20 * rng.random((levels, 1)), axis=0)[::-1]
        # What no choice changes is outside the chain.
        times = np.floor(falling) if whole else falling - falling[-1]
        pairs = tuple((0, j) for j in range(levels))
        found.append(Stage("stem", pairs, times, rng.random((levels, 1))))
    for number in range(count):
        mixes = number % 2 == 0
        pairs = tuple((i, j) for i in range(levels) for j in range(i, levels) if mixes or i == j)
        shape = (len(pairs), options)
        times = rng.integers(1, 20, shape).astype(float) if whole else 10 * rng.random(shape)
        if mixes:
            # The last option is the removed attention, at which no token leaves.
            times[:, -1] = [0.0 if i == j else np.inf for i, j in pairs]
        found.append(Stage(str(number), pairs, times, rng.random(shape)))
    return found


def every_plan(chain: Sequence[Stage]) -> list[Plan]:
    """All plans that connect the token levels."""
    choices = [
        [(pair, option) for pair in range(len(stage.pairs)) for option in range(len(stage.times.T))]
        for stage in chain
    ]
    found = []
    for chosen in itertools.product(*choices):
        levels = [stage.pairs[pair] for stage, (pair, _) in zip(chain, chosen, strict=True)]
        if [0, *(after for _, after in levels)][:-1] == [before for before, _ in levels]:
            found.append(plan_of(chain, chosen))
    return found


def greedy(chain: Sequence[Stage], budget: float) -> float:
    """The loss of going down from all tokens and the least losses, best step first."""
    choices = [(0, int(stage.losses[0].argmin())) for stage in chain]
    while plan_of(chain, choices).time > budget:
        steps = []
        for number, (stage, (pair, option)) in enumerate(zip(chain, choices, strict=True)):
            saved = stage.times[pair, option] - stage.times[pair]
            lost = stage.losses[pair] - stage.losses[pair, option]
            for place in np.nonzero(saved > 0)[0]:
                steps.append((lost[place] / saved[place], number, (pair, int(place))))
        if not steps:
            return math.inf
        _, number, choice = min(steps)
        choices[number] = choice
    return plan_of(chain, choices).loss


sizes = st.tuples(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 2), st.integers(2, 3))


@settings(max_examples=60)
@given(sizes, st.integers(1, 60), st.booleans())
def test_it_is_as_good_as_brute_force_where_times_are_whole_bins(
    size: tuple[int, int, int, int], budget: int, stem: bool
) -> None:
    chain = stages(*size, whole=True, stem=stem)
    losses = [plan.loss for plan in every_plan(chain) if plan.time <= budget]
    found = solve_stages(chain, float(budget), bins=budget)
    assert (found is None) == (not losses)
    if found is not None:
        assert found.loss == pytest.approx(min(losses))


@settings(max_examples=60)
@given(sizes, st.floats(0.05, 1.2), st.booleans())
def test_the_budget_holds_and_the_bound_is_one(
    size: tuple[int, int, int, int], share: float, stem: bool
) -> None:
    chain = stages(*size, whole=False, stem=stem)
    plans = every_plan(chain)
    budget = share * max(plan.time for plan in plans if math.isfinite(plan.time))
    within = [plan.loss for plan in plans if plan.time <= budget]
    found = solve_stages(chain, budget)
    if found is None:
        assert min(plan.time for plan in plans) > budget
        return
    assert found.time <= budget * (1 + 1e-8)
    assert found == plan_of(chain, found.choices)
    assert lower_bound(chain, budget) <= min(within) + 1e-9
    # Rounded times: as good as every plan that is a bin a sub-layer below the budget.
    least = [plan.loss for plan in plans if plan.time <= budget * (1 - len(chain) / 4000)]
    assert found.loss <= min(least, default=math.inf) + 1e-9
    quick = solve_quickly(chain, budget)
    assert quick is not None
    assert found.loss - 1e-9 <= quick.loss
    assert quick.time <= budget * (1 + 1e-8)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 12), st.floats(0.1, 1.0))
def test_it_is_never_worse_than_greedy(seed: int, count: int, options: int, share: float) -> None:
    chain = stages(seed, count, 2, options, whole=False)
    budget = share * sum(float(stage.times[0].max()) for stage in chain)
    found = solve_stages(chain, budget)
    assert (math.inf if found is None else found.loss) <= greedy(chain, budget) + 1e-9


def test_no_plan_fits_below_the_least_time() -> None:
    chain = stages(3, 2, 2, 3, whole=False)
    least = least_time(chain)
    assert least == pytest.approx(min(plan.time for plan in every_plan(chain)))
    assert solve_stages(chain, 0.99 * least) is None
    assert solve_stages(chain, 1.001 * least) is not None
    assert solve_stages(chain, -1.0) is None
    assert solve_quickly(chain, -1.0) is None
    assert lower_bound(chain, 0.5 * least) == math.inf
