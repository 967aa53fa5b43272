"""Every kind of plain Vision Transformer in timm: lifted equals source, compact equals masked."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from tiny_models import add_noise, assert_exact, relative_error
from torch import nn
from vitrim import InputError, StructuredMask, UnsupportedModel, compact, lift, load, masked, save

# Name, the kind that it represents, overrides other than the size.
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", "plain", {}),
    ("vit_tiny_patch16_224", "max pooling", {"global_pool": "max", "class_token": False}),
    (
        "vit_tiny_patch16_224",
        "avgmax pooling, prefix included",
        {"global_pool": "avgmax", "pool_include_prefix": True},
    ),
    ("vit_tiny_patch16_224", "refining attention pool", {"global_pool": "prr"}),
    ("vit_tiny_patch16_224", "features, no classifier", {"num_classes": 0}),
    ("vit_tiny_patch16_224", "tokens", {"num_classes": 0, "global_pool": ""}),
    (
        "vit_tiny_patch16_224",
        "tokens, no norm either",
        {"num_classes": 0, "global_pool": "", "final_norm": False},
    ),
    ("vit_base_patch16_siglip_224", "attention pooling, no classifier", {"num_classes": 0}),
    ("vit_tiny_patch16_224", "features, no norm either", {"num_classes": 0, "final_norm": False}),
    ("vit_tiny_patch16_224", "scale norms", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    ("deit3_base_patch16_224", "layer scale, no position for the class token", {}),
    ("deit_base_distilled_patch16_224", "distillation token", {}),
    ("deit_base_distilled_patch16_224", "distillation token, no classifier", {"num_classes": 0}),
    ("vit_base_patch16_clip_quickgelu_224", "pre-norm, quick GELU", {}),
    ("vit_base_patch16_18x2_224", "two parallel sub-layers", {}),
    ("vit_base_patch16_xp_224", "attention and FFN in one projection", {}),
    ("vit_dpwee_patch16_reg1_gap_256", "the same, differential", {}),
    ("vit_dwee_patch16_reg1_gap_256", "differential attention", {}),
    ("vit_base_patch16_rpn_224", "norm after the sub-layer", {}),
    ("vit_so400m_patch14_siglip_224", "attention pooling", {}),
    ("aimv2_1b_patch14_224", "norm inside the patch embedding, SwiGLU, RMSNorm", {}),
    ("eva02_small_patch14_224", "rope, packed SwiGLU, no k bias", {}),
    ("eva02_base_patch14_224", "rope, separate projections, norm in the SwiGLU", {}),
    ("eva_giant_patch14_224", "EVA without rope", {}),
    ("vit_base_patch16_rope_mixed_224", "rope with a table per head", {}),
    ("vit_tiny_patch16_dinov3_qkvb", "rope in halves", {}),
    ("vit_base_patch16_sapiens2", "grouped queries", {"num_kv_heads": (3, 1)}),
    ("beit_base_patch16_224", "relative bias tables with a class token", {}),
    ("beit_base_patch16_224", "relative bias, own and shared", {"use_shared_rel_pos_bias": True}),
    ("vit_relpos_base_patch16_224", "relative bias from an MLP", {}),
    ("vit_relpos_base_patch16_cls_224", "relative bias from an MLP, class token", {}),
    ("vit_srelpos_small_patch16_224", "relative bias shared", {}),
    ("vit_relpos_base_patch16_224", "relative bias table", {"rel_pos_type": "bias"}),
    ("naflexvit_base_patch16_gap", "resampled positions, Linear patches", {}),
    ("naflexvit_base_patch16_map", "attention pooling without prefix tokens", {"reg_tokens": 1}),
]


def build(name: str, overrides: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    size = (2 * patch, 3 * patch)
    settings: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": size}
    if name.startswith("naflexvit"):
        settings |= {
            "pos_embed_grid_size": (4, 3),
            "pretrained_cfg_overlay": {"input_size": (3, *size)},
        }
    return add_noise(timm.create_model(name, **settings | overrides))


@pytest.mark.parametrize(
    ("name", "kind", "overrides"), KINDS, ids=[f"{name}: {kind}" for name, kind, _ in KINDS]
)
def test_lift_equals_source_and_compact_equals_masked(
    name: str, kind: str, overrides: dict[str, Any]
) -> None:
    model = build(name, overrides)
    images = torch.randn(2, *lift(model).architecture.image)
    assert_exact(model, images, per_head=(True, True, False))


def test_a_compact_model_is_pruned_again() -> None:
    grouped = {"num_kv_heads": (3, 1), "qk_norm": True}
    for name, overrides in (
        ("vit_base_patch16_rope_mixed_224", {}),
        ("vit_dwee_patch16_reg1_gap_256", {}),
        ("vit_base_patch16_sapiens2", grouped),
    ):
        model = build(name, overrides)
        once = compact(model, StructuredMask.random(model, 0.7, "unshared", per_head=True))
        mask = StructuredMask.random(once, 0.5, "unshared", seed=1, per_head=True)
        images = torch.randn(1, *once.architecture.image)
        with torch.no_grad():
            assert relative_error(compact(once, mask)(images), masked(once, mask)(images)) < 1e-5


def test_a_saved_model_is_loaded_bit_equal(tmp_path: Any) -> None:
    for number, name in enumerate(
        ["beit_base_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "vit_so400m_patch14_siglip_224"]
    ):
        model = build(name, {})
        small = compact(model, StructuredMask.random(model, 0.5, "unshared", per_head=True))
        images = torch.randn(1, *small.architecture.image)
        again = load(save(small, tmp_path / str(number)))
        assert torch.equal(again(images), small(images))


def test_a_split_rope_pair_is_refused_with_the_reason() -> None:
    model = build("vit_tiny_patch16_dinov3_qkvb", {})
    keep = torch.ones(16, dtype=torch.bool)
    keep[3] = False
    with pytest.raises(
        InputError,
        match=r"mask qk/blocks\.0\.attn splits columns 3 and 11: "
        "rotary position embedding rotates them as a pair",
    ):
        compact(model, StructuredMask({"qk": {"blocks.0.attn": keep}}))


def test_heads_that_share_keys_must_keep_the_same_columns() -> None:
    model = build("vit_base_patch16_sapiens2", {"num_kv_heads": (3, 1)})
    keep = torch.ones(3, 16, dtype=torch.bool)
    keep[0, :8], keep[1:, 8:] = False, False
    with pytest.raises(
        InputError,
        match=r"mask v/blocks\.1\.attn: "
        "heads that share keys and values must keep the same columns",
    ):
        compact(model, StructuredMask({"v": {"blocks.1.attn": keep}}))


def test_a_classifier_on_every_token_is_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match="global_pool = '': no rule for a classifier on every token; create"
    ):
        lift(build("vit_tiny_patch16_224", {"global_pool": ""}))


def test_units_of_the_pooling_head_are_not_part_of_a_shared_mask() -> None:
    lifted = lift(build("vit_so400m_patch14_siglip_224", {}))
    mask = StructuredMask.random(lifted, 0.5, "full")
    assert set(mask.kept["head"]) == {"*", "pool.attn"}
    assert set(mask.kept["embed"]) == {"*", "pool.out"}
    ffn = lifted.architecture.pool.ffn
    assert ffn is not None
    none = torch.zeros(ffn.hidden, dtype=torch.bool)
    with pytest.raises(
        InputError,
        match=r"mask ffn/pool\.ffn keeps nothing; the pooling head needs one unit at least",
    ):
        compact(lifted, StructuredMask({"ffn": {"pool.ffn": none}}))
