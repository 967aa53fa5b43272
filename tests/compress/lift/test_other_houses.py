"""torchvision's and transformers' Vision Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import relative_error
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
from vitrim import StructuredMask, UnsupportedModel, compact, lift, masked


def shake(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model.eval()


def exact(model: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    lifted = lift(model)
    with torch.no_grad():
        assert relative_error(lifted(images), answer(model(images))) < 1e-5
        for seed, sharing in enumerate(("unshared", "residual", "full")):
            mask = StructuredMask.random(lifted, 0.4, sharing, seed=seed, per_head=True)  # type: ignore[arg-type]
            assert relative_error(compact(model, mask)(images), masked(lifted, mask)(images)) < 1e-5


def answer(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor | None = output.logits if "logits" in output else output.pooler_output
    return output.last_hidden_state[:, 0] if found is None else found


def torchvision_model(**more: Any) -> nn.Module:
    return shake(
        VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=3,
            hidden_dim=24,
            mlp_dim=48,
            num_classes=7,
            **more,
        )
    )


STEM = [ConvStemConfig(8, 3, 2)] * 3


@pytest.mark.parametrize(
    "more",
    [{}, {"representation_size": 10}, {"conv_stem_configs": STEM}],
    ids=["plain", "hidden head", "conv stem"],
)
def test_torchvision(more: dict[str, Any]) -> None:
    exact(torchvision_model(**more))


def test_multihead_attention_that_adds_a_key_is_refused() -> None:
    model: Any = torchvision_model()
    model.encoder.layers[1].self_attention.add_zero_attn = True
    with pytest.raises(
        UnsupportedModel,
        match=r"encoder\.layers\.encoder_layer_1\.self_attention: nn\.MultiheadAttention with add_zero_attn",
    ):
        lift(model)


@pytest.mark.parametrize(
    ("house", "kind", "more"),
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
def test_transformers(house: str, kind: str, more: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = getattr(transformers, f"{house}Config")(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        num_labels=5,
        **more,
    )
    exact(shake(getattr(transformers, house + kind)(config)))


def test_transformers_without_a_pooler_answers_with_the_class_token() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    exact(shake(transformers.ViTModel(config, add_pooling_layer=False)))


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
