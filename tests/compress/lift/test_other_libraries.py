"""Vision Transformers of torchvision and transformers are lifted and pruned exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import add_noise, assert_exact
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
from vitrim import UnsupportedModel, lift


def check(model: nn.Module) -> None:
    torch.manual_seed(0)
    assert_exact(add_noise(model), torch.randn(2, 3, 32, 32), output=tensor_of)


def tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor | None = output.logits if "logits" in output else output.pooler_output
    return output.last_hidden_state[:, 0] if found is None else found


def torchvision_model(**more: Any) -> nn.Module:
    model: nn.Module = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=7,
        **more,
    )
    return model


STEM = [ConvStemConfig(8, 3, 2)] * 3


@pytest.mark.parametrize(
    "more",
    [{}, {"representation_size": 10}, {"conv_stem_configs": STEM}],
    ids=["plain", "hidden head", "conv stem"],
)
def test_torchvision_models_are_pruned_exactly(more: dict[str, Any]) -> None:
    check(torchvision_model(**more))


def test_multihead_attention_that_adds_a_key_is_refused() -> None:
    model: Any = torchvision_model()
    model.encoder.layers[1].self_attention.add_zero_attn = True
    with pytest.raises(
        UnsupportedModel,
        match=r"encoder\.layers\.encoder_layer_1\.self_attention: "
        r"nn\.MultiheadAttention with add_zero_attn",
    ):
        lift(model)


@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("ViT", "Model", {}),
        ("ViT", "ForImageClassification", {"hidden_act": "gelu_new"}),
        ("DeiT", "Model", {}),
        ("DeiT", "ForImageClassification", {}),
        ("DeiT", "ForImageClassificationWithTeacher", {}),
        ("Dinov2", "Model", {}),
        ("Dinov2", "ForImageClassification", {"use_swiglu_ffn": True}),
    ],
)
def test_transformers_models_are_pruned_exactly(
    family: str, kind: str, more: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        num_labels=5,
        **more,
    )
    check(getattr(transformers, family + kind)(config))


def test_transformers_without_a_pooler_returns_the_class_token() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    check(transformers.ViTModel(config, add_pooling_layer=False))


def test_causal_attention_is_refused() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTModel(config)
    model.layers[0].attention.is_causal = True
    with pytest.raises(
        UnsupportedModel, match=r"layers\.0\.attention\.is_causal: causal attention has no rule"
    ):
        lift(model)
