"""Costs of live units equal the counts of the pruned model, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import architectures
from tiny_models import tiny_vit, token_counts
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
@settings(max_examples=10)
@given(ratio=st.floats(0.1, 1.0), seed=st.integers(0, 99), last_queries=st.booleans())
def test_live_cost_equals_the_cost_of_the_pruned_model(
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


def test_movement_cost_follows_the_published_equation() -> None:
    """Tredese 2023, computed by hand for the tiny model.

    Width 24, 3 heads of 8, FFN 96, 2 blocks, patches of 8 x 8 with 3 channels, 5 classes.
    """
    architecture = lift(tiny_vit()).architecture
    gates = Gates(architecture, "residual")
    gates.begin()
    attention = 24 * 3 * (2 * 8 + 8) + (3 * 8 + 1) * 24
    ffn = (24 + 1) * 96 + (96 + 1) * 24
    expected = (3 * 64 + 1) * 24 + 2 * (attention + ffn + 2 * 2 * 24) + 2 * 24 + (24 + 1) * 5
    assert float(movement_cost(architecture, gates.live).detach()) == expected


def test_input_widths_are_live_widths() -> None:
    """Removing half of the residual stream halves the gradient of the cost of a query column."""
    architecture = lift(tiny_vit()).architecture
    gates = Gates(architecture, "residual")
    embed = next(number for number, group in enumerate(gates.groups) if group.dimension == "embed")
    column = next(number for number, group in enumerate(gates.groups) if group.dimension == "qk")

    def cost_of_a_column() -> float:
        gates.zero_grad()
        gates.begin()
        movement_cost(architecture, gates.live).backward()
        gradient = gates.scores[column].grad
        assert gradient is not None
        return float(gradient[0])

    whole = cost_of_a_column()
    with torch.no_grad():
        gates.scores[embed][:12] = 0.0
    assert cost_of_a_column() == whole / 2 == 2 * 12 * 3


def grouped(data: st.DataObject, architecture: Architecture) -> Architecture:
    """The same network with randomly grouped queries in the attentions that support it."""

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
        groups = list(dict.fromkeys(drawn))
        kv_of = tuple(groups.index(group) for group in drawn)
        return branch.model_copy(update={"core": core.model_copy(update={"kv_of": kv_of})})

    steps = tuple(tuple(regrouped(branch) for branch in step) for step in architecture.steps)
    return Architecture.model_validate(
        architecture.model_copy(update={"steps": steps}).model_dump(by_alias=True)
    )


@pytest.mark.parametrize("cost", [live_params, live_macs, movement_cost])
def test_the_gradient_of_a_head_is_the_cost_that_it_alone_adds(
    cost: Callable[[Architecture, Live], Any],
) -> None:
    """Keys and values of a group are removed only with its last head; groups of two and of four."""
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
            without, with_head = ([keep.clone() for keep in kept] for _ in range(2))
            without[number][head], with_head[number][head] = False, True
            costs = [cost(source, gates.counter(units)) for units in (without, with_head)]
            assert float(found[head]) == costs[1] - costs[0]
    # Head 0 of the first block is removed, so head 1 alone keeps the keys and values of the group.
    slopes = gates.scores[heads[0]].grad
    assert slopes is not None
    assert slopes[1] > slopes[2] == slopes[3]


@settings(max_examples=25)
@given(st.data())
def test_live_cost_is_exact_for_every_kind_of_network(data: st.DataObject) -> None:
    """Except where live counts are not enough: padded heads, and channels that no branch reads."""
    architecture = grouped(data, data.draw(architectures(countable=True)))
    keep_ratio = data.draw(st.sampled_from([0.3, 0.6, 1.0]))
    mask = StructuredMask.random(architecture, keep_ratio, "residual")

    def live(dimension: str, site: str, indices: Indices | None) -> int:
        keep = mask.get(dimension, site)
        if dimension in ("head", "token") and indices is not None:
            return len(indices) if keep is None else int(keep[list(indices)].sum())
        return sites(architecture, dimension)[site] if keep is None else int(keep.sum())

    built = plan(architecture, mask).architecture
    assert live_cost(architecture, live, "params") == count_params(built)
    assert live_cost(architecture, live, "macs") == count_macs(built)


@settings(max_examples=40)
@given(st.data())
def test_live_cost_is_exact_for_tokens_and_widths(data: st.DataObject) -> None:
    """Nested sets with widths and removed sub-layers, with and without last queries."""
    architecture = data.draw(architectures(countable=True))
    ratio = st.sampled_from([0.3, 0.6, 1.0])
    ratios = {name: data.draw(ratio) for name in ("token", "embed", "head", "qk", "v", "ffn")}
    if data.draw(st.booleans()):
        ratios["block"] = 0.5
    mask = StructuredMask.random(architecture, ratios, "residual", data.draw(st.integers(0, 99)))
    last_queries = data.draw(st.booleans())
    tokens = token_counts(architecture, mask)

    def live(dimension: str, site: str, indices: Indices | None) -> int:
        if dimension == "token":
            return tokens[site] if indices is None else len(indices)
        keep = mask.get(dimension, site)
        return sites(architecture, dimension)[site] if keep is None else int(keep.sum())

    built = plan(architecture, mask).architecture.model_copy(update={"last_queries": last_queries})
    source = architecture.model_copy(update={"last_queries": last_queries})
    assert live_cost(source, live, "macs") == count_macs(built)
    if "block" not in ratios:
        # A removed sub-layer may leave channels that nothing reads.
        assert live_cost(source, live, "params") == count_params(built)


def test_the_price_of_a_token_is_its_queries_and_its_keys_at_the_live_widths() -> None:
    source = lift(tiny_vit(patch_size=4)).architecture
    # The class token alone is computed by the last block.
    source = source.model_copy(update={"last_queries": True})
    gates = Gates(source, "residual", tokens=True)
    numbers = [number for number, group in enumerate(gates.groups) if group.dimension == "token"]
    with torch.no_grad():
        for number in numbers:
            gates.scores[number][9:] = 0.0
        gates.scores[0][12:] = 0.0
    gates.begin()
    live_macs(source, gates.live).backward()
    kept = gates.kept()
    for number in numbers:
        found = gates.scores[number].grad
        assert found is not None
        without = [keep.clone() for keep in kept]
        without[number][0] = False
        saved = live_macs(source, gates.counter(kept)) - live_macs(source, gates.counter(without))
        assert float(found[0]) == saved
    # By hand: 12 live channels, 3 heads of 8, FFN 96; 10 tokens remain at both attentions.
    queries = 12 * 24 + 24 * 12 + 2 * 24 * 10 + 2 * 96 * 12
    keys = 2 * 12 * 24 + 2 * 24
    found = gates.scores[numbers[1]].grad
    assert found is not None
    assert float(found[0]) == queries + keys
