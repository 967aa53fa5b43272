from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from timm.data.transforms_factory import create_transform
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import normalise

GREY = Preprocessing(channels=1, height=28, width=28, mean=(0.286,), std=(0.353,))
COLOUR = Preprocessing(
    channels=3, height=32, width=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise, on which wrong resizing is visible."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack(
        [127 + 90 * np.sin(rows / (5 + c) + c) * np.cos(columns / (7 - c)) for c in range(3)],
        axis=2,
    )
    return Image.fromarray(
        np.clip(waves + generator.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize(("width", "height"), [(50, 40), (40, 50), (32, 32), (97, 31), (20, 64)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875, 0.9])
def test_center_crop_equals_timms_evaluation_transform(
    width: int, height: int, crop_ratio: float
) -> None:
    ours = COLOUR.model_copy(update={"resize": "center-crop", "crop_ratio": crop_ratio})
    theirs = create_transform(
        (3, 32, 32), interpolation="bicubic", mean=ours.mean, std=ours.std, crop_pct=crop_ratio
    )
    image = photo(width, height)
    np.testing.assert_allclose(ours.apply(image), theirs(image).numpy(), atol=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([GREY, COLOUR]))
def test_torch_and_numpy_normalise_equally(seed: int, preprocessing: Preprocessing) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, *preprocessing.image), dtype=np.uint8)
    by_torch = normalise(torch.from_numpy(pixels), preprocessing).numpy()
    assert np.array_equal(by_torch, preprocessing.normalise(pixels))
    wanted = (pixels / 255.0 - np.array(preprocessing.mean)[:, None, None]) / np.array(
        preprocessing.std
    )[:, None, None]
    np.testing.assert_allclose(by_torch, wanted, atol=1e-5)


def test_an_array_equals_its_image() -> None:
    array = np.random.default_rng(1).integers(0, 256, (28, 28), dtype=np.uint8)
    for same in (array, array[:, :, None], Image.fromarray(array)):
        assert np.array_equal(GREY.pixels(same), array[None])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_image_mode_is_converted_to_the_models_channels(mode: str) -> None:
    image = (
        photo(40, 30).convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.asarray(photo(40, 30).convert("L")).astype(np.uint16) * 257)
    )
    assert GREY.pixels(image).shape == (1, 28, 28)
    pixels = COLOUR.pixels(image)
    assert pixels.shape == (3, 32, 32)
    assert 30 < pixels.mean() < 225


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    shades = np.linspace(0, 65535, 28 * 28).reshape(28, 28)
    pixels = GREY.pixels(Image.fromarray(shades.astype(np.uint16)))
    np.testing.assert_allclose(pixels[0], shades / 257, atol=1.01)


def test_mean_and_std_must_fit_the_channels() -> None:
    with pytest.raises(ValidationError, match="need 3 numbers, one per channel"):
        Preprocessing(channels=3, height=8, width=8, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValidationError, match="std must be positive"):
        Preprocessing(channels=1, height=8, width=8, mean=(0.5,), std=(0.0,))


def test_json_preserves_preprocessing() -> None:
    assert Preprocessing.model_validate_json(COLOUR.model_dump_json()) == COLOUR


def test_preprocessing_needs_no_torch() -> None:
    code = (
        "import sys; from vitrim.compress.data.preprocessing import Preprocessing; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
