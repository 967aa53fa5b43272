"""Costs on live widths are what the surgery then builds, to the last parameter and multiply-add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import architectures
from tiny_models import tiny_vit
from vitrim.compress.lift import lift
from vitrim.compress.masks.gates import Gates
from vitrim.compress.masks.groups import sites
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.network.architecture import Architecture, AttentionSpec, BranchSpec, Indices
from vitrim.compress.network.cost import Live, live_cost, live_macs, live_params, movement_cost
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.surgery.compactor import compact
from vitrim.compress.surgery.plan import plan

NAMES = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sharing", ["residual", "full"])
@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(0.1, 1.0), seed=st.integers(0, 99), last_queries=st.booleans())
def test_live_cost_is_the_cost_of_the_cut_model(
    name: str, sharing: str, ratio: float, seed: int, last_queries: bool
) -> None:
    dense = lift(tiny_vit(name, init_values=0.5))
    gates = Gates(dense.architecture, sharing)  # type: ignore[arg-type]
    mask = StructuredMask.random(dense, ratio, sharing, seed)  # type: ignore[arg-type]
    kept = [mask.kept[group.dimension][group.site] for group in gates.groups]
    cut = compact(dense, mask, last_queries=last_queries).architecture
    source = dense.architecture.model_copy(update={"last_queries": last_queries})
    assert live_cost(source, gates.counter(kept), "params") == count_params(cut)
    assert live_cost(source, gates.counter(kept), "macs") == count_macs(cut)


def test_movement_cost_is_the_sources_equation() -> None:
    """METHODS A, by hand: width 24, 3 heads of 8, FFN 96, 2 blocks, patch 8 x 8 of 3 channels, 5
    classes.
    """
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


def grouped(data: st.DataObject, architecture: Architecture) -> Architecture:
    """The same network with queries grouped in any way, where its attentions may have shared keys
    and values.
    """

    def regrouped(branch: BranchSpec) -> BranchSpec:
        core = branch.core
        if (
            not isinstance(core, AttentionSpec)
            or core.differential is not None
            or data.draw(st.booleans())
        ):
            return branch
        drawn = data.draw(
            st.lists(st.integers(0, core.heads - 1), min_size=core.heads, max_size=core.heads)
        )
        order = list(dict.fromkeys(drawn))
        return branch.model_copy(
            update={
                "core": core.model_copy(
                    update={"kv_of": tuple(order.index(group) for group in drawn)}
                )
            }
        )

    steps = tuple(tuple(regrouped(branch) for branch in step) for step in architecture.steps)
    return Architecture.model_validate(
        architecture.model_copy(update={"steps": steps}).model_dump(by_alias=True)
    )


@pytest.mark.parametrize("cost", [live_params, live_macs, movement_cost])
def test_the_slope_at_a_head_is_what_the_head_alone_decides(
    cost: Callable[[Architecture, Live], Any],
) -> None:
    """Queries in groups of two and of four: a head whose neighbours live takes no keys and values
    with it, the last one of a group does.
    """
    source = lift(
        tiny_vit(
            "vit_base_patch16_sapiens2",
            embed_dim=48,
            num_heads=4,
            num_kv_heads=(2, 1),
            qk_norm=True,
        )
    ).architecture
    assert [
        branch.core.kv_of for branch in source.branches if isinstance(branch.core, AttentionSpec)
    ] == [(0, 0, 1, 1), (0, 0, 0, 0)]
    gates = Gates(source, "residual")
    heads = [number for number, group in enumerate(gates.groups) if group.dimension == "head"]
    with torch.no_grad():
        for number in heads:
            gates.scores[number][0] = 0.0
    gates.begin()
    cost(source, gates.live).backward()
    kept = gates.kept()
    for number in heads:
        found = gates.scores[number].grad
        assert found is not None
        for head in range(4):
            without, with_it = ([keep.clone() for keep in kept] for _ in range(2))
            without[number][head], with_it[number][head] = False, True
            assert float(found[head]) == cost(source, gates.counter(with_it)) - cost(
                source, gates.counter(without)
            )
    # Head 0 of the first block has gone, so its neighbour alone keeps the group's keys and values.
    slopes = gates.scores[heads[0]].grad
    assert slopes is not None
    assert slopes[1] > slopes[2] == slopes[3]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_live_cost_of_any_kind_of_network(data: st.DataObject) -> None:
    """All but what live counts cannot tell: heads padded to one width, channels that nobody
    reads.
    """
    architecture = grouped(data, data.draw(architectures(countable=True)))
    mask = StructuredMask.random(
        architecture, data.draw(st.sampled_from([0.3, 0.6, 1.0])), "residual"
    )

    def live(dimension: str, site: str, indices: Indices | None) -> int:
        keep = mask.get(dimension, site)
        if dimension == "head" and indices is not None:
            return len(indices) if keep is None else int(keep[list(indices)].sum())
        return sites(architecture, dimension)[site] if keep is None else int(keep.sum())

    built = plan(architecture, mask).architecture
    assert live_cost(architecture, live, "params") == count_params(built)
    assert live_cost(architecture, live, "macs") == count_macs(built)
