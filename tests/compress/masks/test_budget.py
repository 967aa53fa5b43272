"""Budgets are met to the unit, best units first, and refused when no mask meets them."""

from __future__ import annotations

import itertools

import pytest
import torch
import vitrim
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_vit
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import (
    Budget,
    DualSolver,
    dense_cost,
    ramp,
    require_feasible,
    smallest_ratio,
)
from vitrim.compress.masks.gates import Gates
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.surgery.compactor import compact

MODEL = lift(tiny_vit(embed_dim=48, num_heads=4))


@settings(max_examples=20)
@given(
    ratio=st.floats(0.12, 0.95), seed=st.integers(0, 99), kind=st.sampled_from(["params", "macs"])
)
def test_a_budget_is_met_within_one_percent_from_below(ratio: float, seed: int, kind: str) -> None:
    gates = Gates(MODEL.architecture, "residual")
    solver = DualSolver(MODEL.architecture, gates, kind)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    solver.observe([torch.randn(group.size, generator=generator) for group in gates.groups])
    target = int(ratio * dense_cost(MODEL.architecture, kind))  # type: ignore[arg-type]
    kept = gates.kept()
    for _ in range(6):
        kept = solver.solve(kept, target)
    built = compact(MODEL, gates.mask(kept)).architecture
    spent = count_params(built) if kind == "params" else count_macs(built)
    assert 0.99 * target <= spent <= target


def test_within_a_group_the_more_salient_units_stay() -> None:
    gates = Gates(MODEL.architecture, "residual", fixed=("embed", "head", "qk", "v"))
    solver = DualSolver(MODEL.architecture, gates, "params")
    solver.observe([torch.arange(1.0, group.size + 1) for group in gates.groups])
    kept = solver.solve(gates.kept(), int(0.6 * dense_cost(MODEL.architecture, "params")))
    for keep in kept:
        assert bool(keep[-int(keep.sum()) :].all())


def test_an_infeasible_budget_is_refused_with_the_smallest_feasible_one() -> None:
    gates = Gates(MODEL.architecture, "residual", fixed=("embed",))
    least = smallest_ratio(MODEL.architecture, gates, "params")
    with pytest.raises(
        vitrim.InputError,
        match=r"budget params = 0.001: not feasible; .* with embed fixed the smallest is 0\.\d+",
    ):
        require_feasible(MODEL.architecture, gates, Budget("params", 0.001))
    require_feasible(MODEL.architecture, gates, Budget("params", least + 1e-4))


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_budget_is_a_share(ratio: float) -> None:
    with pytest.raises(vitrim.InputError, match="give the share to keep, above 0 and at most 1"):
        Budget("params", ratio)


def test_the_ramp_starts_whole_and_ends_at_the_budget() -> None:
    shares = [ramp(step, 10, 60, 0.3) for step in range(100)]
    assert shares[:11] == [1.0] * 11
    assert shares[60:] == [pytest.approx(0.3)] * 40
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares))
