"""Rotation of the residual stream: the same function, channels ordered, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from random_networks import architectures, network
from tiny_models import assert_equal_outputs, relative_error, tiny_vit
from torch import nn
from vitrim import InputError, StructuredMask, compact, lift, masked, rotate, trim
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.stream_rotation import (
    rescaled_norms,
    rotate_stream,
    stream_obstacle,
    turned_stream,
)
from vitrim.compress.oneshot.trim import TrimOptions

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def _images(count: int = 40) -> torch.Tensor:
    small = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(small, size=16, mode="bilinear")


@settings(max_examples=60, suppress_health_check=SLOW)
@given(architecture=architectures())
def test_a_rotated_stream_computes_the_same_or_is_refused(architecture: Architecture) -> None:
    model = network(architecture)
    images = torch.randn(6, *architecture.image, dtype=torch.float64)
    if stream_obstacle(architecture) is not None:
        with pytest.raises(InputError, match="the residual stream cannot be rotated: "):
            rotate_stream(model, images)
        return
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(architecture.embed, architecture.embed, generator=generator)
    turned = turned_stream(model, torch.linalg.qr(square.double())[0])
    with torch.no_grad():
        assert_equal_outputs(turned(images), model(images), 1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "qkv_bias": False}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    ],
)
def test_a_timm_network_with_a_rotated_stream_equals_its_source(
    name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24}
    sizes |= {"depth": 2, "num_heads": 3}
    model = timm.create_model(name, num_classes=5, **sizes, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = _images()
        assert relative_error(rotate_stream(model, images)(images), model(images)) < 1e-5


def test_heads_and_stream_are_rotated_in_one_call() -> None:
    model, images = tiny_vit(), _images()
    rotated = rotate(model, images, stream=True)
    assert {branch.norm.kind for branch in rotated.architecture.branches if branch.norm} == {"rms"}
    with torch.no_grad():
        assert relative_error(rotated(images), model(images)) < 1e-5


def test_trailing_channels_matter_less_than_leading_ones() -> None:
    model, images = tiny_vit(), _images()
    rotated = rotate_stream(model, images)
    order = torch.arange(24)
    errors = []
    for keep in (order < 16, order >= 8):
        mask = StructuredMask({"embed": {"*": keep}}, scale="original")
        cut = compact(rotated, mask)
        with torch.no_grad():
            assert_equal_outputs(cut(images), masked(rotated, mask)(images), 1e-5)
            errors.append(relative_error(rescaled_norms(cut, 24)(images), model(images)))
    assert errors[0] < 0.5 * errors[1]


def _network_of_low_rank() -> CompactModel:
    """A third of the stream's directions is never written to, but for a mean over channels."""
    model = lift(tiny_vit()).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in ("prefix", "position"):
                tensor[:, 16:] = tensor[:, :16].mean(dim=1, keepdim=True)
            if name.startswith("stem.") or ".out." in name or ".fc2." in name:
                tensor[16:] = tensor[:16].mean(dim=0)
    return model


def test_directions_that_nothing_writes_are_removed_exactly() -> None:
    model, images = _network_of_low_rank(), _images()
    rotated = rotate_stream(model, images)
    mask = StructuredMask({"embed": {"*": torch.arange(24) < 16}}, scale="original")
    small = rescaled_norms(compact(rotated, mask), 24)
    with torch.no_grad():
        assert relative_error(small(images), model(images)) < 1e-4


def test_a_cut_narrows_the_stream_where_that_costs_nothing(tmp_path: Path) -> None:
    model, images = _network_of_low_rank(), _images(80)
    options = TrimOptions(round_to=4)
    found = trim(model, images, macs=0.7, options=options, resume=tmp_path)
    assert found.model.architecture.embed == 16
    assert found.stream_error < 1e-6
    assert found.cost <= 0.7
    assert found.check.cosine > 0.999
    assert "residual stream: 16 of 24 channels" in found.table()
    with torch.no_grad():
        cut = compact(found.rotated, found.mask)(images)
        assert_equal_outputs(cut, masked(found.rotated, found.mask)(images), 1e-5)
    again = trim(model, images, macs=0.7, options=options, resume=tmp_path)
    with torch.no_grad():
        assert relative_error(again.model(images), found.model(images)) < 1e-4
    kept = trim(model, images, macs=0.7, options=TrimOptions(round_to=4, stream=False))
    assert kept.model.architecture.embed == 24
    assert kept.predicted_error > found.predicted_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "no head into which the basis"),
        ({"pre_norm": True}, "stem_norm, a norm in the stem"),
        ({"global_pool": "max"}, r"the pooling \(max\) works on single channels"),
    ],
)
def test_what_does_not_commute_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rotate_stream(tiny_vit(**options), _images(4))  # type: ignore[arg-type]
