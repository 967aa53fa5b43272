"""DINOv3, DINOv2 with registers, SigLIP and CLIP of transformers are lifted and cut exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import vitrim
from timm.data.config import resolve_model_data_config
from tiny_models import add_noise, assert_exact, relative_error
from torch import Tensor, nn
from vitrim import InputError, StructuredMask, UnsupportedModel, compact, lift, load, save

transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = SIZES | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


def towers(family: str, **more: Any) -> Any:
    """The configuration of a text and a vision tower."""
    config = getattr(transformers, f"{family}Config")
    return config(vision_config=SIZES, text_config=TEXT, **more)


def plain(kind: str, config: str, **more: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**SIZES | more))
    return model


# The model, its pooling in timm's words, the mean of its data config.
Case = tuple[Callable[[], nn.Module], str, tuple[float, ...]]
CASES: dict[str, Case] = {
    "DINOv3, registers": (
        lambda: plain("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
        "token",
        IMAGENET,
    ),
    "DINOv3, gated FFN, key bias, oblong": (
        lambda: plain(
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            use_gated_mlp=True,
            hidden_act="silu",
            key_bias=True,
            image_size=[32, 48],
        ),
        "token",
        IMAGENET,
    ),
    "DINOv2, registers": (
        lambda: plain(
            "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=3
        ),
        "token",
        IMAGENET,
    ),
    "DINOv2, registers, classifier": (
        lambda: plain(
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            num_register_tokens=3,
            num_labels=5,
        ),
        "token_mean",
        IMAGENET,
    ),
    "SigLIP": (lambda: plain("SiglipVisionModel", "SiglipVisionConfig"), "map", HALF),
    "SigLIP, tokens": (
        lambda: plain("SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False),
        "",
        HALF,
    ),
    "SigLIP, vision tower of both": (
        lambda: transformers.SiglipModel(towers("Siglip")).vision_model,
        "map",
        HALF,
    ),
    "SigLIP, classifier": (
        lambda: transformers.SiglipForImageClassification(towers("Siglip", num_labels=5)),
        "avg",
        HALF,
    ),
    "DINOv2, registers, classifier of no classes": (
        lambda: plain(
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            num_register_tokens=1,
            num_labels=0,
        ),
        "token_mean",
        IMAGENET,
    ),
    "CLIP": (lambda: plain("CLIPVisionModel", "CLIPVisionConfig"), "token", CLIP_MEAN),
    "CLIP, vision tower of both": (
        lambda: transformers.CLIPModel(towers("CLIP")).vision_model,
        "token",
        CLIP_MEAN,
    ),
    "CLIP, projection": (
        lambda: plain("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=10),
        "token",
        CLIP_MEAN,
    ),
    "CLIP, classifier": (
        lambda: transformers.CLIPForImageClassification(towers("CLIP", num_labels=5)),
        "avg",
        CLIP_MEAN,
    ),
}
ALL = pytest.mark.parametrize("case", CASES)


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return add_noise(CASES[case][0]())


def images_of(model: nn.Module) -> Tensor:
    return torch.randn(2, *lift(model).architecture.image)


def output(found: Any) -> Tensor:
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        value: Tensor | None = getattr(found, name, None)
        if value is not None:
            return value
    raise AssertionError(type(found))


@ALL
def test_the_lifted_model_equals_the_source_and_is_cut_exactly(case: str, tmp_path: Path) -> None:
    model = build(case)
    images = images_of(model)
    lifted = assert_exact(model, images, output=output)
    _, pool, mean = CASES[case]
    assert lifted.global_pool == pool
    assert resolve_model_data_config(lifted)["mean"] == mean
    assert len(lifted.feature_info) == 2
    small = compact(model, StructuredMask.random(lifted, 0.5, "residual"))
    again = load(save(small, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(again(images), small.eval()(images))


@pytest.mark.parametrize("case", ["DINOv3, registers", "SigLIP", "CLIP"])
def test_hidden_states_are_the_intermediates(case: str) -> None:
    model: Any = build(case)
    lifted, images = lift(model), images_of(model)
    with torch.no_grad():
        states = model(images, output_hidden_states=True).hidden_states[1:]
        pairs = lifted.forward_intermediates(
            images, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
    for wanted, pair in zip(states, pairs, strict=True):
        found = torch.cat([pair[1], pair[0]], dim=1) if isinstance(pair, tuple) else pair
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("case", ["DINOv3, registers", "SigLIP", "CLIP, projection"])
def test_a_cut_model_is_exported_to_onnx(case: str, tmp_path: Path) -> None:
    model = build(case)
    images = images_of(model)[:1]
    small = compact(model, StructuredMask.random(model, 0.5, "residual"))
    artifact = vitrim.export(small, tmp_path / "artifact", runtime="onnxruntime", precision="fp32")
    session = onnxruntime.InferenceSession(
        str(artifact.folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    (found,) = session.run(None, {name: images.numpy()})
    with torch.no_grad():
        wanted = small.eval()(images).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))


def test_rotary_tables_of_dinov3_follow_the_image_size() -> None:
    model: Any = build("DINOv3, registers")
    larger = vitrim.resized(model, "48x64")
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert relative_error(larger(images), model(images).pooler_output) < 1e-5


def refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        lift(add_noise(make()))
    assert str(error.value).startswith(message)


def test_models_of_any_image_shape_are_refused_with_the_way_out() -> None:
    refused(
        lambda: plain("Siglip2VisionModel", "Siglip2VisionConfig"),
        "model: Siglip2VisionModel is for images of any shape, given as patches with masks, which "
        "has no rule; weights of SigLIP 2 with a fixed resolution load as SiglipVisionModel",
    )


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_model_with_a_text_tower_names_its_vision_tower(family: str) -> None:
    refused(
        lambda: getattr(transformers, f"{family}Model")(towers(family)),
        f"model: no rule for model type transformers.models.{family.lower()}."
        f"modeling_{family.lower()}.{family}Model; "
        f"give its attribute 'vision_model', a {family}VisionModel",
    )


@pytest.mark.parametrize("name", ["DINOv3ViTBackbone", "Dinov2WithRegistersBackbone"])
def test_feature_pyramids_are_refused_with_the_way_out(name: str) -> None:
    config = "DINOv3ViTConfig" if "v3" in name else "Dinov2WithRegistersConfig"
    base = name.replace("Backbone", "Model")
    refused(
        lambda: plain(name, config),
        f"model: {name} returns feature maps, which has no rule; load the weights as {base}, whose "
        "lifted form has forward_intermediates",
    )


def _pool_with(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: Any = plain("SiglipVisionModel", "SiglipVisionConfig")
        change(model)
        return model  # type: ignore[no-any-return]

    return make


def test_parts_without_a_rule_are_refused_by_path() -> None:
    def causal(model: Any) -> None:
        model.encoder.layers[1].self_attn.is_causal = True

    def extra_key(model: Any) -> None:
        model.head.attention.add_zero_attn = True

    def positions(model: Any) -> None:
        model.embeddings.position_embedding = nn.Embedding(9, 24)

    def activation(model: Any) -> None:
        model.encoder.layers[0].mlp.activation_fn = nn.Mish()

    for change, message in (
        (causal, "encoder.layers.1.self_attn.is_causal: causal attention has no rule"),
        (extra_key, "head.attention: nn.MultiheadAttention with add_zero_attn adds a token"),
        (positions, "embeddings.position_embedding: 9 positions for (4, 4) patches"),
        (activation, "encoder.layers.0.mlp.activation_fn: no rule for activation"),
    ):
        refused(_pool_with(change), message)


def test_a_probe_that_is_changed_by_a_hook_is_refused() -> None:
    model: Any = build("SigLIP")
    model.head.register_forward_hook(lambda module, args, found: found * 2)
    with pytest.raises(UnsupportedModel, match="head has a forward hook"):
        lift(model)


def test_units_of_the_probe_are_cut_by_name() -> None:
    lifted = lift(build("SigLIP"))
    mask = StructuredMask.random(lifted, 0.5, "full")
    assert set(mask.kept["head"]) == {"*", "pool.attn"}
    assert set(mask.kept["embed"]) == {"*", "pool.out"}
    with pytest.raises(InputError, match=r"mask qk/encoder\.layers\.7\.self_attn"):
        compact(lifted, StructuredMask({"qk": {"encoder.layers.7.self_attn": torch.ones(8)}}))
