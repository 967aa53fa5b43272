"""A latency as the price of units: exact for the cut network, never above the budget, in tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latency_tables import COSTS, latency_table
from random_networks import architectures, selecting_architectures
from tiny_models import tiny_vit
from torch import Tensor
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget, DualSolver, dense_cost
from vitrim.compress.masks.gates import Gates
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.live_latency import NS_PER_MS, LatencyCost
from vitrim.compress.surgery.plan import plan
from vitrim.core.errors import InputError
from vitrim.targets.cost_parts import SELECT_PARTS
from vitrim.targets.cost_table import Correction

TABLE = latency_table(correction=Correction(scale=1.2, offset_ms=0.003))
MODEL = lift(tiny_vit(embed_dim=48, num_heads=4)).architecture.model_copy(
    update={"last_queries": True}
)
# A network of four blocks with 16 patches, whose tokens are learned.
DEEP = lift(tiny_vit(embed_dim=32, num_heads=4, patch_size=4, depth=3)).architecture.model_copy(
    update={"last_queries": True}
)


def drawn(gates: Gates, seed: int) -> list[Tensor]:
    """Units kept at random, at least one of each group, nested where they are tokens."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for group in gates.groups:
        units = torch.rand(len(group.members), generator=generator) < 0.6
        units[int(torch.randint(len(units), (1,), generator=generator))] = True
        kept.append(group.spread(units))
    return gates.nested(kept)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.one_of(architectures(countable=True), selecting_architectures(countable=True)),
    seed=st.integers(0, 99),
    removes=st.booleans(),
)
def test_the_live_latency_is_that_of_the_cut_network(
    architecture: Architecture, seed: int, removes: bool
) -> None:
    architecture = architecture.model_copy(update={"last_queries": True})
    tokens = not architecture.selects and architecture.pool.kind != "none"
    gates = Gates(architecture, "residual", tokens=tokens)
    if removes and not architecture.selects and len(architecture.branches) > 1:
        gates.remove_branch(architecture.branches[seed % len(architecture.branches)].name)
    kept = drawn(gates, seed)
    found = LatencyCost(TABLE).latency_ms(architecture, gates.counter(kept))
    cut = plan(architecture, gates.mask(kept)).architecture
    assert found == pytest.approx(TABLE.latency_ms(network_shape(cut)))


def priced(architecture: Architecture, seed: int, **options: Any) -> DualSolver:
    """A solver with random saliencies."""
    gates = Gates(architecture, "residual", **options)
    solver = DualSolver(architecture, gates, LatencyCost(TABLE))
    generator = torch.Generator().manual_seed(seed)
    solver.observe([torch.randn(group.size, generator=generator) for group in gates.groups])
    return solver


@settings(max_examples=12)
@given(ratio=st.floats(0.45, 0.98), seed=st.integers(0, 99), tokens=st.booleans())
def test_the_budget_is_never_exceeded_by_the_table(ratio: float, seed: int, tokens: bool) -> None:
    architecture = DEEP if tokens else MODEL
    solver = priced(architecture, seed, tokens=tokens)
    target = int(ratio * dense_cost(architecture, LatencyCost(TABLE)))
    kept = solver.gates.kept()
    for _ in range(4):
        kept = solver.solve(kept, target)
    cut = plan(architecture, solver.gates.mask(kept)).architecture
    spent_ms = TABLE.latency_ms(network_shape(cut))
    assert NS_PER_MS * spent_ms <= target
    assert NS_PER_MS * spent_ms >= 0.9 * target


def test_a_unit_costs_its_share_of_a_tile_of_columns() -> None:
    table = latency_table(tile=16, costs_ms=dict.fromkeys(COSTS, 0.0) | {"ffn products": 1e-3})
    gates = Gates(MODEL, "residual", fixed=("embed", "head", "qk", "v"))
    solver = DualSolver(MODEL, gates, LatencyCost(table))
    [first, last] = solver.marginal_costs([torch.arange(192) < 100, torch.arange(192) < 97])
    tokens, embed = MODEL.tokens, 48
    # 100 columns count as 112, and 84 as 96; the last block computes one token.
    product = 16 * embed + 16 * embed
    assert first == pytest.approx(1e-3 * NS_PER_MS * tokens * product / 16, abs=2)
    assert last == pytest.approx(first / tokens, abs=2)
    # One unit alone saves a row of the second product, and no column of the first.
    kept = [torch.arange(192) < 100, torch.arange(192) < 97]
    one_less = [torch.arange(192) < 99, torch.arange(192) < 97]
    steps = solver.cost(kept) - solver.cost(one_less)
    assert steps == pytest.approx(1e-3 * NS_PER_MS * tokens * embed, abs=2)


def test_a_latency_and_a_cost_table_need_each_other() -> None:
    for kind, table in (("latency", None), ("macs", TABLE)):
        with pytest.raises(InputError, match="a latency and a cost table need each other"):
            Budget(kind, 0.5, table)  # type: ignore[arg-type]
    assert isinstance(Budget("latency", 0.5, TABLE).cost, LatencyCost)
    assert not latency_table(costs_ms={"call": 1.0}).prices_selections
    assert all(TABLE.costs_ms[part] for part in SELECT_PARTS)
