"""From an image to the input of a model: equal in training, calibration and on devices.

It needs no torch.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_FILTERS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


class Preprocessing(BaseModel):
    """From an image of any size to the input of a model; plain data, part of a manifest.

    Attributes:
        channels: 1 or 3.
        height: The input height in pixels.
        width: The input width in pixels.
        interpolation: The filter of resizing.
        resize: "squash" scales to (height, width) whatever the shape; "center-crop" scales the
            shorter side to size / crop_ratio and crops the centre, as timm's evaluation does.
        crop_ratio: For "center-crop", above 0 and at most 1.
        mean: The mean for each channel, in units of pixel / 255.
        std: The standard deviation, likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Literal[1, 3]
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    interpolation: Interpolation = "bicubic"
    resize: Literal["squash", "center-crop"] = "squash"
    crop_ratio: float = Field(1.0, gt=0.0, le=1.0)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean and std need {self.channels} numbers, one per channel; "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        return self

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's input."""
        return self.channels, self.height, self.width

    def apply(self, source: Image.Image | NDArray[Any]) -> NDArray[np.float32]:
        """The normalised input, float32 (C, H, W).

        `source` is a PIL image, or uint8 (H, W), (H, W, 1) or (H, W, 3), of any size.
        """
        return self.normalise(self.pixels(source))

    def pixels(self, source: Image.Image | NDArray[Any]) -> NDArray[np.uint8]:
        """The resized image before normalisation, uint8 (C, H, W), as the data cache holds it."""
        if (
            isinstance(source, np.ndarray)
            and self.channels == 1
            and source.shape == (self.height, self.width)
            and source.dtype == np.uint8
            and (self.resize == "squash" or self.crop_ratio == 1.0)
        ):
            # Images of MNIST and the like need no conversion, which saves time.
            return source[None]
        image = self.sized(as_eight_bits(source, "L" if self.channels == 1 else "RGB"))
        array = np.asarray(image, dtype=np.uint8)
        return np.ascontiguousarray(array[None] if self.channels == 1 else array.transpose(2, 0, 1))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (..., C, H, W) -> float32 (..., C, H, W): (pixel / 255 - mean) / std."""
        scale, shift = self.scale_and_shift()
        return pixels.astype(np.float32) * scale[:, None, None] + shift[:, None, None]

    def scale_and_shift(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Normalisation as pixel * scale + shift, both float32 (C,), the same on every device."""
        mean, std = np.array(self.mean, dtype=np.float64), np.array(self.std, dtype=np.float64)
        return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def sized(self, image: Image.Image) -> Image.Image:
        """The image resized to (height, width)."""
        wanted, kind = (self.width, self.height), _FILTERS[self.interpolation]
        if self.resize == "squash":
            return image if image.size == wanted else image.resize(wanted, kind)
        # As in timm and torchvision: the shorter side becomes floor(size / crop_ratio), the other
        # one is scaled and rounded down; then the centre is cropped.
        target_h = math.floor(self.height / self.crop_ratio)
        target_w = math.floor(self.width / self.crop_ratio)
        if target_h * image.width <= target_w * image.height:
            scaled = (target_w, max(self.height, target_w * image.height // image.width))
        else:
            scaled = (max(self.width, target_h * image.width // image.height), target_h)
        if image.size != scaled:
            image = image.resize(scaled, kind)
        left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
        return image.crop((left, top, left + self.width, top + self.height))


def as_eight_bits(
    source: Image.Image | NDArray[Any], mode: Literal["L", "RGB"] = "RGB"
) -> Image.Image:
    """The image with 8 bits a channel, grey ("L") or in colour, from any mode of Pillow.

    `source` is a PIL image, or uint8 (H, W), (H, W, 1) or (H, W, 3).
    """
    image = _as_image(source)
    # By way of RGBA, since Pillow guesses the transparency of palette images.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        image = _eight_bits(image)
    return image.convert(mode)


def _as_image(source: Image.Image | NDArray[Any]) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    array = np.asarray(source)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array is uint8, not {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(f"an image array is (H, W), (H, W, 1) or (H, W, 3), not {array.shape}")
    return Image.fromarray(array)


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow clips 16-bit grey at 255; image viewers show the high byte.
    array = np.asarray(image).astype(np.float64)
    top = 65535.0 if array.max(initial=0.0) > 255.0 else 255.0
    return Image.fromarray(np.clip(array * (255.0 / top), 0, 255).round().astype(np.uint8))
