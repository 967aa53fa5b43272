"""Modules that nobody registered: read by timm's convention of names, and believed only after a
trial.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lv_vit import LVViT
from t2t_vit import SoftSplits, T2TBackbone, T2TViT
from tiny_models import relative_error, tiny_vit
from torch import Tensor, nn
from vitrim import StructuredMask, UnsupportedModel, compact, lift, masked
from vitrim.compress.masks.groups import Sharing
from vitrim.compress.network.count import count_params
from vitrim.compress.network.modules.model import CompactModel

SHARINGS: tuple[Sharing, ...] = ("unshared", "residual", "full")


def shake(model: nn.Module) -> nn.Module:
    """Random numbers in every parameter and every running statistic."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model.eval()


def exact(model: nn.Module, images: Tensor) -> CompactModel:
    lifted = lift(model)
    with torch.no_grad():
        assert relative_error(lifted(images), model(images)) < 1e-5
        for seed, sharing in enumerate(SHARINGS):
            mask = StructuredMask.random(lifted, 0.4, sharing, seed=seed, per_head=True)
            assert relative_error(compact(model, mask)(images), masked(lifted, mask)(images)) < 1e-5
    return lifted


def test_lv_vit_is_cut_exactly() -> None:
    lifted = exact(
        shake(LVViT(img_size=32, embed_dim=24, depth=2, num_heads=3, classes=5)),
        torch.randn(2, 3, 32, 32),
    )
    assert lifted.architecture.pool.kind == "dense"
    assert [conv.kernel for conv in lifted.architecture.stem.before] == [(7, 7), (3, 3), (3, 3)]


def test_t2t_vits_backbone_is_cut_exactly() -> None:
    backbone = shake(T2TBackbone(side=8, embed_dim=24, depth=2, num_heads=3, classes=5))
    lifted = exact(backbone, torch.randn(2, 64, 8, 8))
    assert lifted.architecture.image == (64, 8, 8)
    assert lifted.architecture.grid == (4, 4)


def test_the_published_shapes_have_the_published_sizes() -> None:
    with torch.device("meta"):
        lv_vit, front, backbone = LVViT(), SoftSplits(), T2TBackbone()
    assert round(sum(p.numel() for p in lv_vit.parameters()) / 1e6, 1) == 26.2
    assert (
        round(sum(p.numel() for module in (front, backbone) for p in module.parameters()) / 1e6, 1)
        == 21.5
    )


def test_the_whole_t2t_vit_is_refused_by_the_path_of_its_stem() -> None:
    backbone = T2TBackbone(side=8, embed_dim=24, depth=2, num_heads=3, classes=5)
    with pytest.raises(
        UnsupportedModel,
        match=r"tokens_to_token: .*Sequential where a convolutional patch_embed was expected; lift what comes after",
    ):
        lift(shake(T2TViT(backbone)))


def test_the_trial_leaves_the_model_in_training_mode() -> None:
    model = shake(LVViT(img_size=32, embed_dim=24, depth=1, num_heads=3, classes=5)).train()
    first = model.get_submodule("blocks.0").eval()
    lifted = lift(model)
    assert lifted.training
    assert model.training
    assert not first.training


class DoublesQueries(nn.Module):
    """timm's names, another computation."""

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


def test_an_attention_that_only_looks_alike_is_refused() -> None:
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


def test_an_unknown_block_is_refused_with_what_it_lacks() -> None:
    model: Any = tiny_vit()
    model.blocks[1] = nn.Linear(24, 24)
    with pytest.raises(
        UnsupportedModel,
        match=r"blocks\.1: no rule for block type torch\.nn\.modules\.linear\.Linear .* it has no norm1 and no attn",
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


def test_a_network_of_another_kind_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="model: no rule for model type"):
        lift(nn.Sequential(nn.Linear(3, 3)))


def test_a_lifted_strangers_parameters_are_its_own() -> None:
    backbone = T2TBackbone(side=8, embed_dim=24, depth=2, num_heads=3, classes=5)
    # The class token's position is a constant added to a constant, so one of the two rows goes.
    assert (
        count_params(lift(backbone).architecture)
        == sum(p.numel() for p in backbone.parameters()) - 24
    )
