"""A model at another image size equals timm's with the same weights, before and after a cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vitrim
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from tiny_models import relative_error, tiny_vit
from torch import nn
from vitrim import InputError, StructuredMask, compact, lift, resized
from vitrim.compress.network.architecture import Architecture, AttentionSpec
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.model import build as rebuilt
from vitrim.compress.network.patch_grid import parse_image_size
from vitrim.compress.surgery.image_size import at_image_size, exit_depths, whole_grid

# Name, what it covers, overrides beside the size, and the size in patches to resize to from 3 x 3.
KINDS: list[tuple[str, str, dict[str, Any], tuple[int, int]]] = [
    ("vit_tiny_patch16_224", "plain, larger", {}, (4, 5)),
    ("vit_tiny_patch16_224", "plain, smaller", {}, (2, 2)),
    ("vit_tiny_patch16_224", "one patch", {}, (1, 1)),
    ("deit_base_distilled_patch16_224", "two prefix tokens", {}, (2, 4)),
    ("deit3_base_patch16_224", "no position for the class token", {}, (4, 2)),
    ("beit_base_patch16_224", "relative bias with a class token, larger", {}, (5, 4)),
    (
        "beit_base_patch16_224",
        "own and shared, positions too, smaller",
        {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
        (2, 2),
    ),
    ("vit_relpos_base_patch16_224", "relative bias table", {"rel_pos_type": "bias"}, (2, 5)),
    ("vit_relpos_base_patch16_cls_224", "relative bias from an MLP, smaller", {}, (2, 3)),
    ("eva02_small_patch14_224", "rope stretched from a reference grid", {}, (4, 5)),
    ("vit_base_patch16_rope_224", "rope without a reference", {}, (4, 2)),
    ("vit_base_patch16_rope_mixed_224", "rope of learned frequencies", {}, (2, 4)),
    ("vit_tiny_patch16_dinov3_qkvb", "rope in halves, coordinates from -1 to 1", {}, (5, 2)),
    (
        "eva02_small_patch14_224",
        "rope of interleaved axes",
        {"rope_type": "mrope", "rope_rotate_half": True},
        (2, 4),
    ),
]


# Raised by timm's resampling of tables.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]


def build(name: str, overrides: dict[str, Any], grid: tuple[int, int] = (3, 3)) -> Any:
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    model: nn.Module = timm.create_model(
        name,
        depth=2,
        embed_dim=48,
        num_heads=3,
        img_size=(patch * grid[0], patch * grid[1]),
        **overrides,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "kind", "overrides", "grid"),
    KINDS,
    ids=[f"{name}: {kind}" for name, kind, *_ in KINDS],
)
def test_a_resized_model_equals_timms_with_the_same_weights(
    name: str, kind: str, overrides: dict[str, Any], grid: tuple[int, int]
) -> None:
    model = build(name, overrides)
    patch = model.patch_embed.patch_size[0]
    size = grid[0] * patch, grid[1] * patch
    theirs: Any = copy.deepcopy(model)
    theirs.set_input_size(img_size=size)
    images = torch.randn(2, 3, *size)
    ours = vitrim.resized(model, size)
    assert ours.architecture.image == (3, *size)
    mask = StructuredMask.random(model, 0.5, "unshared", per_head=True)
    with torch.no_grad():
        wanted = theirs(images)
        assert relative_error(ours(images), wanted) < 1e-5
        # Cut and then resized, resized and then cut, and resized by timm and then cut.
        first_cut = vitrim.resized(vitrim.compact(model, mask), size)(images)
        assert relative_error(first_cut, vitrim.compact(ours, mask)(images)) < 1e-5
        assert relative_error(first_cut, vitrim.compact(theirs, mask)(images)) < 1e-5


def test_an_oblong_table_is_resampled_as_timm_does() -> None:
    model = build("beit_base_patch16_224", {}, grid=(2, 3))
    theirs: Any = copy.deepcopy(model)
    theirs.set_input_size(img_size=(64, 80))
    images = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        assert relative_error(vitrim.resized(model, (64, 80))(images), theirs(images)) < 1e-5


@pytest.mark.parametrize("positions", ["learned", "factorized"])
def test_positions_that_are_resampled_for_each_image(positions: str) -> None:
    settings: dict[str, Any] = {
        "depth": 1,
        "embed_dim": 48,
        "num_heads": 3,
        "pos_embed": positions,
        "pos_embed_grid_size": (3, 3),
    }

    def at(side: int) -> nn.Module:
        torch.manual_seed(0)
        overlay = {"input_size": (3, side, side)}
        model: nn.Module = timm.create_model(
            "naflexvit_base_patch16_gap", pretrained_cfg_overlay=overlay, img_size=side, **settings
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        assert relative_error(vitrim.resized(at(48), 80)(images), at(80)(images)) < 1e-5
    # Read at 80, its positions come from a table of 48 that is not kept.
    with pytest.raises(
        InputError,
        match=r"image size 64x64: position: the positions were resampled "
        r".* lift the source model at 64x64",
    ):
        vitrim.resized(at(80), 64)


@pytest.mark.parametrize("channel", [0, 5])
def test_positions_of_a_single_channel_are_resampled_like_those_of_many(channel: int) -> None:
    """From 2 x 3 patches to 3 x 1, where torch 2.15 misreads the layout of a single channel."""
    model = build("vit_tiny_patch16_224", {}, grid=(2, 3))
    keep = torch.arange(48) == channel
    small = vitrim.compact(model, StructuredMask({"embed": {"*": keep}}))
    found = vitrim.resized(small, (48, 16)).state_dict()["position"]
    wanted = vitrim.resized(model, (48, 16)).state_dict()["position"][:, keep]
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_saved_and_loaded_model_can_be_resized(tmp_path: Path) -> None:
    model = build("vit_base_patch16_rope_mixed_224", {})
    small = vitrim.compact(model, StructuredMask.random(model, 0.5, "unshared", per_head=True))
    again = vitrim.load(vitrim.save(small, tmp_path / "small"))
    large = vitrim.resized(again, 64)
    assert torch.equal(
        large(images := torch.randn(1, 3, 64, 64)), vitrim.resized(small, 64)(images)
    )
    assert torch.equal(vitrim.load(vitrim.save(large, tmp_path / "large"))(images), large(images))
    # The source is unchanged, and shares no weights with the result.
    assert again.architecture.image == (3, 48, 48)
    assert {tensor.data_ptr() for tensor in again.parameters()}.isdisjoint(
        tensor.data_ptr() for tensor in large.parameters()
    )
    assert vitrim.resized(again, (48, 48)) is again


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_a_cut_and_a_new_size_may_come_in_any_order(data: Any) -> None:
    architecture = data.draw(architectures(resizable_rope=True))
    grid = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = 2 * grid[0], 2 * grid[1]
    # In the precision in which timm resamples tables.
    model = network(architecture).float().double()
    mask = StructuredMask.random(
        model, data.draw(st.sampled_from([0.4, 0.8])), "unshared", per_head=True
    )
    images = torch.randn(2, architecture.image[0], *size, dtype=torch.float64)
    try:
        small = vitrim.compact(model, mask)
    except InputError:
        # A reader of few channels may keep none, which is refused.
        reject()
    one = vitrim.resized(small, size)
    other = vitrim.compact(vitrim.resized(model, size), mask)
    assert one.architecture == other.architecture
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-5), name
    assert torch.allclose(one(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (
            20,
            "image size 20x20: height 20 does not make whole patches, which start every 8 pixels; "
            "16 and 24 are the nearest that work",
        ),
        (
            (16, 30),
            "image size 16x30: width 30 does not make whole patches, which start every 8 pixels; "
            "24 and 32 are the nearest that work",
        ),
        (
            5,
            "image size 5x5: height 5 does not make whole patches, which start every 8 pixels; "
            "8 is the smallest that works",
        ),
        (
            "16,5",
            "image size '16,5': write 160, or 160x192 for height x width, in pixels above 0 "
            "and up to 1000000",
        ),
        (0, "image size 0: write 160, or 160x192"),
        ((16, -8), r"image size (16, -8): write 160"),
        (True, "image size True: write 160"),
        (
            800_000,
            "image size 800000x800000: it makes 10000000001 tokens, more than the 65536 that this "
            "version supports; 2040x2040 is the largest square that works",
        ),
    ],
)
def test_an_impossible_size_is_refused_with_the_nearest_possible(size: Any, line: str) -> None:
    with pytest.raises(InputError) as refused:
        vitrim.resized(tiny_vit(), size)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_the_patches_of_an_overlapping_stem_follow_its_stride() -> None:
    """Three convolutions of stride 2: a patch starts every 8 pixels."""
    model = vitrim.lift(tiny_vit())
    data = model.architecture.model_dump(by_alias=True)
    conv = {"channels": 6, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    data["stem"] |= {"patch": (3, 3), "stride": (2, 2), "padding": (1, 1), "before": [conv, conv]}
    architecture = Architecture.model_validate(data)
    assert at_image_size(architecture, (24, 32)).grid == (3, 4)
    with pytest.raises(
        InputError,
        match="height 20 does not make whole patches, which start every 8 pixels; "
        "17 and 24 are the nearest",
    ):
        at_image_size(architecture, 20)
    assert vitrim.resized(CompactModel(architecture), (24, 32))(
        torch.zeros(1, 3, 24, 32)
    ).shape == (1, 5)


def test_a_trained_size_with_unused_pixels_stays_usable() -> None:
    model = vitrim.lift(tiny_vit())
    data = model.architecture.model_dump(by_alias=True) | {"image": (3, 19, 19)}
    model = rebuilt(Architecture.model_validate(data), model.state_dict())
    assert vitrim.resized(model, 27)(torch.zeros(1, 3, 27, 27)).shape == (1, 5)
    assert vitrim.resized(model, 32).architecture.grid == (4, 4)
    with pytest.raises(InputError, match=r"height 26 .* 24 and 27 are the nearest"):
        vitrim.resized(model, 26)


def test_a_table_computed_by_a_function_is_not_extrapolated() -> None:
    model = build("vit_relpos_base_patch16_224", {})
    with pytest.raises(
        InputError,
        match=r"image size 64x48: blocks\.0\.attn: its relative bias came from a function .* "
        r"the table ends at 3x3 patches",
    ):
        vitrim.resized(model, (64, 48))
    for block in model.blocks:
        block.attn.rel_pos.mode = "swin"
    with pytest.raises(
        InputError,
        match=r"image size 32x32: blocks\.0\.attn: its relative bias came from a function of "
        r"the offset's share",
    ):
        vitrim.resized(model, 32)


def test_a_rope_without_frequencies_is_refused_by_name() -> None:
    model = build("eva02_small_patch14_224", {})
    with torch.no_grad():
        model.rope.pos_embed.mul_(0.5)
    lifted = vitrim.lift(model)
    assert all(
        isinstance(b.core, AttentionSpec) is False or b.core.rope.at is None  # type: ignore[union-attr]
        for b in lifted.architecture.branches
    )
    with pytest.raises(
        InputError,
        match=r"image size 56x56: blocks\.0\.attn: its rotary table is saved without "
        r"the frequencies",
    ):
        vitrim.resized(lifted, 56)


def test_frequencies_in_half_precision_are_refused() -> None:
    model = vitrim.lift(build("vit_tiny_patch16_dinov3_qkvb", {})).half()
    with pytest.raises(
        InputError, match=r"blocks\.0\.attn: rotary frequencies in float16 are too coarse"
    ):
        vitrim.resized(model, 64)


def test_a_bias_table_of_one_patch_cannot_be_resized() -> None:
    with pytest.raises(
        InputError, match=r"blocks\.0\.attn: its relative bias table is for 1x1 patches"
    ):
        vitrim.resized(build("beit_base_patch16_224", {}, grid=(1, 1)), 32)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("160", (160, 160)),
        ("160x192", (160, 192)),
        (" 160 X 192 ", (160, 192)),
        ((8, 9), (8, 9)),
        ([8, 9], (8, 9)),
        (8, (8, 8)),
    ],
)
def test_a_size_is_parsed_from_text_and_numbers(text: Any, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"img_size": 32, "patch_size": 8}),
        ("beit_base_patch16_224", {"patch_size": 8}),
    ],
)
def test_a_token_mask_is_resampled_with_the_image_size(name: str, settings: dict[str, Any]) -> None:
    model = lift(tiny_vit(name, **({"img_size": 32} | settings)))
    prefix = model.architecture.prefix
    # Patches on the left half stay to the end, the others leave after the first block.
    left = torch.arange(16) % 4 < 2
    keep = torch.cat([torch.ones(prefix, dtype=torch.bool), left])
    cut = compact(model, StructuredMask({"token": {"blocks.0.ffn": keep}}))
    larger = resized(cut, 64)
    architecture = larger.architecture
    assert architecture.tokens_resampled
    assert not cut.architecture.tokens_resampled
    assert architecture.step_tokens(False)[-1] == prefix + 32
    depths = exit_depths(architecture)
    assert float(depths[:, :4].min()) > float(depths[:, 4:].max())
    with torch.no_grad():
        assert larger(torch.randn(1, 3, 64, 64)).isfinite().all()
    # The same size is the same network.
    assert resized(cut, 32).architecture == cut.architecture


def test_positions_of_patches_that_are_never_embedded_come_from_the_nearest() -> None:
    model = lift(tiny_vit(img_size=32))
    keep = torch.cat([torch.ones(1, dtype=torch.bool), torch.arange(16) % 4 < 2])
    cut = compact(model, StructuredMask({"token": {"stem.out": keep}}))
    assert cut.position is not None
    table = whole_grid(cut.position, cut.architecture).view(4, 4, -1)
    assert torch.equal(table[:, 2], table[:, 1])
    assert torch.equal(table[:, 3], table[:, 1])
    assert resized(cut, 64).architecture.patches == 32
