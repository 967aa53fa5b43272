"""Pruning without training: allocation, compensation, and the whole of it on random networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from tiny_models import assert_equal_outputs, relative_error, tiny_vit
from torch import nn
from vitrim import InputError, StructuredMask, compact, lift, masked
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.oneshot.allocation import Option, allocate
from vitrim.compress.oneshot.compensation import compensate
from vitrim.compress.oneshot.stream_rotation import rescaled_norms
from vitrim.compress.oneshot.trim import TrimOptions, trim

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
NO_FIT = TrimOptions(compensate=False, round_to=1)


def _images(count: int = 40, seed: int = 0) -> torch.Tensor:
    # Smooth pictures: noise alone has no structure that a network could be cut by.
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=16, mode="bilinear")


@settings(max_examples=25, suppress_health_check=SLOW)
@given(architecture=architectures(), macs=st.sampled_from([0.5, 0.8]))
def test_the_cut_equals_the_masked_network_for_every_kind(
    architecture: Architecture, macs: float
) -> None:
    model = network(architecture)
    images = torch.randn(12, *architecture.image, dtype=torch.float64)
    try:
        found = trim(model, images, macs=macs, options=NO_FIT)
    except InputError as error:
        if "give a larger budget" not in str(error):
            raise
        reject()
    exact = compact(found.rotated, found.mask)
    width = found.rotated.architecture.embed
    with torch.no_grad():
        wanted = masked(found.rotated, found.mask)(images)
        assert_equal_outputs(exact(images), wanted, 1e-6)
        if "embed" in found.mask.kept:
            # Norms of a narrower rotated stream divide by its former width.
            exact = rescaled_norms(exact, width)
        assert_equal_outputs(found.model(images), exact(images), 1e-6)


@settings(max_examples=25, suppress_health_check=SLOW)
@given(architecture=architectures(), seed=st.integers(0, 99))
def test_compensation_never_moves_a_sub_layer_away_from_the_dense_stream(
    architecture: Architecture, seed: int
) -> None:
    model = network(architecture)
    images = torch.randn(24, *architecture.image, dtype=torch.float64)
    mask = StructuredMask.random(architecture, {"ffn": 0.5, "head": 0.6, "v": 0.6}, seed=seed)
    _, fits = compensate(compact(model, mask), model, images, mask=mask)
    for fit in fits:
        assert fit.after <= fit.before


def test_nothing_removed_means_nothing_changed() -> None:
    model = lift(tiny_vit())
    found, fits = compensate(model, model, _images())
    images = _images(4, seed=1)
    with torch.no_grad():
        assert relative_error(found(images), model(images)) < 1e-4
    assert max(fit.after for fit in fits) < 1e-6


def test_a_unit_that_copies_another_one_is_removed_exactly() -> None:
    source = tiny_vit()
    mlp = source.blocks[0].mlp  # type: ignore[index,union-attr]
    with torch.no_grad():
        mlp.fc1.weight[7], mlp.fc1.bias[7] = mlp.fc1.weight[3], mlp.fc1.bias[3]
    keep = torch.ones(96, dtype=torch.bool)
    keep[7] = False
    small = compact(source, StructuredMask({"ffn": {"blocks.0.ffn": keep}}))
    images = _images(200)
    found, fits = compensate(small, source, images)
    with torch.no_grad():
        before = relative_error(small(images[:8]), source(images[:8]))
        after = relative_error(found(images[:8]), source(images[:8]))
    assert after < 1e-3 * before
    assert fits[1].after < 1e-3 * fits[1].before


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met(kind: str) -> None:
    model = tiny_vit(depth=3)
    found = trim(model, _images(), **{kind: 0.7}, options=TrimOptions(round_to=4))  # type: ignore[arg-type]
    dense = lift(model).architecture.model_copy(update={"last_queries": True})
    count = count_macs if kind == "macs" else count_params
    assert count(found.model.architecture) <= 0.7 * count(dense)
    assert found.cost == count(found.model.architecture) / count(dense)
    assert found.predicted_error > 0
    assert -1 <= found.check.cosine <= 1


def test_compensation_brings_the_features_nearer() -> None:
    model = tiny_vit(depth=3)
    without = trim(model, _images(200), macs=0.6, options=TrimOptions(4, compensate=False))
    with_fit = trim(model, _images(200), macs=0.6, options=TrimOptions(4))
    assert with_fit.check.cosine > without.check.cosine
    assert with_fit.mask.kept.keys() == without.mask.kept.keys()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cut_works_where_gradients_are_switched_off(mode: Callable[[], Any]) -> None:
    model, images = tiny_vit(), _images()
    wanted = trim(model, images, macs=0.8, options=TrimOptions(4))
    with mode():
        found = trim(model, images, macs=0.8, options=TrimOptions(4))
    assert found.predicted_error == pytest.approx(wanted.predicted_error)


def test_a_network_without_a_head_is_trimmed_by_its_features() -> None:
    model = tiny_vit(num_classes=0)
    found = trim(model, _images(), macs=0.8, options=TrimOptions(4))
    assert found.check.agreement is None
    with torch.no_grad():
        assert found.model(_images(2)).shape == model(_images(2)).shape


def test_a_cost_of_ones_own_decides() -> None:
    free_ffn = TrimOptions(
        4, cost=lambda spec, embed, tokens, queries: float(spec.core.kind == "attention") * 10
    )
    found = trim(tiny_vit(), _images(), macs=0.6, options=free_ffn)
    assert {name for name, widths in found.widths.items() if widths.get("head") == 0}
    assert all(widths.get("ffn", 96) == 96 for widths in found.widths.values())


def test_the_allocation_spends_the_budget_where_it_helps_most() -> None:
    fronts = {
        "a": [Option({}, 0.0, 10.0), Option({}, 1.0, 5.0), Option({}, 100.0, 0.0)],
        "b": [Option({}, 0.0, 10.0), Option({}, 3.0, 5.0), Option({}, 4.0, 0.0)],
    }
    chosen = allocate(fronts, 10.0)
    assert (chosen["a"].cost, chosen["b"].cost) == (10.0, 0.0)
    with pytest.raises(InputError, match=r"the budget leaves -1 .* give a larger budget"):
        allocate(fronts, -1.0)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one budget, macs or params"),
        ({"macs": 0.5, "params": 0.5}, "give one budget, macs or params"),
        ({"macs": 1.5}, r"macs = 1.5: give the share to keep, between 0 and 1"),
        ({"params": 0.001}, "give a larger budget"),
    ],
)
def test_an_impossible_budget_is_refused(budget: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trim(tiny_vit(), _images(8), **budget)  # type: ignore[arg-type]


def test_compensation_refuses_networks_that_do_not_belong_together() -> None:
    model = tiny_vit()
    narrow = compact(model, StructuredMask.random(model, {"embed": 0.5}))
    with pytest.raises(InputError, match="12 of 24 channels, not 24; give the mask of the cut"):
        compensate(narrow, model, _images(8))
    other = tiny_vit(depth=1)
    with pytest.raises(InputError, match=r"no sub-layer 'blocks\.1\.attn'"):
        compensate(model, other, _images(8))


def test_removed_channels_are_compensated_with_the_mask() -> None:
    model = tiny_vit()
    mask = StructuredMask.random(model, {"embed": 0.75}, scale="original")
    small = compact(model, mask)
    found, fits = compensate(small, model, _images(100), mask=mask)
    assert sum(fit.after for fit in fits) < sum(fit.before for fit in fits)
    assert found.architecture.embed == 18
