"""Augmentation: the effect of each preset on a batch."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import normalise
from vitrim.compress.train.augment import (
    SHIFT_SHARE,
    Augmentation,
    ImagenetTransform,
    seed_everything,
    shift_and_flip,
)
from vitrim.core.errors import InputError

GREY = Preprocessing(channels=1, height=28, width=28, mean=(0.286,), std=(0.353,))
COLOUR = Preprocessing(
    channels=3, height=32, width=24, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


def batch(preprocessing: Preprocessing, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, *preprocessing.image), dtype=torch.uint8), torch.arange(
        count
    ) % 10


def test_none_only_normalises() -> None:
    pixels, labels = batch(GREY)
    images, targets = Augmentation("none", GREY, 10)(pixels, labels)
    assert torch.equal(images, normalise(pixels, GREY))
    assert targets is labels


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([GREY, COLOUR]))
def test_shift_and_flip_moves_each_image_as_a_whole(
    seed: int, preprocessing: Preprocessing
) -> None:
    pixels, _ = batch(preprocessing, 6)
    torch.manual_seed(seed)
    moved = shift_and_flip(pixels)
    height, width = preprocessing.height, preprocessing.width
    reach_y, reach_x = max(1, round(height * SHIFT_SHARE)), max(1, round(width * SHIFT_SHARE))
    padded = torch.nn.functional.pad(pixels, (reach_x, reach_x, reach_y, reach_y))
    for image, source in zip(moved, padded, strict=True):
        crops = [
            source[:, top : top + height, left : left + width]
            for top in range(2 * reach_y + 1)
            for left in range(2 * reach_x + 1)
        ]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


def test_about_half_are_mirrored_and_shifts_differ() -> None:
    pixels = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, 14, 20] = 255
    seed_everything(3)
    places = shift_and_flip(pixels).flatten(1).argmax(1)
    right = int((places % 28 > 14).sum())
    assert 150 < right < 250
    assert len(places.unique()) > 10


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
@pytest.mark.parametrize("preset", ["light", "thesis", "imagenet"])
def test_images_keep_their_shape_and_the_seed_decides(
    preset: Any, preprocessing: Preprocessing
) -> None:
    augment = Augmentation(preset, preprocessing, 10, 0.1)
    seed_everything(1)
    first = augment(*batch(preprocessing))
    images, targets = augment(*batch(preprocessing))
    assert images.shape == (16, *preprocessing.image)
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())
    seed_everything(1)
    torch.testing.assert_close(augment(*batch(preprocessing))[1], first[1])
    if preset != "light":
        assert targets.shape == (16, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(16))
        # Smoothed: no class has the target 0.
        assert float(targets.min()) >= 0.1 / 10 - 1e-6
    else:
        assert torch.equal(targets, batch(preprocessing)[1])


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("preset", ["thesis", "imagenet"])
def test_image_transforms_work_in_worker_processes(preset: Any, mode: Any) -> None:
    preprocessing = GREY if mode == "L" else COLOUR
    augment = Augmentation(preset, preprocessing, 10, decoded=False)
    transform = pickle.loads(pickle.dumps(augment.image_transform))
    noise = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    for seed in range(300):
        seed_everything(seed)
        pixels = transform(image)
        assert pixels.shape == preprocessing.image
        assert pixels.dtype == np.uint8
        seed_everything(seed)
        assert np.array_equal(augment.image_transform(image), pixels)  # type: ignore[misc]


def test_imagenet_crops_between_8_and_100_percent_of_the_area() -> None:
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 240, 3))
    preprocessing = COLOUR.model_copy(update={"height": 60, "width": 60})
    transform = Augmentation("imagenet", preprocessing, 10).image_transform
    assert isinstance(transform, ImagenetTransform)
    seed_everything(0)
    crops = [np.asarray(transform.crop(Image.fromarray(ramp)))[:, 0, 0] for _ in range(200)]
    heights = [int(crop.max()) - int(crop.min()) for crop in crops]
    assert 40 < min(heights) < 100
    assert max(heights) > 220


def test_imagenet_is_the_recipe_of_timm() -> None:
    transform = Augmentation("imagenet", COLOUR, 10).image_transform
    assert isinstance(transform, ImagenetTransform)
    assert [type(part).__name__ for part in transform.crop.transforms] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
    ]
    (policy,) = transform.policy.transforms
    assert (policy.num_layers, len(policy.ops)) == (2, 15)
    assert policy.ops[0].magnitude_std == 0.5


def test_mixup_needs_an_even_batch() -> None:
    pixels, labels = batch(GREY, 3)
    with pytest.raises(InputError, match="must be even, not 3"):
        Augmentation("thesis", GREY, 10)(pixels, labels)
