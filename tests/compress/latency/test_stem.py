"""Patches that leave at the stem for a latency: as good as brute force, and exact for any network.

Latencies here are those of the compact network, whose token sets are nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latency_tables import COSTS, latency_table
from random_networks import architectures, network
from tiny_models import tiny_vit
from torch import Tensor
from torch.nn import functional as F
from vitrim import InputError, StructuredMask, TrimOptions, compact, lift, masked, solve
from vitrim.compress.latency.cut import LatencyCuts, LatencyOptions
from vitrim.compress.latency.losses import Losses, scored_losses, uniform_losses
from vitrim.compress.latency.search import smallest_latency_ms
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.latency.solution import Limits, Solution, SolveOptions
from vitrim.compress.latency.trial import trial_network
from vitrim.compress.masks.groups import token_sites
from vitrim.compress.network.architecture import Architecture, ConvSpec, StemSpec
from vitrim.compress.surgery.compactor import output_error
from vitrim.compress.surgery.plan import plan
from vitrim.compress.tokens.counts import STEM, settled
from vitrim.pipeline.budget_reach import require_cut
from vitrim.targets.cost_table import Correction, CostTable

TABLE = latency_table(correction=Correction(scale=1.1, offset_ms=0.002))
# Embedding a patch costs as much as what a block does with it.
DEAR_STEM = latency_table(costs_ms=COSTS | {"stem": 2e-5}, tile=1)


def falling(architecture: Architecture, rng: np.random.Generator) -> dict[int, list[float]]:
    """Random losses of tokens at the stem and at every attention, without order along the depth."""
    size = architecture.tokens
    return {
        step: [*np.sort(rng.exponential(0.3, size))[::-1].tolist(), 0.0]
        for step in (STEM, *architecture.attention_steps())
    }


def with_tokens(losses: Losses, tokens: Mapping[int, Sequence[float]]) -> Losses:
    return replace(losses, tokens=tokens)


def mask_of(architecture: Architecture, found: Solution) -> StructuredMask:
    """The mask of a solution: its widths, and the first tokens in its numbers at each site."""
    counts = (found.stem_tokens, *found.counts)
    if architecture.pool.kind == "none":
        return found.mask()
    sets = {
        site: torch.arange(size) < max(architecture.prefix + 1, count)
        for (site, size), count in zip(token_sites(architecture).items(), counts, strict=True)
    }
    mask = StructuredMask({**found.mask().kept, "token": sets}, scale="original")
    # Law 9: the sets are nested, and what the head reads stays.
    mask.check(architecture)
    return mask


def cut_ms(architecture: Architecture, found: Solution, table: CostTable) -> float:
    """The latency of the compact network of a solution."""
    last = bool(architecture.pooled_prefix) or None
    cut = plan(architecture, mask_of(architecture, found)).architecture
    cut = cut if last is None else cut.model_copy(update={"last_queries": True})
    return table.latency_ms(network_shape(cut))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(architecture=architectures(), share=st.floats(0.2, 1.0), seed=st.integers(0, 999))
def test_every_network_is_within_its_budget_and_its_cut_has_the_latency(
    architecture: Architecture, share: float, seed: int
) -> None:
    table = latency_table(tile=1)
    rng = np.random.default_rng(seed)
    losses = with_tokens(uniform_losses(architecture), falling(architecture, rng))
    least = smallest_latency_ms(architecture, losses, table)
    assert least <= smallest_latency_ms(architecture, with_tokens(losses, {}), table) * (1 + 1e-9)
    dense = table.latency_ms(network_shape(architecture))
    budget = max(share * dense, 1.001 * least)
    found = solve(architecture, budget, table, losses=losses)
    assert found.latency_ms is not None
    assert found.latency_ms <= budget * (1 + 1e-8)
    assert found.counts == tuple(sorted(found.counts, reverse=True))
    assert architecture.tokens >= found.stem_tokens >= max(found.counts, default=0)
    assert cut_ms(architecture, found, table) <= found.latency_ms * (1 + 1e-8)


@dataclass(frozen=True)
class Choice:
    """Numbers of tokens behind the stem and the first attention, and kept sub-layers."""

    stem: int
    first: int
    heads: tuple[int, int]
    ffns: tuple[bool, bool]


def small_network() -> Architecture:
    return lift(tiny_vit()).architecture


@cache
def every_choice() -> tuple[tuple[Choice, float], ...]:
    """All choices of a network of two blocks and four patches, with their latencies."""
    return tuple(_choices())


def _choices() -> Iterator[tuple[Choice, float]]:
    architecture = small_network()
    attentions, ffns = architecture.branches[::2], architecture.branches[1::2]
    for heads in product((1, 2, 3), (0, 1, 2, 3)):
        for stem, first, *kept in product(range(2, 6), range(2, 6), (0, 1), (0, 1)):
            # Without a second attention the first one computes what the head reads.
            if first > stem or (not heads[1] and first != stem):
                continue
            entries: dict[str, dict[str, Tensor]] = {"head": {}, "block": {}}
            for branch, count in zip(attentions, heads, strict=True):
                entries["head"][branch.name] = torch.arange(3) < max(1, count)
                entries["block"][branch.name] = torch.tensor([count > 0])
            for branch, keep in zip(ffns, kept, strict=True):
                entries["block"][branch.name] = torch.tensor([keep > 0])
            counts = settled(architecture, [stem, first, first, 2, 2])
            sets = zip(token_sites(architecture), counts, strict=True)
            entries["token"] = {site: torch.arange(5) < count for site, count in sets}
            cut = plan(architecture, StructuredMask(entries)).architecture
            shape = network_shape(cut.model_copy(update={"last_queries": True}))
            chosen = Choice(stem, first, heads, (bool(kept[0]), bool(kept[1])))
            yield chosen, DEAR_STEM.latency_ms(shape)


def loss_of(choice: Choice, losses: Losses, architecture: Architecture) -> float:
    """What a choice loses: each patch where it leaves, each width."""
    rows = losses.tokens
    total = rows[STEM][choice.stem] + rows[0][choice.first] - rows[0][choice.stem]
    sizes = (
        (choice.heads[0], "head"),
        (24 * 4 * choice.ffns[0], "ffn"),
        (choice.heads[1], "head"),
        (24 * 4 * choice.ffns[1], "ffn"),
    )
    for branch, (width, dimension) in zip(architecture.branches, sizes, strict=True):
        predicted = losses.sublayers[branch.name]
        curve = next(each for each in predicted.curves if each.dimension == dimension)
        total += predicted.weight * curve.errors[curve.widths.index(width)]
    return total


def random_losses(seed: int) -> Losses:
    """Random losses; the first attention is not removed."""
    architecture, rng = small_network(), np.random.default_rng(seed)
    scores: dict[str, dict[str, Tensor]] = {"head": {}, "ffn": {}}
    names = [branch.name for branch in architecture.branches]
    for name in names[::2]:
        scores["head"][name] = torch.from_numpy(rng.exponential(0.2, 3))
    for name in names[1::2]:
        scores["ffn"][name] = torch.from_numpy(rng.exponential(0.2 / 96, 96))
    gone = {name: float(rng.exponential(0.5)) for name in names[1:]}
    tokens = falling(architecture, rng)
    return scored_losses(architecture, scores, 96, tokens, gone=gone)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_it_is_as_good_as_brute_force_over_compact_networks(seed: int, share: float) -> None:
    architecture, losses = small_network(), random_losses(seed)
    latencies = [latency for _, latency in every_choice()]
    budget = min(latencies) + share * (max(latencies) - min(latencies))
    # Times are rounded up to a 4000th of the budget for each of the five sites.
    short = [
        loss_of(choice, losses, architecture)
        for choice, latency in every_choice()
        if latency <= budget * (1 - 5 / 4000)
    ]
    within = [
        loss_of(choice, losses, architecture)
        for choice, latency in every_choice()
        if latency <= budget * (1 + 1e-9)
    ]
    found = solve(architecture, budget * (1 + 1e-9), DEAR_STEM, losses=losses)
    assert found.loss <= min(short, default=np.inf) + 1e-9
    assert found.loss >= min(within) - 1e-9
    assert found.latency_ms is not None
    assert found.latency_ms <= budget * (1 + 1e-8)
    assert cut_ms(architecture, found, DEAR_STEM) <= found.latency_ms * (1 + 1e-9)
    assert smallest_latency_ms(architecture, losses, DEAR_STEM) == pytest.approx(min(latencies))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_it_is_never_worse_than_greedy_or_than_a_whole_stem(seed: int, share: float) -> None:
    architecture, losses = small_network(), random_losses(seed)
    known = dict(every_choice())
    budget = min(known.values()) + share * (max(known.values()) - min(known.values()))
    whole = Choice(5, 5, (3, 3), (True, True))
    choice = whole
    while known[choice] > budget * (1 - 5 / 4000):
        steps = [each for each in known if known[each] < known[choice] and differs(each, choice)]
        if not steps:
            break
        lost = loss_of(choice, losses, architecture)
        choice = min(
            steps,
            key=lambda each: (
                (loss_of(each, losses, architecture) - lost) / (known[choice] - known[each])
            ),
        )
    found = solve(architecture, budget * (1 + 1e-9), DEAR_STEM, losses=losses)
    if known[choice] <= budget * (1 - 5 / 4000):
        assert found.loss <= loss_of(choice, losses, architecture) + 1e-9
    rows = {step: row for step, row in losses.tokens.items() if step != STEM}
    try:
        before = solve(
            architecture, budget * (1 - 1 / 4000), DEAR_STEM, losses=with_tokens(losses, rows)
        )
    except InputError:
        return
    assert before.stem_tokens == architecture.tokens
    assert found.loss <= before.loss + 1e-9


def differs(one: Choice, other: Choice) -> bool:
    """Whether one size differs, or the tokens of the stem and with them those behind it."""
    changes = sum(
        left != right
        for left, right in (
            *zip(one.heads, other.heads, strict=True),
            *zip(one.ffns, other.ffns, strict=True),
        )
    )
    tokens = (one.stem, one.first) != (other.stem, other.first)
    return changes + tokens == 1


def test_a_stem_that_must_stay_gives_the_solutions_of_losses_without_one() -> None:
    architecture = lift(tiny_vit(depth=3, img_size=64)).architecture
    dense = TABLE.latency_ms(network_shape(architecture))
    size = architecture.tokens
    rows = {step: [0.01 * (size - n) / size for n in range(size + 1)] for step in (0, 2, 4)}
    dear = {**rows, STEM: [*[100.0] * size, 0.0]}
    losses = uniform_losses(architecture, 4)
    for share in (0.3, 0.6):
        one, other = (
            solve(architecture, share * dense, TABLE, losses=with_tokens(losses, tokens))
            for tokens in (rows, dear)
        )
        assert one.stem_tokens == other.stem_tokens == size
        assert other.loss == pytest.approx(one.loss, rel=0.02)


def test_lower_latencies_are_reached_and_what_must_stay_does() -> None:
    architecture = lift(tiny_vit(depth=3, img_size=64)).architecture
    rng = np.random.default_rng(0)
    tokens = falling(architecture, rng)
    losses = with_tokens(uniform_losses(architecture, 4), tokens)
    rows = {step: row for step, row in tokens.items() if step != STEM}
    before = smallest_latency_ms(architecture, with_tokens(losses, rows), TABLE)
    least = smallest_latency_ms(architecture, losses, TABLE)
    assert least < 0.9 * before
    found = solve(architecture, 1.0001 * least, TABLE, losses=losses)
    assert found.stem_tokens == architecture.prefix + 5
    for each in (with_tokens(losses, rows), losses):
        options = SolveOptions(tokens=each is not losses)
        with pytest.raises(InputError, match="the smallest latency that can be reached is"):
            solve(architecture, 0.99 * before, TABLE, losses=each, options=options)
    # What the front checks before it reads any image.
    limits = Limits(1.001 * least)
    require_cut(architecture, limits, TABLE, 4, SolveOptions(), {})
    with pytest.raises(InputError, match="--latency-ms: the smallest latency"):
        require_cut(
            *(architecture, limits, TABLE, 4, SolveOptions(tokens=False)),
            {"latency_ms": "--latency-ms"},
        )


def test_tables_without_costs_of_the_stem_keep_their_latencies() -> None:
    """A table of the first schema: what leaves at the stem saves only behind it."""
    architecture = lift(tiny_vit(depth=3, img_size=64)).architecture
    free = {"stem", "stem tokens", "call", "classes"}
    table = latency_table(costs_ms={part: c for part, c in COSTS.items() if part not in free})
    losses = with_tokens(
        uniform_losses(architecture, 4), falling(architecture, np.random.default_rng(1))
    )
    dense = table.latency_ms(network_shape(architecture))
    found = solve(architecture, 0.2 * dense, table, losses=losses)
    assert found.latency_ms is not None
    assert found.latency_ms <= 0.2 * dense
    assert cut_ms(architecture, found, table) == pytest.approx(found.latency_ms)


def test_a_convolution_before_the_patches_is_paid_whole() -> None:
    rng = np.random.default_rng(3)
    given = lift(tiny_vit(depth=2, img_size=64)).architecture
    before = (ConvSpec(channels=8, kernel=(4, 4), stride=(4, 4), act="relu"),)
    architecture = given.model_copy(update={"stem": StemSpec(patch=(2, 2), before=before)})
    assert architecture.tokens == given.tokens
    losses = with_tokens(uniform_losses(architecture, 4), falling(architecture, rng))
    dense = DEAR_STEM.latency_ms(network_shape(architecture))
    least = smallest_latency_ms(architecture, losses, DEAR_STEM)
    found = solve(architecture, max(0.4 * dense, 1.01 * least), DEAR_STEM, losses=losses)
    assert found.latency_ms is not None
    assert cut_ms(architecture, found, DEAR_STEM) == pytest.approx(found.latency_ms)


def test_drawn_networks_of_a_cost_table_drop_patches_at_the_stem_and_at_attentions() -> None:
    model = lift(tiny_vit(depth=3, img_size=64))
    dense = TABLE.latency_ms(network_shape(model.architecture))
    whole, found = (model.architecture.tokens, model.architecture.embed), []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        small = trial_network(model, 0.5 * dense, TABLE, 8, tokens=True, rng=rng)
        assert small is not None
        # Also where the stream is narrower, which the network was not.
        assert TABLE.latency_ms(network_shape(small.architecture)) <= 0.5 * dense
        found.append(small.architecture)
    assert {spec.tokens == whole[0] for spec in found} == {False, True}
    assert {spec.embed == whole[1] for spec in found} == {False, True}
    assert any(len({spec.tokens, *spec.step_tokens()[:3]}) > 1 for spec in found)


@pytest.fixture(scope="module")
def images() -> Tensor:
    small = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, size=(48, 48), mode="bilinear")


def test_a_cut_without_training_drops_patches_at_the_stem(images: Tensor) -> None:
    model = lift(tiny_vit(depth=2, img_size=48))
    cuts = LatencyCuts(model, images, DEAR_STEM, options=TrimOptions(round_to=4))
    measured = cuts.token_losses()
    steps = model.architecture.attention_steps()
    assert list(measured) == [STEM, *steps]
    # In the unit of those of attentions: without all patches but one the features differ.
    assert 0 < measured[STEM][2] < 10 * measured[steps[0]][2] + 1
    # As if patches lost nothing at the stem, and anything else much.
    size = model.architecture.tokens
    much = [1e3 * (size - count) / size for count in range(size + 1)]
    nothing = [0.0] * (size + 1)
    cuts._tokens = {STEM: nothing, **dict.fromkeys(steps, much)}
    budget_ms = 0.5 * DEAR_STEM.latency_ms(network_shape(model.architecture))
    predicted = cuts._token_choices(budget_ms)[0]
    assert predicted is not None
    assert predicted.counts["stem.out"] < size
    found = cuts._cut_with(predicted, budget_ms)
    spec = found.model.architecture
    assert found.latency_ms == DEAR_STEM.latency_ms(network_shape(spec))
    assert found.latency_ms <= budget_ms
    assert spec.tokens == predicted.counts["stem.out"]
    # Law 9 for the whole mask, and the cut of its tokens equals the masked network.
    found.mask.check(model.architecture)
    exact = compact(model, predicted.mask)
    assert output_error(masked(model, predicted.mask), exact, images[:2]) < 1e-4
    trimmed = found.trimmed
    assert (
        output_error(
            masked(trimmed.rotated, trimmed.mask),
            compact(trimmed.rotated, trimmed.mask),
            images[:2],
        )
        < 1e-4
    )


def test_a_cut_reaches_the_least_latency_that_is_checked_before(images: Tensor) -> None:
    model = lift(tiny_vit(depth=2, img_size=48))
    cuts = LatencyCuts(model, images, DEAR_STEM, options=TrimOptions(round_to=4))
    with pytest.raises(InputError) as caught:
        require_cut(model.architecture, Limits(1e-6), DEAR_STEM, 4, SolveOptions(), {})
    least = float(str(caught.value).split(" is ")[1].split(" ms")[0])
    found = cuts.cut(least)
    assert found.latency_ms <= least
    assert found.model.architecture.tokens < model.architecture.tokens
    whole = replace(cuts.latency, tokens=False)
    assert whole == LatencyOptions(tokens=False)
    kept = LatencyCuts(model, images, DEAR_STEM, options=TrimOptions(round_to=4), latency=whole)
    with pytest.raises(InputError, match="the smallest latency that can be reached is"):
        kept.cut(least)


def test_networks_that_return_every_token_keep_all() -> None:
    architecture = lift(tiny_vit(class_token=False, global_pool="", num_classes=0)).architecture
    assert architecture.pool.kind == "none"
    losses = with_tokens(
        uniform_losses(architecture, 4), falling(architecture, np.random.default_rng(0))
    )
    dense = TABLE.latency_ms(network_shape(architecture))
    found = solve(architecture, 0.7 * dense, TABLE, losses=losses)
    assert found.stem_tokens == architecture.tokens
    small = compact(network(architecture), found.mask())
    assert TABLE.latency_ms(network_shape(small.architecture)) <= 0.7 * dense
