"""Rotation changes the basis of the heads, never the function, and orders columns by importance."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from random_networks import architectures, network
from tiny_models import assert_equal_outputs, relative_error, tiny_vit
from vitrim import InputError, StructuredMask, compact
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.oneshot.rotation import rotate

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=40, suppress_health_check=SLOW)
@given(architecture=architectures())
def test_a_rotated_network_has_the_same_function(architecture: Architecture) -> None:
    model = network(architecture)
    images = torch.randn(9, *architecture.image, dtype=torch.float64)
    with torch.no_grad():
        assert_equal_outputs(rotate(model, images)(images), model(images), 1e-6)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_srelpos_small_patch16_224"])
def test_a_rotated_timm_network_equals_its_source(name: str) -> None:
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    images = torch.randn(24, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(rotate(model.eval(), images)(images), model(images)) < 1e-5


def test_cutting_the_last_rotated_columns_hurts_less_than_cutting_columns_by_magnitude() -> None:
    model = tiny_vit(embed_dim=48, img_size=32, depth=3)
    images = torch.randn(64, 3, 32, 32)
    held_out = torch.randn(16, 3, 32, 32)
    rotated = rotate(model, images)
    first = torch.arange(16) < 8
    trailing = StructuredMask(
        {"qk": {f"blocks.{block}.attn": first for block in range(3)}}, scale="original"
    )
    ratio = {"qk": 0.5}
    magnitude = StructuredMask.from_saliency(model, "l2", keep_ratio=ratio, scope="layer")
    with torch.no_grad():
        wanted = model(held_out)
        by_rotation = relative_error(compact(rotated, trailing)(held_out), wanted)
        by_magnitude = relative_error(compact(model, magnitude)(held_out), wanted)
    assert by_rotation < 0.5 * by_magnitude


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.randn(2, 3, 8, 8), r"images: \(2, 3, 8, 8\).*\(images, 3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), "images: there is none"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rotate(tiny_vit(), images)
