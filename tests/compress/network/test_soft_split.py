"""Soft splits of T2T-ViT: attention, counts, files, image sizes and masks of whole networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lv_vit import LVViT
from pydantic import ValidationError
from t2t_vit import T2TViT, TokenPerformer
from timm.layers.pos_embed import resample_abs_pos_embed
from tiny_models import add_noise, fvcore_macs, relative_error
from torch import nn
from torch.nn import functional as F
from vitrim import InputError, StructuredMask, compact, lift, load, masked, resized, save
from vitrim.compress.network.architecture import (
    Architecture,
    ConvSpec,
    FfnSpec,
    NormSpec,
    SoftSplitSpec,
    StemSpec,
)
from vitrim.compress.network.cost import live_cost
from vitrim.compress.network.count import count_macs, count_params, stem_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.soft_split import SoftSplit, random_features
from vitrim.pipeline.estimates import network_workload

KINDS = ("performer", "transformer")


def soft_split(channels: int, width: int, **options: Any) -> SoftSplitSpec:
    """A soft split with windows of 3 x 3 pixels, every second one."""
    settings: dict[str, Any] = {
        "kernel": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "norm": NormSpec(width=9 * channels),
        "ffn_norm": NormSpec(width=width),
        "ffn": FfnSpec(hidden=width),
        "scale": None if "features" in options else 0.5,
    }
    return SoftSplitSpec(channels=width, **settings | options)


def t2t_vit(kind: Any = "performer", img_size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    shape: Any = {"token_dim": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "classes": 5}
    return add_noise(T2TViT(kind, img_size=img_size, **shape))


def network(kind: Any = "performer", img_size: int = 32) -> CompactModel:
    return lift(t2t_vit(kind, img_size))


def randomized(layer: SoftSplit) -> SoftSplit:
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) / 2)
    return layer.eval()


def test_a_soft_split_cuts_overlapping_windows() -> None:
    layer = randomized(SoftSplit(soft_split(2, 4)))
    with torch.no_grad():
        before, after = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
        # Pixel (1, 1) is in the windows that start at rows and columns -1 and 1 only.
        after[0, :, 1, 1] = 1.0
        windows = [
            layer.norm(F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)) for x in (before, after)
        ]
        changed = (windows[0] != windows[1]).any(dim=-1).view(4, 4)
        assert changed.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert layer(after).shape == (1, 4, 4, 4)


def test_random_features_estimate_the_softmax_kernel() -> None:
    """E[φ(q) φ(k)] = exp(q k), the lemma that the linear attention rests on."""
    generator = torch.Generator().manual_seed(0)
    q, k = (0.3 * torch.randn(1, 5, 4, generator=generator) for _ in range(2))
    directions = torch.randn(200_000, 4, generator=generator)
    estimate = random_features(q, directions) @ random_features(k, directions).transpose(1, 2)
    torch.testing.assert_close(estimate, (q @ k.transpose(1, 2)).exp(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_attention_keeps_its_type_and_computes_in_single_precision(
    dtype: torch.dtype,
) -> None:
    layer = randomized(SoftSplit(soft_split(2, 4, features=2)))
    q, k, v = (torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    # Large keys underflow in half precision, and the divisor with them.
    k = 4 * k
    with torch.no_grad():
        wanted = layer.double().attend(q.double(), k.double(), v.double())
        found = layer.to(dtype).attend(q.to(dtype), k.to(dtype), v.to(dtype))
    assert found.dtype == dtype
    assert bool(torch.isfinite(found).all())
    if dtype != torch.bfloat16:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_linear_attention_ignores_autocast_and_compiles() -> None:
    layer = randomized(SoftSplit(soft_split(2, 4, features=2)))
    q, k, v = (torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    k = 4 * k
    with torch.no_grad():
        wanted = layer.attend(q, k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.attend(q, k, v), wanted)
        images = torch.randn(1, 2, 8, 8)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), layer(images))


def test_the_linear_attention_equals_the_published_formula() -> None:
    torch.manual_seed(0)
    source: Any = add_noise(TokenPerformer(18, 4))
    layer = SoftSplit(soft_split(2, 4, features=2)).eval()
    k, q, v = source.kqv(torch.randn(2, 6, 18)).split(4, dim=-1)
    with torch.no_grad():
        assert layer.features is not None
        layer.features.copy_(source.w)
        found = layer.attend(q, k, v)
        one, two = source.prm_exp(k), source.prm_exp(q)
        weights = two @ one.transpose(1, 2)
        wanted = (weights @ v) / (weights.sum(dim=-1, keepdim=True) + source.epsilon)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_agree_with_fvcore_before_and_after_a_cut(kind: str) -> None:
    model = network(kind)
    for each in (model, compact(model, StructuredMask.random(model, 0.5, seed=1))):
        assert count_macs(each.architecture) == fvcore_macs(each, torch.randn(1, 3, 32, 32))
        assert count_params(each.architecture) == sum(p.numel() for p in each.parameters())


def all_live(architecture: Architecture) -> Any:
    mask = StructuredMask.everything(architecture)

    def live(dimension: str, site: str, indices: tuple[int, ...] | None) -> int:
        if indices is not None:
            return len(indices)
        if dimension == "embed":
            return architecture.embed
        if dimension == "block":
            return 1
        if dimension == "token":
            return architecture.tokens
        entry = mask.kept[dimension][site]
        return entry.shape[-1]

    return live


# Embed, depth, heads, ratio of the FFN, and the multiply-adds (G) and parameters (M) that the
# README of the published code states.
PUBLISHED = [
    ("performer", 384, 14, 6, 3.0, 4.8, 21.5),
    ("performer", 256, 7, 4, 2.0, 1.1, 4.3),
    ("performer", 448, 19, 7, 3.0, 8.5, 39.2),
    ("transformer", 384, 14, 6, 3.0, 6.1, 21.5),
    ("transformer", 448, 19, 7, 3.0, 9.8, 39.2),
]


@pytest.mark.parametrize(("kind", "embed", "depth", "heads", "ratio", "giga", "mega"), PUBLISHED)
def test_published_sizes_of_t2t_vit_are_counted(
    kind: Any, embed: int, depth: int, heads: int, ratio: float, giga: float, mega: float
) -> None:
    architecture = whole_t2t(network(kind).architecture, embed, depth, heads, ratio)
    assert count_macs(architecture) / 1e9 == pytest.approx(giga, abs=0.06)
    assert round(count_params(architecture) / 1e6, 1) == mega


def test_published_sizes_of_lv_vit_are_counted() -> None:
    model: Any = LVViT(img_size=32, embed_dim=24, depth=1, num_heads=3, classes=5)
    small = lift(add_noise(model)).architecture.model_dump(by_alias=True)
    lv_s = Architecture.model_validate(whole(small, 384, 16, 6, 3.0))
    assert round(count_macs(lv_s) / 1e9, 2) == 6.55  # published: 6.6
    assert round(count_params(lv_s) / 1e6, 2) == 26.15
    lv_m = whole(small, 512, 20, 8, 3.0)
    released = Architecture.model_validate(lv_m)
    assert round(count_macs(released) / 1e9, 1) == 12.7
    assert round(count_params(released) / 1e6, 2) == 55.83
    # The published 16.0 G are those of a stem with 128 channels, as LV-ViT-L has it.
    for layer in lv_m["stem"]["before"]:
        layer["channels"] = 128
    assert round(count_macs(Architecture.model_validate(lv_m)) / 1e9, 1) == 16.0


def whole_t2t(
    small: Architecture, embed: int, depth: int, heads: int, ratio: float
) -> Architecture:
    """The plain data of a full-size T2T-ViT, from that of a small one of the same kind."""
    data = whole(small.model_dump(by_alias=True), embed, depth, heads, ratio)
    for layer, window in zip(data["stem"]["before"], (147, 576), strict=True):
        layer |= {"channels": 64, "features": layer["features"] and 32}
        layer["norm"]["width"], layer["ffn_norm"]["width"] = window, 64
        layer["ffn"]["hidden"] = 64
    return Architecture.model_validate(data)


def whole(data: dict[str, Any], embed: int, depth: int, heads: int, ratio: float) -> dict[str, Any]:
    """The plain data of a network for 224 x 224 images and 1000 classes, apart from its stem."""
    attention, ffn = (step[0] for step in data["steps"][:2])
    steps = []
    for number in range(depth):
        core = attention["core"] | {"heads": heads, "qk": embed // heads, "v": embed // heads}
        wide = {"norm": attention["norm"] | {"width": embed}}
        steps.append([attention | wide | {"name": f"blocks.{number}.attn", "core": core}])
        core = ffn["core"] | {"hidden": int(embed * ratio)}
        steps.append([ffn | wide | {"name": f"blocks.{number}.ffn", "core": core}])
    norm, head = data["norm"] | {"width": embed}, data["head"] | {"classes": 1000}
    size = {"image": (3, 224, 224), "embed": embed, "blocks": None}
    return data | size | {"steps": steps, "norm": norm, "head": head}


def test_the_stem_of_t2t_vit_14_costs_what_its_products_sum_to() -> None:
    architecture = whole_t2t(network().architecture, 384, 14, 6, 3.0)
    tokens, windows = (56 * 56, 28 * 28), (147, 576)
    expected = sum(
        count * (3 * 64 * window + 2 * 32 * 64 + 32 + 2 * 32 * 64 + 3 * 64 * 64)
        for count, window in zip(tokens, windows, strict=True)
    )
    assert stem_macs(architecture) == expected + 14 * 14 * 576 * 384
    live = all_live(architecture)
    assert live_cost(architecture, live, "macs") == count_macs(architecture)
    assert live_cost(architecture, live, "params") == count_params(architecture)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_keeps_outputs_and_features(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    small = compact(model, StructuredMask.random(model, 0.5, "unshared", seed=2))
    found = load(save(small, tmp_path / "model"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(images), small(images))
    assert found.architecture == small.architecture
    assert set(found.state_dict()) == set(small.state_dict())


def test_files_of_older_versions_state_no_kind_of_layer() -> None:
    spec = StemSpec.model_validate({"patch": (2, 2), "before": [{"channels": 3, "kernel": (3, 3)}]})
    assert spec.before == (ConvSpec(channels=3, kernel=(3, 3)),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "needs either `scale` or `features`"),
        ({"scale": 0.5}, "needs either `scale` or `features`"),
        ({"ffn_norm": {"width": 5}}, "ffn_norm"),
        ({"norm": {"width": 146}}, r"stem\.before\.0\.norm"),
        ({"kind": "hard_split"}, "hard_split"),
        ({"channels": 0}, "greater than or equal to 1"),
    ],
)
def test_a_malformed_soft_split_is_refused(change: dict[str, Any], message: str) -> None:
    data = json.loads(network().architecture.model_dump_json(by_alias=True))
    data["stem"]["before"][0] |= change
    with pytest.raises(ValidationError, match=message):
        Architecture.model_validate(data)


def test_a_file_with_a_malformed_soft_split_is_refused_by_its_key(tmp_path: Path) -> None:
    folder = save(network(), tmp_path / "model")
    path = folder / "architecture.json"
    data = json.loads(path.read_text())
    data["stem"]["before"][1]["norm"]["width"] = 9
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"architecture\.json: .*stem\.before\.1\.norm"):
        load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_size_equals_the_source_of_that_size(kind: str) -> None:
    small, large = t2t_vit(kind, 32), t2t_vit(kind, 48)
    state = small.state_dict()
    table = resample_abs_pos_embed(state["pos_embed"], [3, 3], [2, 2], num_prefix_tokens=1)
    large.load_state_dict(state | {"pos_embed": table})
    model = lift(small)
    found, images = resized(model, 48), torch.randn(2, 3, 48, 48)
    assert found.architecture.grid == (3, 3)
    with torch.no_grad():
        assert relative_error(found(images), large(images)) < 1e-5
    wide = resized(model, "32x48")
    assert wide(torch.randn(1, 3, 32, 48)).shape == (1, 5)
    with pytest.raises(InputError, match="whole patches, which start every 16 pixels"):
        resized(model, 40)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    sharing=st.sampled_from(["unshared", "residual", "full"]),
    keep=st.sampled_from([0.3, 0.7]),
    seed=st.integers(0, 99),
)
def test_masked_equals_compact_with_every_kind_of_soft_split(
    kind: str, sharing: Any, keep: float, seed: int
) -> None:
    model = network(kind)
    mask = StructuredMask.random(model, keep, sharing, seed=seed)
    small, images = compact(model, mask), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(small(images), masked(model, mask)(images)) < 1e-5
    inside = [name for name in small.state_dict() if name.startswith("before.")]
    assert all(torch.equal(small.state_dict()[name], model.state_dict()[name]) for name in inside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_token_masks_select_among_the_projected_tokens(kind: str, ratio: float) -> None:
    model = network(kind, img_size=64)
    mask = StructuredMask.random(model, {"token": ratio, "ffn": 0.5, "embed": 0.7}, seed=5)
    small, images = compact(model, mask), torch.randn(2, 3, 64, 64)
    assert small.architecture.order is not None
    with torch.no_grad():
        assert relative_error(small(images), masked(model, mask)(images)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_masked_and_compact_networks_agree(kind: str) -> None:
    model, images = network(kind), torch.randn(2, 3, 32, 32)
    mask = StructuredMask.random(model, 0.5, seed=3)
    reference, small = masked(model, mask), compact(model, mask)
    gradients = []
    for each in (reference, small):
        each(images).square().sum().backward()
        found = {name: p.grad for name, p in each.named_parameters() if "before.0" in name}
        gradients.append({name.split("before.0.")[1]: grad for name, grad in found.items()})
    assert set(gradients[0]) == set(gradients[1])
    for name, grad in gradients[1].items():
        assert grad is not None
        other = gradients[0][name]
        assert other is not None
        assert relative_error(grad, other) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_an_operator_of_an_estimate(kind: str) -> None:
    architecture = network(kind).architecture
    counted = count_macs(architecture.model_copy(update={"last_queries": True}))
    assert network_workload(architecture).macs == counted
