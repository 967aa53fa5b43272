"""Counts of tokens: schedules, budgets, and the choice by dynamic programming."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
import vitrim
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_vit
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.count import count_macs
from vitrim.compress.tokens.allocation import allocate_tokens, dropped_shares
from vitrim.compress.tokens.counts import (
    STEM,
    Schedule,
    attention_steps,
    counts_for_macs,
    fewest_counts,
    macs_share,
    read_counts,
    require_reach,
    schedule_counts,
    whole_counts,
    with_counts,
)
from vitrim.core.errors import InputError

SCHEDULES: tuple[Schedule, ...] = ("uniform", "linear", "constant")


def architecture(**overrides: Any) -> Architecture:
    return vitrim.lift(tiny_vit(**{"depth": 3, "img_size": 32, **overrides})).architecture


CLASS_TOKEN = architecture()
MEAN = architecture(class_token=False, global_pool="avg")


def test_counts_of_blocks_hold_for_their_sub_layers_and_the_stem_keeps_all() -> None:
    assert read_counts(CLASS_TOKEN, [15, 8, 1]) == [17, 15, 15, 8, 8, 1, 1]
    assert read_counts(MEAN, [15, 8, 4]) == [16, 15, 15, 8, 8, 4, 4]


def test_tokens_that_nothing_reads_leave() -> None:
    # After the last attention the head reads the class token; an FFN needs no token that it drops.
    assert read_counts(CLASS_TOKEN, [15, 8, 7])[-2:] == [1, 1]
    assert read_counts(CLASS_TOKEN, [12, 10, 9, 8, 7, 6, 6]) == [12, 9, 9, 7, 7, 1, 1]
    assert read_counts(MEAN, [12, 10, 9, 8, 7, 6, 5]) == [12, 9, 9, 7, 7, 5, 5]
    # An FFN before the first attention: what it drops, the stem need not embed, but for one patch.
    ffn_first = CLASS_TOKEN.model_copy(update={"steps": CLASS_TOKEN.steps[1:]})
    assert read_counts(ffn_first, [9, 5, 1]) == [9, 9, 5, 5, 1, 1]
    assert read_counts(ffn_first, [1, 1, 1]) == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([17, 1], "2 numbers; give one for each of the 3 blocks, or 7"),
        ([17, 9, 10], "10 tokens at blocks.2, after 9"),
        ([18, 9, 1], "18 tokens at blocks.0.attn; the network carries at most 17"),
        ([17, 9, 0], "0 tokens at blocks.2.attn; the head needs at least 1"),
        ([1, 1, 1, 1, 1, 1, 1], "1 tokens at the stem"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: list[int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_counts(CLASS_TOKEN, counts, "--token-counts")


def test_networks_that_return_all_tokens_or_mix_none_are_refused() -> None:
    dense = architecture(num_classes=0, global_pool="")
    with pytest.raises(InputError, match="the network returns every token"):
        attention_steps(dense)
    only_ffn = CLASS_TOKEN.model_copy(update={"steps": CLASS_TOKEN.steps[1::2]})
    with pytest.raises(InputError, match="has no attention"):
        attention_steps(only_ffn)


def test_simple_schedules() -> None:
    assert schedule_counts(CLASS_TOKEN, "uniform", 0.5)[1::2] == [9, 5, 1]
    assert schedule_counts(CLASS_TOKEN, "linear", 0.5)[1::2] == [13, 9, 1]
    assert schedule_counts(CLASS_TOKEN, "constant", 0.5)[1::2] == [9, 9, 1]
    assert schedule_counts(MEAN, "uniform", 0.5)[1::2] == [8, 4, 2]
    assert schedule_counts(MEAN, "linear", 0.25)[1::2] == [12, 8, 4]
    with pytest.raises(InputError, match="choose one of uniform, linear, constant"):
        schedule_counts(MEAN, "cosine", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spec", [CLASS_TOKEN, MEAN], ids=["class", "mean"])
def test_a_schedule_uses_the_budget(spec: Architecture, schedule: Schedule) -> None:
    counts = counts_for_macs(spec, schedule, 0.6)
    # A patch less costs a few percent of so small a network.
    assert 0.5 < macs_share(spec, counts) <= 0.6
    assert sorted(counts, reverse=True) == counts


def test_the_counted_network_is_the_compact_one() -> None:
    model = tiny_vit(depth=3, img_size=32)
    mask = vitrim.choose_tokens(model, "random", [12, 6, 1])
    counts = read_counts(CLASS_TOKEN, [12, 6, 1])
    small = vitrim.compact(model, mask).architecture
    assert count_macs(small) == count_macs(with_counts(CLASS_TOKEN, counts))
    priced = CLASS_TOKEN.model_copy(update={"last_queries": True})
    assert macs_share(CLASS_TOKEN, counts) == count_macs(small) / count_macs(priced)
    assert macs_share(CLASS_TOKEN, whole_counts(CLASS_TOKEN)) == 1.0


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"--macs = .*: give the share"):
        counts_for_macs(MEAN, "uniform", share, "--macs")


def test_a_budget_out_of_reach_names_the_least() -> None:
    losses = {step: [0.0] * 18 for step in attention_steps(CLASS_TOKEN)}
    with pytest.raises(InputError, match=r"macs = 0.1: with the fewest tokens 0\.527 of"):
        counts_for_macs(CLASS_TOKEN, "linear", 0.1)
    with pytest.raises(InputError, match=r"--macs = 0.1: with the fewest tokens 0\.355 of"):
        allocate_tokens(CLASS_TOKEN, losses, 0.1, "--macs")
    # Patches that never enter save more; the stem's level is searched where it has losses.
    least = macs_share(CLASS_TOKEN, fewest_counts(CLASS_TOKEN))
    assert fewest_counts(CLASS_TOKEN) == [2, 2, 2, 2, 2, 1, 1]
    losses[STEM] = [0.0] * 18
    with pytest.raises(InputError, match=rf"--macs = 0.1: with the fewest tokens {least:.3f} of"):
        allocate_tokens(CLASS_TOKEN, losses, 0.1, "--macs")
    require_reach(CLASS_TOKEN, least, "--macs")
    with pytest.raises(InputError, match=rf"--macs = 0.11.*: with the fewest tokens {least:.3f}"):
        require_reach(CLASS_TOKEN, least - 1e-6, "--macs")
    # Costs are rounded up in the search, but the fewest tokens fit whenever they do.
    assert allocate_tokens(CLASS_TOKEN, losses, least, "--macs") == fewest_counts(CLASS_TOKEN)


@settings(max_examples=40)
@given(
    share=st.floats(0.2, 0.98),
    name=st.sampled_from(["class", "mean", "ffn-first"]),
    once=st.booleans(),
    stem=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dynamic_programming_finds_the_best_counts(
    share: float, name: str, once: bool, stem: bool, seed: int
) -> None:
    spec = small_spec(name)
    torch.manual_seed(seed)
    mixing, prefix = attention_steps(spec), spec.prefix
    scores = {step: torch.rand(spec.tokens) ** 3 for step in ([STEM] if stem else []) + mixing}
    losses = {step: dropped_shares(each, prefix, range(10)) for step, each in scores.items()}
    if stem:
        # Mostly dearer than leaving one attention later, as it is in a network.
        losses[STEM] = [2 * each for each in losses[STEM]]
    try:
        found = allocate_tokens(spec, losses, share, once=once)
    except InputError:
        found = None
    if spec.pooled_prefix:
        losses[mixing[-1]] = [0.0] * 10

    def loss(counts: list[int]) -> float:
        total = losses[STEM][counts[mixing[0]]] if stem else 0.0
        total += sum(losses[step][counts[step + 1]] for step in mixing)
        return total - once * sum(losses[step][counts[step]] for step in mixing)

    best = None
    for counts in every_choice(spec, stem=stem):
        # Costs are rounded up to units of a 4000th of the budget.
        if macs_share(spec, counts) <= share and (best is None or loss(counts) < loss(best)):
            best = counts
    if found is None:
        assert best is None
        return
    assert best is not None
    assert found in every_choice(spec, stem=stem)
    assert macs_share(spec, found) <= share
    rounded = allocate_tokens(spec, losses, min(0.999, share * 1.005), once=once)
    assert loss(rounded) <= loss(best) + 1e-9 <= loss(found) + 2e-9


@cache
def small_spec(name: str) -> Architecture:
    """Nine tokens, and patches that are dearer to embed than to carry through a block."""
    overrides = {"class_token": False, "global_pool": "avg"} if name == "mean" else {}
    found = architecture(img_size=24 if name == "mean" else (16, 32), **overrides)
    return found.model_copy(update={"steps": found.steps[1:]}) if name == "ffn-first" else found


def every_choice(spec: Architecture, *, stem: bool) -> list[list[int]]:
    """All counts by site from which `allocate_tokens` may choose."""
    mixing, found = attention_steps(spec), []
    levels = range(spec.prefix + 1, spec.tokens + 1)
    chosen = len(mixing) - bool(spec.pooled_prefix)
    for first in levels if stem else [spec.tokens]:
        for each in combinations_with_replacement(reversed(levels), chosen):
            if each and each[0] > first:
                continue
            counts, last = [first] * (mixing[0] + 1), [spec.pooled_prefix] * (len(mixing) - chosen)
            ends = [*mixing[1:], len(spec.steps)]
            for start, end, count in zip(mixing, ends, [*each, *last], strict=True):
                counts += [count] * (end - start)
            found.append(read_counts(spec, counts))
    return found


@given(
    share=st.floats(0.4, 0.98),
    name=st.sampled_from(["class", "mean", "ffn-first"]),
    once=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_counts_are_as_before_where_leaving_at_the_stem_does_not_pay(
    share: float, name: str, once: bool, seed: int
) -> None:
    spec = small_spec(name)
    torch.manual_seed(seed)
    shares = dropped_shares(torch.rand(spec.tokens) ** 3, spec.prefix, range(spec.tokens + 1))
    losses = dict.fromkeys(attention_steps(spec), shares)
    try:
        wanted = allocate_tokens(spec, losses, share, once=once)
    except InputError:
        return
    dear = [0.0 if count == spec.tokens else 100.0 for count in range(spec.tokens + 1)]
    assert allocate_tokens(spec, {**losses, STEM: dear}, share, once=once) == wanted
    # Equal losses decide for more tokens at the stem.
    free = dict.fromkeys(losses, [0.0] * (spec.tokens + 1))
    for site in ({}, {STEM: [0.0] * (spec.tokens + 1)}):
        found = allocate_tokens(spec, {**free, **site}, 0.97, once=once)
        assert found[0] == spec.tokens


def test_patches_never_enter_where_that_loses_least() -> None:
    # The first patches to go are worth nothing, wherever they leave; embedding them costs most.
    shares = [max(0.0, (12 - count) / 12) for count in range(18)]
    losses = dict.fromkeys(attention_steps(CLASS_TOKEN), shares)
    whole = allocate_tokens(CLASS_TOKEN, losses, 0.55, once=True)
    found = allocate_tokens(CLASS_TOKEN, {**losses, STEM: shares}, 0.55, once=True)
    assert whole[0] == 17
    assert found[0] <= 12
    assert found[3] > whole[3]
    assert macs_share(CLASS_TOKEN, found) <= 0.55


def test_scores_below_zero_are_no_gain() -> None:
    score = torch.tensor([9.0, -1.0, 1.0, 0.0])
    assert dropped_shares(score, 1, [1, 2, 3, 4]) == pytest.approx([1.0, 1 / 3, 0.0, 0.0])
    assert dropped_shares(torch.zeros(5), 1, [1, 3, 5]) == pytest.approx([1.0, 0.5, 0.0])
