"""Modules without a converter are read by timm's names, and refused if their outputs differ."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from lv_vit import LVViT
from t2t_vit import T2TBackbone, T2TViT
from tiny_models import add_noise, assert_exact, tiny_vit
from torch import Tensor, nn
from vitrim import UnsupportedModel, lift
from vitrim.compress.network.count import count_params


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return add_noise(model)


def test_lv_vit_is_pruned_exactly() -> None:
    lifted = assert_exact(
        randomized(LVViT(img_size=32, embed_dim=24, depth=2, num_heads=3, classes=5)),
        torch.randn(2, 3, 32, 32),
    )
    assert lifted.architecture.pool.kind == "dense"
    assert [conv.kernel for conv in lifted.architecture.stem.before] == [(7, 7), (3, 3), (3, 3)]


def test_the_backbone_of_t2t_vit_is_pruned_exactly() -> None:
    backbone = randomized(T2TBackbone(side=8, embed_dim=24, depth=2, num_heads=3, classes=5))
    lifted = assert_exact(backbone, torch.randn(2, 64, 8, 8))
    assert lifted.architecture.image == (64, 8, 8)
    assert lifted.architecture.grid == (4, 4)


def test_the_test_models_have_the_published_sizes() -> None:
    with torch.device("meta"):
        lv_vit, t2t_vit = LVViT(), T2TViT()
    assert round(sum(p.numel() for p in lv_vit.parameters()) / 1e6, 2) == 26.15
    assert round(sum(p.numel() for p in t2t_vit.parameters()) / 1e6, 1) == 21.5


def test_a_stem_without_a_rule_is_refused_with_its_path() -> None:
    model: Any = randomized(T2TViT(img_size=32, token_dim=4, embed_dim=24, depth=1, num_heads=3))
    model.tokens_to_token = nn.Sequential(model.tokens_to_token)
    with pytest.raises(
        UnsupportedModel,
        match=r"tokens_to_token: .*Sequential where a convolutional patch_embed, or soft splits "
        "as in T2T-ViT, were expected; lift what comes after",
    ):
        lift(model)


def test_lifting_restores_the_training_mode_of_every_module() -> None:
    model = randomized(LVViT(img_size=32, embed_dim=24, depth=1, num_heads=3, classes=5)).train()
    first = model.get_submodule("blocks.0").eval()
    lifted = lift(model)
    assert lifted.training
    assert model.training
    assert not first.training


class DoublesQueries(nn.Module):
    """An attention with timm's names and another computation."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.scale = (
            other.qkv,
            other.proj,
            other.num_heads,
            other.scale,
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(2 * q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


def test_an_attention_with_the_same_names_but_other_outputs_is_refused() -> None:
    model: Any = tiny_vit()
    model.blocks[1].attn = DoublesQueries(model.blocks[1].attn)
    with pytest.raises(
        UnsupportedModel,
        match=r"blocks\.1\.attn: .*DoublesQueries has timm's names, but does not compute softmax",
    ):
        lift(model)


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_a_dropout_that_was_replaced_is_refused() -> None:
    model: Any = tiny_vit()
    model.blocks[0].attn.proj_drop = Negated()
    with pytest.raises(
        UnsupportedModel,
        match=r"blocks\.0\.attn\.proj_drop: .*Negated where a dropout was expected",
    ):
        lift(model)


def test_an_unknown_block_is_refused_with_the_missing_parts() -> None:
    model: Any = tiny_vit()
    model.blocks[1] = nn.Linear(24, 24)
    with pytest.raises(
        UnsupportedModel,
        match=r"blocks\.1: no rule for block type torch\.nn\.modules\.linear\.Linear .* "
        "it has no norm1 and no attn",
    ):
        lift(model)


def test_a_forward_set_on_the_instance_is_refused() -> None:
    model = tiny_vit()
    attn = model.blocks[0].attn  # type: ignore[index,union-attr]
    attn.forward = lambda x, **_: x
    with pytest.raises(
        UnsupportedModel, match=r"blocks\.0\.attn: this Attention has a forward of its own"
    ):
        lift(model)


def test_a_model_that_is_not_a_transformer_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="model: no rule for model type"):
        lift(nn.Sequential(nn.Linear(3, 3)))


SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 12}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {**SIZES, "window_size": 4, "depths": (1, 1), "num_heads": (1, 2)},
            r"model: no rule for model type timm\.models\.swin_transformer\.SwinTransformer",
        ),
        (
            "samvit_base_patch16",
            {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2},
            "patch_embed: .* computes something else than convolutions",
        ),
        (
            "convit_tiny",
            {**SIZES, "depth": 2, "num_heads": 2},
            r"blocks\.0\.attn: no rule for attention type timm\.models\.convit\.GPSA",
        ),
        (
            "cait_xxs24_224",
            {**SIZES, "depth": 1, "num_heads": 2},
            r"blocks\.0\.attn: .*TalkingHeadAttn has timm's names, but does not compute softmax",
        ),
    ],
)
def test_windowed_and_other_mixing_of_tokens_is_refused_with_its_path(
    name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        lift(timm.create_model(name, **options).eval())


def test_a_lifted_model_has_the_parameters_of_its_source() -> None:
    backbone = T2TBackbone(side=8, embed_dim=24, depth=2, num_heads=3, classes=5)
    # The position of the class token is folded into the token, so one of the two rows is removed.
    assert (
        count_params(lift(backbone).architecture)
        == sum(p.numel() for p in backbone.parameters()) - 24
    )
