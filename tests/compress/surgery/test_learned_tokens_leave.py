"""Learned tokens that leave before patches: registers, and a class token that the head ignores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_networks import architectures, early_learned_tokens, network, token_masks
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from vitrim import InputError, StructuredMask, compact, lift, load, masked, resized, save
from vitrim.compress.masks.gates import Gates
from vitrim.compress.masks.groups import sites, token_sites
from vitrim.compress.masks.token_sets import random_token_sets
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.cost import live_cost
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.token_order import grid_places, stem_runs
from vitrim.compress.surgery.plan import plan
from vitrim.compress.tokens.counts import counts_for_macs

WIDTHS = {"embed": 0.7, "head": 0.7, "qk": 0.7, "v": 0.7, "ffn": 0.6, "block": 0.8}


def registers(**overrides: Any) -> CompactModel:
    """A class token, four registers and 16 patches."""
    return lift(tiny_vit("vit_small_patch14_reg4_dinov2", img_size=32, depth=3, **overrides))


def token_mask(architecture: Architecture, seed: int, learned: float = 0.4) -> StructuredMask:
    generator = torch.Generator().manual_seed(seed)
    return StructuredMask(
        {"token": random_token_sets(architecture, 0.4, generator, learned_ratio=learned)}
    )


def images(model: CompactModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    reference = next(model.parameters())
    return torch.randn(2, *model.architecture.image, generator=generator).to(reference.dtype)


def error(model: CompactModel, mask: StructuredMask) -> float:
    with torch.no_grad():
        return relative_error(
            compact(model, mask).eval()(images(model)), masked(model, mask)(images(model))
        )


def test_a_register_stands_before_the_patches_that_leave_before_it() -> None:
    model = registers()
    sites = list(token_sites(model.architecture))
    entries = {site: torch.ones(21, dtype=torch.bool) for site in sites}
    # Patch 0 of the grid (token 5) leaves at the stem, register 2 behind the first FFN, the patches
    # 1 to 3 behind the second.
    for number, site in enumerate(sites):
        entries[site][5] = False
        entries[site][2] = number < 2
        entries[site][6:9] = number < 4
    cut = compact(model, StructuredMask({"token": entries})).architecture
    assert (cut.prefix, cut.inner) == (4, (19,))
    assert (cut.learned, cut.source_prefix) == ((0, 1, 3, 4, 2), 5)
    assert stem_runs(cut) == ((True, 0, 4), (False, 0, 15), (True, 4, 5))
    assert cut.token_places[:4] == (0, 1, 3, 4)
    assert cut.token_places[-1] == 2
    assert error(model, StructuredMask({"token": entries})) < 1e-5


def test_a_register_that_leaves_at_the_stem_is_no_parameter_any_more() -> None:
    model = registers()
    keep = torch.ones(21, dtype=torch.bool)
    keep[[1, 3]] = False
    cut = compact(model, StructuredMask({"token": {"stem.out": keep}}))
    assert cut.prefix is not None
    assert cut.prefix.shape[0] == 3
    assert (cut.architecture.learned, cut.architecture.inner) == ((0, 2, 4), None)
    assert cut.num_prefix_tokens == 5
    assert error(model, StructuredMask({"token": {"stem.out": keep}})) < 1e-5


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_masked_equals_compact_where_learned_tokens_leave(data: Any) -> None:
    architecture = data.draw(architectures())
    model = network(architecture, data.draw(st.integers(0, 9)))
    mask = data.draw(token_masks(architecture))
    if data.draw(st.booleans()):
        widths = StructuredMask.random(architecture, {**WIDTHS, "token": 1.0}, seed=1)
        entries = {name: kept for name, kept in widths.kept.items() if name != "token"}
        mask = StructuredMask({**entries, **mask.kept})
    cut = compact(model, mask)
    with torch.no_grad():
        wanted = masked(model, mask)(images(model))
        assert relative_error(cut.eval()(images(model)), wanted) < 1e-9
    assert count_params(cut.architecture) == sum(one.numel() for one in cut.parameters())


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_second_cut_is_exact_and_commutes(data: Any) -> None:
    architecture = data.draw(architectures())
    assume(architecture.prefix > 1)
    model = network(architecture)
    first = compact(model, data.draw(token_masks(architecture)))
    second = data.draw(token_masks(first.architecture))
    with torch.no_grad():
        wanted = masked(first, second)(images(model))
        assert relative_error(compact(first, second).eval()(images(model)), wanted) < 1e-9
    widths = StructuredMask.random(first.architecture, {**WIDTHS, "token": 1.0}, seed=2)
    widths = StructuredMask({name: kept for name, kept in widths.kept.items() if name != "token"})
    one = compact(compact(first, widths), second) if _keeps_steps(first, widths) else None
    other = compact(first, StructuredMask({**widths.kept, **second.kept}))
    if one is not None:
        with torch.no_grad():
            assert relative_error(one(images(model)), other(images(model))) < 1e-9


def _keeps_steps(model: CompactModel, mask: StructuredMask) -> bool:
    """Whether a width mask leaves every step, the sites of token masks, as it is."""
    cut = compact(model, mask).architecture
    return token_sites(cut) == token_sites(model.architecture)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_live_cost_counts_learned_tokens_that_leave(data: Any) -> None:
    architecture = data.draw(architectures(countable=True))
    entries = data.draw(token_masks(architecture)).kept["token"]
    for last_queries in (False, True):
        source = architecture.model_copy(update={"last_queries": last_queries})

        def live(dimension: str, site: str, indices: Any) -> int:
            if dimension == "token":
                keep = entries[site]
                return int((keep if indices is None else keep[list(indices)]).sum())
            return sites(architecture, dimension)[site] if indices is None else len(indices)

        cut = plan(architecture, StructuredMask({"token": entries})).architecture
        built = cut.model_copy(update={"last_queries": last_queries})
        assert live_cost(source, live, "macs") == count_macs(built)
        assert live_cost(source, live, "params") == count_params(built)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_is_saved_with_its_order(tmp_path: Path, seed: int) -> None:
    cut = compact(registers(), token_mask(registers().architecture, seed)).eval()
    assert cut.architecture.source_prefix == 5
    save(cut, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).eval()(images(cut)), cut(images(cut)))


def test_tokens_of_the_source_model_that_left_are_zero() -> None:
    model = registers()
    keep = torch.ones(21, dtype=torch.bool)
    keep[[1, 8]] = False
    cut = compact(model, StructuredMask({"token": {"blocks.1.ffn": keep}})).eval()
    with torch.no_grad():
        found = cut.forward_features(images(cut))
        assert found.shape == model.forward_features(images(model)).shape
        left = (found.abs().sum(dim=(0, 2)) == 0).nonzero().flatten().tolist()
        assert left == [1, 8]
        torch.testing.assert_close(cut.forward_head(found), cut(images(cut)))


def test_another_image_size_keeps_learned_tokens_in_front_of_what_leaves_before_them() -> None:
    model = lift(tiny_vit("vit_small_patch16_dinov3", img_size=32, depth=3)).eval()
    # A grid of 4 x 4 patches, a class token, registers 1 to 4.
    sites = list(token_sites(model.architecture))
    depth = torch.full((21,), len(sites))
    depth[13:17] = 1
    depth[2] = 2
    depth[17:] = 3
    mask = StructuredMask({"token": {s: depth > number for number, s in enumerate(sites)}})
    cut = compact(model, mask).eval()
    assert cut.architecture.inner == (16,)
    larger = resized(cut, 64).architecture
    # Every set has the learned tokens that it had, and four times as many patches.
    assert larger.tokens == 5 + 64
    assert larger.step_tokens() == tuple(
        count - old + 4 * old
        for count, old in (
            (count, len(grid_places(cut.architecture, count)))
            for count in cut.architecture.step_tokens()
        )
    )
    assert larger.inner == (4 + 4 * 12,)
    with torch.no_grad():
        assert resized(cut, 64).eval()(torch.randn(1, 3, 64, 64)).isfinite().all()
        # There and back the network is the same.
        back = resized(resized(cut, 64), 32).eval().architecture
    assert (back.inner, back.step_tokens()) == (
        cut.architecture.inner,
        cut.architecture.step_tokens(),
    )


@pytest.mark.parametrize(
    "purpose",
    [
        lambda model: vitrim.choose_tokens(model, "radial", macs=0.6),
        lambda model: vitrim.choose_tokens(model, "random", [21, 21, 9, 9, 9, 9, 9]),
        lambda model: counts_for_macs(model.architecture, "uniform", 0.8, "macs"),
        lambda model: Gates(model.architecture, "residual", tokens=True),
    ],
)
def test_choosers_refuse_a_network_with_learned_tokens_between_patches(purpose: Any) -> None:
    cut = compact(registers(), early_learned_tokens(registers().architecture))
    assert cut.architecture.inner is not None
    with pytest.raises(InputError, match="of this network is learned and stands between"):
        purpose(cut)


def test_a_selection_moves_all_learned_tokens_on() -> None:
    selecting = vitrim.select_tokens(registers(), "random", ratio=0.5, stages=[1])
    keep = torch.ones(21, dtype=torch.bool)
    keep[3] = False
    message = "mask token/stem.out drops learned token 3; select.1 chooses patches for each image"
    with pytest.raises(InputError, match=message):
        compact(selecting, StructuredMask({"token": {"stem.out": keep}}))
    # Before the selection is added, they may leave.
    cut = compact(registers(), StructuredMask({"token": {"stem.out": keep}}))
    assert vitrim.select_tokens(cut, "random", ratio=0.5, stages=[1]).architecture.prefix == 4
