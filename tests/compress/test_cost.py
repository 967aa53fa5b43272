"""Costs on live widths are what the surgery then builds, to the last parameter and multiply-add."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import architectures
from tiny_models import tiny_vit
from vitrim.compress.architecture import Indices
from vitrim.compress.compactor import compact
from vitrim.compress.cost import live_cost, movement_cost
from vitrim.compress.count import count_macs, count_params
from vitrim.compress.gates import Gates
from vitrim.compress.lift import lift
from vitrim.compress.mask import StructuredMask, sites
from vitrim.compress.plan import plan

NAMES = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sharing", ["residual", "full"])
@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(0.1, 1.0), seed=st.integers(0, 99), last_queries=st.booleans())
def test_live_cost_is_the_cost_of_the_cut_model(name: str, sharing: str, ratio: float, seed: int, last_queries: bool) -> None:
    dense = lift(tiny_vit(name, init_values=0.5))
    gates = Gates(dense.architecture, sharing)  # type: ignore[arg-type]
    mask = StructuredMask.random(dense, ratio, sharing, seed)  # type: ignore[arg-type]
    kept = [mask.kept[group.dimension][group.site] for group in gates.groups]
    cut = compact(dense, mask, last_queries=last_queries).architecture
    source = dense.architecture.model_copy(update={"last_queries": last_queries})
    assert live_cost(source, gates.counter(kept), "params") == count_params(cut)
    assert live_cost(source, gates.counter(kept), "macs") == count_macs(cut)


def test_movement_cost_is_the_sources_equation() -> None:
    """METHODS A, by hand: width 24, 3 heads of 8, FFN 96, 2 blocks, patch 8 x 8 of 3 channels, 5 classes."""
    architecture = lift(tiny_vit()).architecture
    gates = Gates(architecture, "residual")
    gates.begin()
    attention = 24 * 3 * (2 * 8 + 8) + (3 * 8 + 1) * 24
    ffn = (24 + 1) * 96 + (96 + 1) * 24
    expected = (3 * 64 + 1) * 24 + 2 * (attention + ffn + 2 * 2 * 24) + 2 * 24 + (24 + 1) * 5
    assert float(movement_cost(architecture, gates.live).detach()) == expected


def test_input_widths_are_the_live_ones() -> None:
    """Half of the residual stream gone halves what a query column costs: its gradient says so."""
    architecture = lift(tiny_vit()).architecture
    gates = Gates(architecture, "residual")
    embed = next(number for number, group in enumerate(gates.groups) if group.dimension == "embed")
    column = next(number for number, group in enumerate(gates.groups) if group.dimension == "qk")

    def price_of_a_column() -> float:
        gates.zero_grad()
        gates.begin()
        movement_cost(architecture, gates.live).backward()
        gradient = gates.scores[column].grad
        assert gradient is not None
        return float(gradient[0])

    whole = price_of_a_column()
    with torch.no_grad():
        gates.scores[embed][:12] = 0.0
    assert price_of_a_column() == whole / 2 == 2 * 12 * 3


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_live_cost_of_any_kind_of_network(data: st.DataObject) -> None:
    """All but what live counts cannot tell: keys that heads share, heads padded to one width, channels that nobody reads."""
    architecture = data.draw(architectures(countable=True))
    mask = StructuredMask.random(architecture, data.draw(st.sampled_from([0.3, 0.6, 1.0])), "residual")

    def live(dimension: str, site: str, indices: Indices | None) -> int:
        keep = mask.get(dimension, site)
        return sites(architecture, dimension)[site] if keep is None else int(keep.sum())

    built = plan(architecture, mask).architecture
    assert live_cost(architecture, live, "params") == count_params(built)
    assert live_cost(architecture, live, "macs") == count_macs(built)
