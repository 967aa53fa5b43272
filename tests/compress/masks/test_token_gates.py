"""Learned token sets: nested at every price, the optimum for each patch, equal to the cut model."""

from __future__ import annotations

import itertools

import pytest
import torch
import vitrim
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import DualSolver, dense_cost
from vitrim.compress.masks.gates import GATED, Gates
from vitrim.compress.masks.masked_network import MaskedNetwork
from vitrim.compress.masks.token_gates import (
    close_upwards,
    exit_gradients,
    nested_gates,
    nested_values,
    token_places,
)
from vitrim.compress.network.count import count_macs
from vitrim.compress.surgery.compactor import compact

MODEL = lift(tiny_vit(embed_dim=48, num_heads=4, patch_size=4, depth=3))


def is_nested(kept: list[Tensor]) -> bool:
    """Whether every set is part of the one before it."""
    return all(
        not bool((after & ~before[: len(after)]).any())
        for before, after in itertools.pairwise(kept)
    )


@settings(max_examples=60)
@given(st.data())
def test_a_price_selects_the_best_depth_of_each_patch(data: st.DataObject) -> None:
    places, patches = data.draw(st.integers(1, 5)), 4
    # Patches of smaller numbers reach deeper places.
    sizes = sorted(data.draw(st.lists(st.integers(1, patches), min_size=places, max_size=places)))
    sizes.reverse()
    losses = [
        torch.tensor(
            data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)),
            dtype=torch.float64,
        )
        for size in sizes
    ]
    costs = data.draw(st.lists(st.integers(1, 4).map(float), min_size=places, max_size=places))
    values = nested_values(losses, costs)
    # Between the slopes, so that no two depths are equally good.
    price = data.draw(st.integers(0, 12)) / 3.0 + 0.0123
    kept = [value >= price for value in values]
    assert is_nested(kept)
    for patch in range(sizes[0]):
        reached = sum(patch < size for size in sizes)
        total = [
            (float(losses[depth][patch]) if depth < reached else 0.0) + price * sum(costs[:depth])
            for depth in range(reached + 1)
        ]
        chosen = sum(bool(keep[patch]) for keep in kept[:reached])
        assert total[chosen] == pytest.approx(min(total))


def test_leaving_counts_for_all_later_places() -> None:
    found = exit_gradients([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, -5.0])])
    assert [sums.tolist() for sums in found] == [[5.0, -3.0, 3.0], [4.0, -5.0]]


def test_gates_of_tokens_are_nested_pass_gradients_and_keep_one() -> None:
    scores = [
        torch.tensor([0.9, 0.1, 0.7, 0.6], requires_grad=True),
        torch.tensor([0.8, 0.9, 0.2], requires_grad=True),
        torch.tensor([0.1, 0.2, 0.3], requires_grad=True),
    ]
    gates = nested_gates(scores, 0.5)
    assert [gate.tolist() for gate in gates] == [[1, 0, 1, 1], [1, 0, 1], [0, 0, 1]]
    torch.cat([gate * torch.arange(1.0, len(gate) + 1) for gate in gates]).sum().backward()
    for score in scores:
        assert score.grad is not None
        assert score.grad.tolist() == list(range(1, len(score) + 1))


def test_what_a_later_set_keeps_earlier_ones_keep() -> None:
    kept = [torch.tensor([True, False, False]), torch.tensor([False, False, True])]
    assert [keep.tolist() for keep in close_upwards(kept)] == [
        [True, False, True],
        [False, False, True],
    ]


def test_places_are_what_attentions_and_pooling_heads_read() -> None:
    places = token_places(lift(tiny_vit(patch_size=4)).architecture)
    assert [(place.site, place.reader, place.patches) for place in places] == [
        ("stem.out", 0, 16),
        ("blocks.0.ffn", 2, 16),
    ]
    pooled = lift(tiny_vit(patch_size=4, class_token=False, global_pool="avg"))
    assert [place.site for place in token_places(pooled.architecture)] == [
        "stem.out",
        "blocks.0.ffn",
        "blocks.1.ffn",
    ]


def test_a_network_that_returns_every_token_learns_none() -> None:
    architecture = lift(tiny_vit(global_pool="", num_classes=0)).architecture
    with pytest.raises(vitrim.InputError, match="tokens: the network returns every token"):
        Gates(architecture, tokens=True)


def test_tokens_alone_can_be_learned_or_fixed() -> None:
    gates = Gates(MODEL.architecture, fixed=GATED, tokens=True)
    assert {group.dimension for group in gates.groups} == {"token"}
    fixed = Gates(MODEL.architecture, fixed=("token",), tokens=True)
    assert not fixed.tokens
    assert all(group.dimension != "token" for group in fixed.groups)
    with pytest.raises(vitrim.InputError, match="nothing is left to remove"):
        Gates(MODEL.architecture, fixed=(*GATED, "token"), tokens=True)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_token_gates_of_any_kind_of_network_equal_the_cut_model(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    gates = Gates(architecture, "residual", tokens=True).double()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with torch.no_grad():
        for scores in gates.scores:
            scores.copy_(torch.rand(scores.shape, generator=generator, dtype=torch.float64) + 0.1)
    mask = gates.mask()
    try:
        mask.check(architecture)
    except vitrim.InputError as error:
        # A reader of few channels may keep none, which is refused.
        if "channels that there are at" not in str(error):
            raise
        reject()
    assert all(map(torch.equal, gates.units(mask), gates.kept()))
    model = network(architecture)
    images = torch.randn(
        2, *architecture.image, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    found = vitrim.compact(model, mask)(images)
    gates.begin()
    wanted = MaskedNetwork(model)(images, gates.value)
    assert torch.allclose(
        found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.detach().abs().max().clamp(min=1))
    )


def test_a_dropped_token_gets_a_gradient_at_every_place() -> None:
    model, images = lift(tiny_vit(patch_size=4)).double(), torch.randn(2, 3, 16, 16).double()
    network = MaskedNetwork(model)
    gates = Gates(network.architecture, tokens=True).double()
    _, numbers = gates.split(range(len(gates.groups)))
    with torch.no_grad():
        for number in numbers:
            gates.scores[number][3] = 0.0
    gates.begin()
    network(images.double(), gates.value).square().sum().backward()
    for number in numbers:
        gradient = gates.scores[number].grad
        assert gradient is not None
        assert bool((gradient != 0).all()), "a token that was dropped could never return"


@pytest.mark.parametrize("pooled", [False, True])
@settings(max_examples=10)
@given(ratio=st.floats(0.15, 0.95), seed=st.integers(0, 99), widths=st.booleans())
def test_a_budget_is_met_by_nested_tokens_and_widths(
    pooled: bool, ratio: float, seed: int, widths: bool
) -> None:
    model = lift(tiny_vit(patch_size=4, class_token=False, global_pool="avg")) if pooled else MODEL
    gates = Gates(model.architecture, "residual", fixed=() if widths else GATED, tokens=True)
    counted = model.architecture.model_copy(update={"last_queries": True})
    solver = DualSolver(counted, gates, "macs")
    generator = torch.Generator().manual_seed(seed)
    solver.observe([torch.randn(group.size, generator=generator) for group in gates.groups])
    least = 0.3 if not widths else 0.0
    target = int(max(ratio, least) * dense_cost(counted, "macs"))
    kept = gates.kept()
    for _ in range(6):
        kept = solver.solve(kept, target)
        assert is_nested(gates.split(kept)[1])
    built = compact(model, gates.mask(kept), last_queries=True).architecture
    spent = count_macs(built)
    assert spent == solver.cost(kept)
    assert spent <= target
    # A patch alone is coarse, and so is what is left where the cheaper units are all kept.
    prices = zip(solver.marginal_costs(kept), kept, strict=True)
    cheapest = min((float(price) for price, keep in prices if not bool(keep.all())), default=0.0)
    left_over = 0.01 if widths else 0.15
    assert target - spent <= max(left_over * target, cheapest)
    assert is_nested([~dead for dead in gates.split(solver.removable(kept))[1]])


def test_a_salient_patch_stays_longest() -> None:
    gates = Gates(MODEL.architecture, "residual", fixed=GATED, tokens=True)
    solver = DualSolver(MODEL.architecture, gates, "macs")
    solver.observe([torch.arange(1.0, group.size + 1) for group in gates.groups])
    kept = solver.solve(gates.kept(), int(0.6 * dense_cost(MODEL.architecture, "macs")))
    for keep in kept:
        assert bool(keep[-int(keep.sum()) :].all())


def test_a_removed_attention_prices_no_keys() -> None:
    gates = Gates(MODEL.architecture, "residual", fixed=GATED, tokens=True)
    solver = DualSolver(MODEL.architecture, gates, "macs")
    solver.observe([torch.ones(group.size) for group in gates.groups])
    before = solver.marginal_costs(gates.kept())
    gates.remove_branch("blocks.1.attn")
    after = solver.marginal_costs(gates.kept())
    assert [gates.is_removed(number) for number in range(3)] == [False, True, False]
    assert after[1] == 1.0
    # The patches at the last attention now pay for the FFN of the first block, too.
    assert after[2] > before[2]
    assert relative_error(torch.tensor(after[0]), torch.tensor(before[0])) < 1.0
    kept = solver.solve(gates.kept(), int(0.6 * solver.cost(gates.kept())))
    assert is_nested(kept)
    built = compact(MODEL, gates.mask(kept)).architecture
    assert count_macs(built) == solver.cost(kept)
