"""Named outputs: their values are timm's, their shapes are stated, wrong names are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import vitrim
from torch import Tensor, nn
from vitrim.compress.lift import lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.named_outputs import (
    NamedOutputs,
    needs_all_tokens,
    output_specs,
    require_output_names,
)
from vitrim.core.errors import InputError

NAMES = ("logits", "features", "patches", "tokens", "blocks.0", "blocks.2")
MODELS = {
    "deit_tiny_patch16_224": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "vit_base_patch16_siglip_224": 32,
    "vit_small_patch14_dinov2": 28,
    "beit_base_patch16_224": 32,
    "vit_base_patch32_clip_224": 64,
}


def tiny(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": MODELS[name], "depth": 3, "embed_dim": 32, "num_heads": 2}
    made = timm.create_model(name, **{**size, **options}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_named_outputs_are_those_of_timm(name: str) -> None:
    model = tiny(name)
    images = torch.randn(2, 3, MODELS[name], MODELS[name])
    outputs = NamedOutputs(lift(model), NAMES)
    with torch.no_grad():
        found = outputs(images)
        _, blocks = model.forward_intermediates(
            images, indices=[0, 2], norm=False, output_fmt="NLC"
        )
        tokens = model.forward_features(images)
        features = model.forward_head(tokens, pre_logits=True)
        patches = tokens[:, model.num_prefix_tokens :]
        expected = [model(images), features, patches, tokens, *blocks]
    for output, value, wanted in zip(outputs.outputs, found, expected, strict=True):
        assert value.shape == (2, *output.shape), output.name
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_patches_of_a_shortened_network_are_those_of_the_whole_one() -> None:
    compact = lift(tiny("deit_tiny_patch16_224"))
    shorter = vitrim.compress.network.modules.model.build(
        compact.architecture.model_copy(update={"last_queries": True}), compact.state_dict()
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    for names in (NAMES, ("features", "blocks.1")):
        for one, other in zip(
            NamedOutputs(compact, names)(images), NamedOutputs(shorter, names)(images), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def cut_backbone() -> tuple[nn.Module, CompactModel]:
    model = tiny("vit_small_patch14_dinov2", num_classes=0)
    mask = vitrim.StructuredMask.random(lift(model), keep_ratio=0.5, sharing="residual", seed=0)
    return vitrim.masked(model, mask), vitrim.compact(model, mask)


def test_a_cut_classifier_has_dense_outputs_of_the_source_width() -> None:
    model = tiny("deit_tiny_patch16_224", num_classes=5)
    mask = vitrim.StructuredMask.random(lift(model), keep_ratio=0.5, sharing="residual", seed=0)
    images = torch.randn(2, 3, 32, 32)
    names = ("logits", "features", "patches", "blocks.1")
    compact = vitrim.compact(model, mask)
    logits, features, patches, stream = NamedOutputs(compact, names)(images)
    assert [value.shape[-1] for value in (logits, features, patches, stream)] == [5, 32, 32, 32]
    torch.testing.assert_close(logits, vitrim.masked(model, mask)(images), rtol=1e-4, atol=1e-4)
    kept = list(compact.architecture.stream_channels or ())
    assert 0 < len(kept) < 32
    removed = [channel for channel in range(32) if channel not in kept]
    for value in (features, patches, stream):
        assert (value[..., kept] != 0).all()
        assert (value[..., removed] == 0).all()
    assert compact.head is not None
    assert compact.norm is not None
    torch.testing.assert_close(compact.head(features[:, kept]), logits)
    last = NamedOutputs(compact, ["blocks.2"])(images)[0]
    torch.testing.assert_close(compact.norm(last[..., kept]), patches[..., kept])


def test_a_cut_backbone_has_features_and_tokens_of_the_source_width() -> None:
    masked, compact = cut_backbone()
    images = torch.randn(2, 3, 28, 28)
    found = NamedOutputs(compact, ("features", "patches", "tokens"))
    features, patches, tokens = found(images)
    assert features.shape == (2, 32)
    assert patches.shape == (2, 4, 32)
    torch.testing.assert_close(features, compact(images))
    torch.testing.assert_close(features, masked(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, tokens[:, 0])
    kept: Tensor = (patches != 0).any(dim=0).any(dim=0)
    assert 0 < int(kept.sum()) < 32
    assert kept.tolist() == (tokens[:, 0] != 0).any(dim=0).tolist()


def test_a_removed_block_ends_where_the_one_before_it_does() -> None:
    compact = lift(tiny("deit_tiny_patch16_224"))
    mask = vitrim.StructuredMask.everything(compact)
    for dimension, site, kept in mask:
        if dimension == "block" and site.startswith("blocks.1."):
            kept[:] = False
    cut = vitrim.compact(compact, mask)
    images = torch.randn(1, 3, 32, 32)
    first, second, third = NamedOutputs(cut, ["blocks.0", "blocks.1", "blocks.2"])(images)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(second, third)


def test_only_outputs_after_the_last_attention_need_all_tokens() -> None:
    architecture = lift(tiny("deit_tiny_patch16_224")).architecture

    def needed(*names: str) -> bool:
        return needs_all_tokens(architecture, output_specs(architecture, names))

    assert needed("patches")
    assert needed("tokens")
    assert needed("blocks.2")
    assert not needed("logits", "features", "blocks.1")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "outputs: is empty; name an output, or leave it out for the logits"),
        (["patch"], "outputs: there is no output 'patch'; did you mean 'patches'?"),
        (["block.8"], "outputs: there is no output 'block.8'; did you mean 'blocks.8'?"),
        (["blocks.08"], "outputs: there is no output 'blocks.08'; did you mean 'blocks.8'?"),
        (["logits", "logits"], "outputs: 'logits' occurs twice; name each output once"),
        ("features", "outputs: give a list of names, such as ['patches', 'blocks.8']"),
        (
            ["zz"],
            "outputs: there is no output 'zz'; use logits, features, tokens, patches or blocks.K "
            "for the stream after block K, from 0",
        ),
    ],
)
def test_wrong_names_are_refused_in_one_line(names: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        require_output_names(names)
    assert str(error.value) == message


def test_a_block_outside_of_the_network_is_refused_by_name() -> None:
    architecture = lift(tiny("deit_tiny_patch16_224")).architecture
    with pytest.raises(InputError) as error:
        output_specs(architecture, ["blocks.3"])
    message = "outputs: 'blocks.3' is outside of the network, which has blocks 0 to 2"
    assert str(error.value) == message


def test_logits_come_first() -> None:
    assert require_output_names(["patches", "logits", "blocks.1"]) == (
        "logits",
        "patches",
        "blocks.1",
    )
