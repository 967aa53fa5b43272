"""Token masks: exact at every site, in any order of cuts, and refused where they are not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from tiny_models import add_noise, fvcore_macs, relative_error, tiny_vit, token_counts
from torch import Tensor
from vitrim import InputError, StructuredMask, compact, lift, load, masked, save
from vitrim.compress.masks.token_sets import token_sets
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import CompactModel

ATTENTION, FFN = "blocks.0.attn", "blocks.0.ffn"


def vit(**overrides: Any) -> CompactModel:
    """Three blocks on 16 patches and a class token."""
    return lift(tiny_vit(img_size=32, depth=3, **overrides))


def images(model: CompactModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *model.architecture.image, generator=generator)


def tokens(count: int, *kept: int) -> Tensor:
    """Booleans of `count` tokens."""
    keep = torch.zeros(count, dtype=torch.bool)
    keep[list(kept)] = True
    return keep


def error(model: CompactModel, mask: StructuredMask) -> float:
    with torch.no_grad():
        return relative_error(
            compact(model, mask).eval()(images(model)), masked(model, mask)(images(model))
        )


def test_patches_follow_the_order_in_which_they_leave() -> None:
    model = vit()
    mask = StructuredMask(
        {"token": {FFN: tokens(17, 0, 1, 4, 9, 16), "blocks.1.ffn": tokens(17, 0, 4, 16)}}
    )
    cut = compact(model, mask).architecture
    # Deepest first, then in the order of the picture. Place 0 of the grid is token 1.
    assert cut.order is not None
    assert cut.order[:4] == (3, 15, 0, 8)
    assert cut.step_tokens() == (5, 5, 3, 3, 3, 3)
    # The sub-layer before needs no query that only the FFN would read.
    assert [branch.tokens for branch in cut.branches] == [5, None, 3, None, None, None]
    assert error(model, mask) < 1e-5


def test_patches_that_the_stem_drops_are_never_embedded() -> None:
    model = vit()
    mask = StructuredMask({"token": {"stem.out": tokens(17, 0, 2, 3, 7)}})
    cut = compact(model, mask)
    assert cut.architecture.order == (1, 2, 6)
    assert cut.position is not None
    assert cut.position.shape == (3, 24)
    assert error(model, mask) < 1e-5
    other = images(model)
    other[:, :, 16:, 16:] = 0.0
    with torch.no_grad():
        assert torch.equal(cut.eval()(other), cut.eval()(images(model)))


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_parameters_are_counted_from_the_architecture(data: Any) -> None:
    architecture = data.draw(architectures())
    if architecture.pool.kind == "none":
        return
    mask = StructuredMask.random(architecture, {"token": 0.5, "ffn": 0.7}, seed=1)
    cut = compact(network(architecture), mask)
    assert count_params(cut.architecture) == sum(one.numel() for one in cut.parameters())
    assert count_macs(cut.architecture) <= count_macs(architecture)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_multiply_adds_are_those_that_fvcore_counts(pool: str) -> None:
    overrides = {"class_token": False} if pool != "token" else {}
    model = vit(global_pool=pool, **overrides)
    cut = compact(model, StructuredMask.random(model, {"token": 0.4}, seed=2)).eval()
    assert fvcore_macs(cut, images(model)[:1]) == count_macs(cut.architecture)


WIDTHS = {"embed": 0.6, "head": 0.7, "qk": 0.6, "v": 0.6, "ffn": 0.5}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_cuts_of_tokens_and_widths_commute(order: tuple[int, ...]) -> None:
    model = vit(num_heads=4)
    whole = StructuredMask.random(model, {**WIDTHS, "token": 0.4}, seed=5, scale="original")
    parts = [
        {"token": whole.kept["token"]},
        {name: whole.kept[name] for name in ("head", "qk", "v")},
        {name: whole.kept[name] for name in ("embed", "ffn")},
    ]
    small = model
    for number in order:
        kept = parts[number]
        if number == 1:
            # Rows of removed heads are gone with them; these masks are the same for all heads.
            assert all(entry.ndim == 1 for entries in kept.values() for entry in entries.values())
        small = compact(small, StructuredMask(kept, scale="original"))
    joint = compact(model, whole)
    assert small.architecture == joint.architecture
    for name, tensor in joint.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name]), name


def test_a_second_token_mask_cuts_the_compact_model_further() -> None:
    model = vit()
    once = compact(model, StructuredMask.random(model, {"token": 0.6}, seed=1))
    again = StructuredMask.random(once, {"token": 0.5}, seed=2)
    assert error(once, again) < 1e-5
    twice = compact(once, again)
    assert twice.architecture.order is not None
    assert set(twice.architecture.order) <= set(once.architecture.order or ())
    assert twice.architecture.final_tokens < once.architecture.final_tokens


def test_a_removed_sub_layer_still_drops_its_tokens() -> None:
    model = vit()
    mask = StructuredMask(
        {
            "token": {"blocks.1.attn": tokens(17, 0, 5, 6)},
            "block": {"blocks.1.attn": torch.zeros(1, dtype=torch.bool)},
        }
    )
    cut = compact(model, mask).architecture
    # The attention before it computes what the removed one would have left.
    assert cut.step_tokens()[0] == 3
    assert error(model, mask) < 1e-5


def test_an_attention_without_heads_still_drops_its_tokens() -> None:
    model = vit()
    mask = StructuredMask(
        {
            "token": {"blocks.1.attn": tokens(17, 0, 5, 6)},
            "head": {"blocks.1.attn": torch.zeros(3, dtype=torch.bool)},
        }
    )
    assert error(model, mask) < 1e-5
    assert compact(model, mask).architecture.step_tokens()[0] == 3


def test_last_queries_is_a_token_mask() -> None:
    model = vit()
    only = StructuredMask({"token": {"blocks.2.attn": tokens(17, 0)}})
    shorter = compact(model, StructuredMask({}), last_queries=True)
    cut = compact(model, only)
    assert cut.architecture.step_tokens() == shorter.architecture.step_tokens()
    assert count_macs(cut.architecture) == count_macs(shorter.architecture)
    with torch.no_grad():
        assert torch.equal(cut.eval()(images(model)), shorter.eval()(images(model)))


def test_masks_and_models_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = vit()
    mask = StructuredMask.random(model, {"token": 0.5, "ffn": 0.5}, seed=4)
    mask.save(tmp_path / "mask.safetensors")
    read = StructuredMask.load(tmp_path / "mask.safetensors")
    assert token_counts(model.architecture, read) == token_counts(model.architecture, mask)
    cut = compact(model, mask).eval()
    save(cut, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.architecture == cut.architecture
    with torch.no_grad():
        assert torch.equal(again.eval()(images(model)), cut(images(model)))


def test_features_of_patches_that_left_are_zero() -> None:
    model = vit()
    mask = StructuredMask({"token": {FFN: tokens(17, 0, 1, 4)}})
    cut = compact(model, mask).eval()
    with torch.no_grad():
        features = cut.forward_features(images(model))
        logits = cut.forward_head(features)
        maps = cut.forward_intermediates(images(model), [0], intermediates_only=True)[0]
        assert relative_error(logits, cut(images(model))) < 1e-6
    assert features.shape == (2, 17, 24)
    computed = features.abs().sum(dim=(0, 2)) > 0
    assert torch.nonzero(computed).flatten().tolist() == [0, 1, 4]
    assert torch.nonzero(maps.abs().sum(dim=(0, 1)).flatten()).flatten().tolist() == [0, 3]


def test_gradients_reach_only_the_pixels_of_patches_that_are_read() -> None:
    model = vit()
    mask = StructuredMask({"token": {"stem.out": tokens(17, 0, 1, 6)}})
    grads = []
    for network_ in (masked(model, mask), compact(model, mask)):
        pixels = images(model).requires_grad_()
        network_(pixels).square().sum().backward()
        assert pixels.grad is not None
        grads.append(pixels.grad)
    assert relative_error(grads[1], grads[0]) < 1e-5
    touched = grads[1].abs().sum(dim=(0, 1)).reshape(4, 8, 4, 8).sum(dim=(1, 3))
    assert torch.nonzero(touched.flatten()).flatten().tolist() == [0, 5]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 56, "patch_size": 14}),
        ("beit_base_patch16_224", {"img_size": 32}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "patch_size": 14}),
        ("vit_small_plus_patch16_dinov3", {"img_size": 32}),
    ],
)
def test_positions_and_prefix_tokens_follow_the_order(name: str, overrides: dict[str, Any]) -> None:
    model = lift(tiny_vit(name, depth=3, num_heads=3, embed_dim=24, **overrides))
    for seed in range(2):
        mask = StructuredMask.random(model, {"token": 0.4, "head": 0.7, "ffn": 0.6}, seed=seed)
        assert error(model, mask) < 1e-5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {ATTENTION: tokens(17, 0, 1), FFN: tokens(17, 0, 1, 8)},
            "mask token/blocks.0.ffn keeps 1 tokens that an earlier site has dropped, the first is "
            "token 8; the sets must be nested",
        ),
        ({FFN: tokens(17, 1, 2)}, "mask token/blocks.0.ffn drops token 0, which the head reads"),
        ({"stem.out": tokens(17, 0)}, "mask token/stem.out keeps no patch"),
        ({"*": tokens(17, 0)}, "mask token/*: token masks are not shared"),
        ({FFN: tokens(50, 0)}, "mask token/blocks.0.ffn has 50 entries, the model has 17"),
        ({"blocks.9.ffn": tokens(17, 0)}, "mask token/blocks.9.ffn: this model has no such site"),
    ],
)
def test_impossible_token_masks_are_refused(entries: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError) as caught:
        compact(vit(), StructuredMask({"token": entries}))
    assert message in str(caught.value)


def test_a_pooled_network_keeps_a_patch() -> None:
    pooled = vit(class_token=False, global_pool="avg")
    empty = StructuredMask({"token": {FFN: tokens(16)}})
    with pytest.raises(InputError, match="keeps 0 of 16 tokens; the head needs at least 1"):
        compact(pooled, empty)
    with_class = vit(global_pool="avg")
    only_class = StructuredMask({"token": {FFN: tokens(17, 0)}})
    with pytest.raises(InputError, match=r"blocks\.0\.ffn keeps no patch; the head pools"):
        compact(with_class, only_class)


def test_a_network_that_returns_every_token_drops_none() -> None:
    model = vit(num_classes=0, global_pool="")
    with pytest.raises(InputError, match="the network returns every token"):
        StructuredMask.random(model, {"token": 0.5})
    with pytest.raises(InputError, match="drops 16 tokens, and the network returns every token"):
        compact(model, StructuredMask({"token": {FFN: tokens(17, 0)}}))


def test_sets_are_nested_and_keep_the_requested_share() -> None:
    model = vit()
    for seed in range(5):
        mask = StructuredMask.random(model, {"token": 0.25}, seed=seed)
        sets = token_sets(model.architecture, mask.kept["token"])
        assert int(sets[-1].sum()) == 1 + 4
        assert all(bool((small <= large).all()) for large, small in itertools.pairwise(sets))


def test_a_mask_that_keeps_all_tokens_changes_nothing() -> None:
    model = lift(add_noise(tiny_vit(img_size=32)))
    mask = StructuredMask({"token": {FFN: torch.ones(17, dtype=torch.bool)}})
    cut = compact(model, mask)
    assert cut.architecture == model.architecture
