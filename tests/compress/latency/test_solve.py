"""Solutions for a network: the compact network has the table's latency, within every budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latency_tables import COSTS, latency_table
from random_networks import architectures, network, selecting_architectures
from tiny_models import tiny_vit
from vitrim import InputError, SolveOptions, compact, lift, solve
from vitrim.compress.latency.losses import Losses, predicted_losses, scored_losses, uniform_losses
from vitrim.compress.latency.problem import activation_bytes, weight_precision
from vitrim.compress.latency.search import smallest_latency_ms
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.masks.saliency import saliency
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.oneshot.budgets import file_bytes
from vitrim.compress.oneshot.prediction import TrimOptions, predict
from vitrim.targets.cost_table import Correction

TABLE = latency_table(correction=Correction(scale=1.1, offset_ms=0.002))
NARROW = SolveOptions(round_to=4)


def token_losses(architecture: Architecture) -> dict[int, list[float]]:
    """Losses that fall with the number of tokens, and more in early blocks."""
    size = architecture.tokens
    return {
        step: [0.01 * (1 + 1 / (step + 1)) * (size - count) / size for count in range(size + 1)]
        for step in architecture.attention_steps()
    }


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_the_compact_network_has_the_latency_of_the_solution(share: float) -> None:
    model = lift(tiny_vit(depth=3, img_size=32))
    dense = TABLE.latency_ms(network_shape(model.architecture))
    found = solve(model, share * dense, TABLE, options=NARROW)
    small = compact(model, found.mask())
    assert found.latency_ms == pytest.approx(TABLE.latency_ms(network_shape(small.architecture)))
    assert found.latency_ms is not None
    assert 0.8 * share * dense < found.latency_ms <= share * dense
    assert small.architecture.embed == found.embed


def test_tokens_leave_where_the_losses_allow_it() -> None:
    architecture = lift(tiny_vit(depth=3, img_size=64)).architecture
    dense = TABLE.latency_ms(network_shape(architecture))
    losses = uniform_losses(architecture, 4)
    with_tokens = Losses(losses.sublayers, token_losses(architecture))
    stays = solve(architecture, 0.5 * dense, TABLE, losses=losses)
    leaves = solve(architecture, 0.5 * dense, TABLE, losses=with_tokens)
    fixed = solve(
        architecture, 0.5 * dense, TABLE, losses=with_tokens, options=SolveOptions(tokens=False)
    )
    assert set(stays.counts) == {architecture.tokens, 1}
    assert fixed.counts == stays.counts
    assert leaves.loss < stays.loss
    assert leaves.counts[0] < architecture.tokens
    assert list(leaves.counts) == sorted(leaves.counts, reverse=True)
    assert leaves.latency_ms is not None
    assert leaves.latency_ms <= 0.5 * dense


def test_a_removed_last_attention_leaves_its_tokens_to_the_one_before() -> None:
    architecture = lift(tiny_vit(depth=2, img_size=32)).architecture
    losses = uniform_losses(architecture, 4)
    last = architecture.branches[2].name
    free = losses.scaled({last: 0.0})
    dense = TABLE.latency_ms(network_shape(architecture))
    found = solve(architecture, 0.7 * dense, TABLE, losses=free)
    assert found.widths[last]["head"] == 0
    assert found.counts == (1, 1, 1, 1)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(architecture=architectures(), share=st.floats(0.3, 1.0))
def test_every_network_is_solved_within_its_budget(
    architecture: Architecture, share: float
) -> None:
    table = latency_table(tile=1)
    losses = uniform_losses(architecture)
    least = smallest_latency_ms(architecture, losses, table)
    dense = table.latency_ms(network_shape(architecture))
    budget = max(share * dense, 1.001 * least)
    found = solve(architecture, budget, table, losses=losses)
    assert found.latency_ms is not None
    assert found.latency_ms <= budget * (1 + 1e-8)
    small = compact(network(architecture), found.mask())
    assert table.latency_ms(network_shape(small.architecture)) <= budget * (1 + 1e-8)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(architecture=selecting_architectures(), share=st.floats(0.4, 1.0))
def test_networks_that_select_tokens_are_solved_with_their_selections(
    architecture: Architecture, share: float
) -> None:
    table = latency_table(tile=1)
    losses = uniform_losses(architecture)
    dense = table.latency_ms(network_shape(architecture))
    least = smallest_latency_ms(architecture, losses, table)
    budget = max(share * dense, 1.001 * least)
    found = solve(architecture, budget, table, losses=losses)
    assert found.latency_ms is not None
    assert found.latency_ms <= budget * (1 + 1e-8)
    # Which tokens are selected stays; scores of an attention cost less where it is cut.
    small = compact(network(architecture), found.mask())
    cut_ms = table.latency_ms(network_shape(small.architecture))
    assert cut_ms <= found.latency_ms * (1 + 1e-8)
    with pytest.raises(InputError, match="has no costs of selections of tokens; measure one"):
        solve(architecture, budget, latency_table(costs_ms={"ffn": 1e-3}), losses=losses)


def test_a_larger_budget_never_loses_more() -> None:
    architecture = lift(tiny_vit(depth=3)).architecture
    dense = TABLE.latency_ms(network_shape(architecture))
    found = [solve(architecture, share * dense, TABLE, options=NARROW) for share in (0.4, 0.6, 0.8)]
    losses = [solution.loss for solution in found]
    assert losses == sorted(losses, reverse=True)


def test_scores_of_the_stream_narrow_it() -> None:
    model = lift(tiny_vit(depth=2, embed_dim=48))
    scores = saliency(model, "l2")
    losses = scored_losses(model.architecture, scores, 8)
    assert set(losses.embed) == {40, 32, 24, 16, 8}
    cheap = losses.scaled({}, embed=1e-6)
    dense = TABLE.latency_ms(network_shape(model.architecture))
    found = solve(model, 0.6 * dense, TABLE, losses=cheap)
    assert found.embed < 48
    small = compact(model, found.mask())
    assert found.latency_ms == pytest.approx(TABLE.latency_ms(network_shape(small.architecture)))


def test_statistics_of_images_are_losses() -> None:
    model = lift(tiny_vit(depth=2, img_size=32))
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prediction = predict(model, images, options=TrimOptions(round_to=4))
    losses = predicted_losses(prediction)
    dense = TABLE.latency_ms(network_shape(model.architecture))
    found = solve(model, 0.7 * dense, TABLE, losses=losses)
    assert found.loss == pytest.approx(
        sum(option.error for option in found.options.values()) + found.stream_loss
    )


def test_a_file_and_a_peak_of_memory_are_budgets() -> None:
    architecture = lift(tiny_vit(depth=3)).architecture
    dense = TABLE.latency_ms(network_shape(architecture))
    whole = file_bytes(architecture, "fp32") / 1e6
    found = solve(architecture, None, file_mb=0.7 * whole, options=NARROW)
    assert found.latency_ms is None
    assert 0.5 * whole < found.file_bytes / 1e6 <= 0.7 * whole
    both = solve(architecture, 0.9 * dense, TABLE, file_mb=0.6 * whole, options=NARROW)
    assert both.file_bytes / 1e6 <= 0.6 * whole
    assert both.latency_ms is not None
    assert both.latency_ms <= 0.9 * dense
    alone = solve(architecture, 0.9 * dense, TABLE, options=NARROW)
    assert alone.loss <= both.loss
    memory = solve(architecture, None, peak_memory_mb=0.7 * whole, options=NARROW)
    assert memory.file_bytes / 1e6 < 0.7 * whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency_ms": None}, "no budget: give latency_ms, file_mb, peak_memory_mb"),
        ({"latency_ms": 0.0, "table": TABLE}, "latency_ms = 0.0: give a number above 0"),
        ({"latency_ms": 1.0}, "latency_ms needs a cost table; measure one with `vitrim bench"),
        (
            {"latency_ms": 0.001, "table": TABLE},
            r"latency_ms = 0\.001: the smallest latency that can be reached is 0\.\d+ ms "
            r"\(onnxruntime fp32 on host, 1 thread\); give a larger budget",
        ),
        (
            {"latency_ms": None, "file_mb": 1e-4},
            r"file_mb = 0\.0001: the smallest weights that can be reached are 0\.\d+ MB",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_smallest(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        solve(lift(tiny_vit()).architecture, **arguments)


def test_scores_of_another_size_are_refused() -> None:
    architecture = lift(tiny_vit()).architecture
    name = architecture.branches[0].name
    with pytest.raises(InputError, match=rf"scores: head/{name} has shape \(2,\), the network 3"):
        scored_losses(architecture, {"head": {name: torch.ones(2)}})


def test_an_unreachable_memory_names_the_least_with_activations_which_can_be_met() -> None:
    architecture = lift(tiny_vit(depth=2, img_size=64)).architecture
    pinned = scored_losses(architecture, squares(architecture), 4, gone={})
    for limit in ({}, {"latency_ms": 0.8 * TABLE.latency_ms(network_shape(architecture))}):
        given: dict[str, Any] = {"latency_ms": None, **limit, "table": TABLE, "losses": pinned}
        with pytest.raises(InputError) as caught:
            solve(architecture, **given, peak_memory_mb=0.01)
        words = str(caught.value)
        assert words.startswith("peak_memory_mb = 0.01: the smallest memory of weights and act")
        least = float(words.split(" is ")[1].split(" MB")[0])
        weights = solve(architecture, **given, file_mb=least).file_bytes
        assert weights < 1e6 * least
        found = solve(architecture, **given, peak_memory_mb=least)
        assert found.file_bytes < 1e6 * least
        with pytest.raises(InputError, match="the smallest memory of weights and activations"):
            solve(architecture, **given, peak_memory_mb=0.99 * least)


def squares(architecture: Architecture) -> dict[str, dict[str, torch.Tensor]]:
    """Equal scores of the units of all sub-layers."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for branch in architecture.branches:
        core: Any = branch.core
        if core.kind == "ffn":
            found.setdefault("ffn", {})[branch.name] = torch.ones(core.hidden)
        else:
            found.setdefault("qk", {})[branch.name] = torch.ones(core.qk)
            found.setdefault("v", {})[branch.name] = torch.ones(core.v)
    return found


def test_of_several_budgets_the_one_that_cannot_be_met_is_named() -> None:
    architecture = lift(tiny_vit(depth=2, img_size=64)).architecture
    dense = TABLE.latency_ms(network_shape(architecture))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"file_mb": 1e-4, "peak_memory_mb": 9.0}, "file_mb = 0.0001: the smallest weights that"),
        ({"file_mb": 9.0, "peak_memory_mb": 1e-4}, "peak_memory_mb = 0.0001: the smallest memory"),
    ]
    for limits, words in cases:
        for latency_ms in (None, dense):
            with pytest.raises(InputError) as caught:
                solve(architecture, latency_ms, TABLE, **limits)
            assert str(caught.value).startswith(words)
            assert "within" not in str(caught.value)


def test_budgets_that_exclude_each_other_are_named_with_the_least_latency_within_them() -> None:
    """An attention that is gone saves bytes; where it stays, tokens can leave."""
    architecture = lift(tiny_vit(depth=2, img_size=64)).architecture
    scores: dict[str, dict[str, torch.Tensor]] = {"head": {}}
    gone = {}
    for branch in architecture.branches:
        if branch.core.kind == "attention":
            scores["head"][branch.name] = torch.ones(3)
            gone[branch.name] = 1.0
    losses = scored_losses(architecture, scores, 4, token_losses(architecture), gone=gone)
    heavy = latency_table(costs_ms=COSTS | {"ffn products": 1e-4})
    given: dict[str, Any] = {"table": heavy, "losses": losses}
    least = smallest_latency_ms(architecture, losses, heavy)
    small = solve(architecture, None, file_mb=9.0, losses=losses).file_bytes
    with pytest.raises(InputError, match="the smallest weights that can be reached are") as caught:
        solve(architecture, None, **given, file_mb=1e-3)
    file_mb = float(str(caught.value).split(" are ")[1].split(" MB")[0])
    assert 1e6 * file_mb < small
    assert solve(architecture, None, **given, file_mb=file_mb).file_bytes <= 1e6 * file_mb
    limits: dict[str, Any] = {"latency_ms": 1.001 * least, "file_mb": file_mb}
    with pytest.raises(InputError) as caught:
        solve(architecture, **given, **limits)
    words = str(caught.value)
    assert words.startswith(f"file_mb = {file_mb:g}: the smallest weights that can be reached with")
    assert f"within latency_ms = {1.001 * least:g} are " in words
    larger = float(words.split(" are ")[1].split(" MB")[0])
    assert solve(architecture, **given, latency_ms=1.001 * least, file_mb=larger).counts[0] < 65
    # Fewer tokens need less memory, too, most of all in a batch.
    given["table"] = heavy.model_copy(update={"batch": 64})
    with pytest.raises(InputError, match="the smallest memory of weights and") as caught:
        solve(architecture, 100.0, **given, peak_memory_mb=1e-3)
    peak_mb = float(str(caught.value).split(" is ")[1].split(" MB")[0])
    assert solve(architecture, 100.0, **given, peak_memory_mb=peak_mb).latency_ms is not None
    with pytest.raises(InputError) as caught:
        solve(architecture, 100.0, **given, file_mb=file_mb, peak_memory_mb=peak_mb)
    assert str(caught.value) == (
        f"latency_ms = 100, file_mb = {file_mb:g}, peak_memory_mb = {peak_mb:g}: no network meets "
        "all of them at once; give larger budgets"
    )


@pytest.mark.parametrize(
    ("precision", "number"), [("fp32", 4), ("fp16", 2), ("int8", 4), ("int8-static", 1)]
)
def test_activations_have_the_width_of_the_runtime_and_the_batch_of_the_table(
    precision: str, number: int
) -> None:
    architecture = lift(tiny_vit(depth=2)).architecture
    one, eight = (latency_table(precision=precision, batch=batch) for batch in (1, 8))
    assert activation_bytes(one) == number
    assert activation_bytes(eight) == 8 * number
    assert weight_precision(one) == precision.removesuffix("-static")
    assert weight_precision(one, "fp16") == "fp16"
    dense = one.latency_ms(network_shape(architecture))
    # Without a precision of its own, the file is of the table's.
    found = solve(architecture, 2 * dense, one)
    assert found.file_bytes == pytest.approx(file_bytes(architecture, weight_precision(one)))
    pinned = scored_losses(architecture, squares(architecture), 4, gone={})
    least = []
    for table in (one, eight):
        with pytest.raises(InputError) as caught:
            solve(architecture, 2 * dense, table, losses=pinned, peak_memory_mb=1e-4)
        least.append(float(str(caught.value).split(" is ")[1].split(" MB")[0]))
    assert least[1] > least[0]
