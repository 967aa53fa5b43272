"""Augmentation of whole batches of uint8 tensors, which is fast compared with a training step.

Presets:

- `none`;
- `flip`: half of the images are mirrored, so that each has two forms, of which a teacher's outputs
  are computed once;
- `erasing`: random erasing at 0.1, for images that are all centred and have one orientation;
- `light`: shifted crop, flip and random erasing at 0.1, for small images;
- `thesis`: RandAugment(2, 9), MixUp 0.8, CutMix 1.0 and random erasing 0.25, by timm;
- `imagenet`: a random resized crop of 8 to 100 % of the area, flip, RandAugment(2, 9) with a
  standard deviation of 0.5, MixUp 0.8, CutMix 1.0 and random erasing 0.25, by timm.

The part that needs the single image, `Augmentation.image_transform`, runs where images are decoded,
in worker processes; the rest on whole batches.

References:
    L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (`thesis`).
    Touvron et al. 2021, "Training data-efficient image transformers & distillation through
    attention", table 9 (`imagenet`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor

from ...core.errors import InputError
from ..data.preprocessing import Preprocessing
from ..data.splits import normalise

Preset = Literal["none", "flip", "erasing", "light", "thesis", "imagenet"]
# These mix the images of a batch in pairs.
MIXING: tuple[Preset, ...] = ("thesis", "imagenet")
# As `create_transform` of timm names it.
IMAGENET_POLICY = "rand-m9-mstd0.5-inc1"
# A shift of 2 in 28 pixels, and the same share of larger images.
SHIFT_SHARE = 1 / 14
LIGHT_ERASING, STRONG_ERASING = 0.1, 0.25


class Augmentation:
    """Augments and normalises batches.

    Random numbers come from the global generators of torch, numpy and Python, which the training
    loop seeds and saves.

    Args:
        preset: The name of the augmentation.
        preprocessing: The mean and std, and the image size.
        classes: The number of classes, for soft targets.
        label_smoothing: Applied to the soft targets of `thesis` and `imagenet`.
        decoded: Whether the images are decoded in advance. If not, `thesis` has an image
            transform too, so that worker processes compute it.

    Attributes:
        image_transform: From an image to uint8 (C, H, W), for `BatchLoader`; None if images are
            only resized.

    Raises:
        InputError: There is no such preset.
    """

    def __init__(
        self,
        preset: Preset,
        preprocessing: Preprocessing,
        classes: int,
        label_smoothing: float = 0.0,
        *,
        decoded: bool = True,
    ) -> None:
        if preset not in get_args(Preset):
            known = ", ".join(get_args(Preset))
            raise InputError(f"augmentation {preset!r}: not known; choose one of {known}")
        self.preset, self.preprocessing = preset, preprocessing
        self.mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.erase: Callable[[Tensor], Tensor] | None = None
        self.policy: Callable[[Any], Any] | None = None
        self.image_transform: PolicyTransform | ImagenetTransform | None = None
        if preset in ("erasing", "light"):
            self.erase = RandomErasing(probability=LIGHT_ERASING, mode="pixel", device="cpu")
        if preset in MIXING:
            self.mix = Mixup(
                mixup_alpha=0.8,
                cutmix_alpha=1.0,
                label_smoothing=label_smoothing,
                num_classes=classes,
            )
            self.erase = RandomErasing(probability=STRONG_ERASING, mode="pixel", device="cpu")
        if preset == "imagenet":
            self.image_transform = ImagenetTransform(preprocessing)
        elif preset == "thesis" and decoded:
            self.policy = _thesis_policy(preprocessing)
        elif preset == "thesis":
            self.image_transform = PolicyTransform(preprocessing)

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augment one batch.

        Args:
            pixels: uint8 (B, C, H, W).
            labels: int64 (B,).

        Returns:
            Normalised float32 images, and labels (B,) or soft targets (B, classes).

        Raises:
            InputError: MixUp gets an odd number of images.
        """
        if self.preset == "none":
            return normalise(pixels, self.preprocessing), labels
        if self.policy is not None:
            pixels = torch.from_numpy(
                np.stack([self._apply_policy(image) for image in pixels.numpy()])
            )
        if self.preset in ("light", "thesis"):
            pixels = shift_and_flip(pixels)
        elif self.preset == "flip":
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, mirrored(pixels), pixels)
        images = normalise(pixels, self.preprocessing)
        images = self.erase(images) if self.erase is not None else images
        if self.mix is not None:
            if len(images) % 2:
                raise InputError(
                    f"MixUp pairs images, so a batch must be even, not {len(images)}; "
                    "choose an even batch_size"
                )
            images, labels = self.mix(images, labels)
        return images, labels

    def _apply_policy(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        assert self.policy is not None
        grey = pixels.shape[0] == 1
        image = pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        return _channels_first(self.policy(Image.fromarray(image)))


class PolicyTransform:
    """Resize an image, and apply the RandAugment of `thesis`.

    Args:
        preprocessing: The input size, and how images are resized.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing, self.policy = preprocessing, _thesis_policy(preprocessing)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Augment an image: uint8 (C, H, W)."""
        return _channels_first(self.policy(self.preprocessing.sized(image)))


class ImagenetTransform:
    """The part of `imagenet` that needs the single image, by timm's `create_transform`.

    Args:
        preprocessing: The input size, the filter of resizing, and the mean, with which RandAugment
            fills.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.grey = preprocessing.channels == 1
        mean = preprocessing.mean * 3 if self.grey else preprocessing.mean
        parts = create_transform(
            (3, preprocessing.height, preprocessing.width),
            is_training=True,
            auto_augment=IMAGENET_POLICY,
            interpolation=preprocessing.interpolation,
            mean=mean,
            separate=True,
        )
        # Without the last part, normalisation, which follows on the whole batch.
        self.crop, self.policy = parts[:2]
        for operation in (each for part in self.policy.transforms for each in part.ops):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Augment an image: uint8 (C, H, W)."""
        augmented = self.policy(self.crop(image.convert("RGB")))
        return _channels_first(augmented.convert("L") if self.grey else augmented)


def _thesis_policy(preprocessing: Preprocessing) -> Callable[[Any], Any]:
    fill = tuple(round(255 * mean) for mean in preprocessing.mean)
    options = {
        "translate_const": max(1, int(0.45 * preprocessing.width)),
        "img_mean": fill if len(fill) > 1 else fill[0],
    }
    policy: Callable[[Any], Any] = rand_augment_transform("rand-m9-n2", options)
    return policy


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # timm draws 0 bits at times, which Pillow 13 refuses and earlier versions made black.
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _unchanged(images: Tensor) -> Tensor:
    """The images."""
    return images


def mirrored(images: Tensor) -> Tensor:
    """The mirror images of a batch (B, C, H, W), of any type."""
    return images.flip(-1)


# All that these presets make of an image, before or after it is normalised.
FIXED_FORMS: Mapping[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "none": (_unchanged,),
    "flip": (_unchanged, mirrored),
}


def shift_and_flip(pixels: Tensor) -> Tensor:
    """Crop each image from a zero-padded copy at a random place, and mirror half of them.

    Shapes: uint8 (B, C, H, W) -> the same.
    """
    count, _, height, width = pixels.shape
    reach_y, reach_x = max(1, round(height * SHIFT_SHARE)), max(1, round(width * SHIFT_SHARE))
    padded = F.pad(pixels, (reach_x, reach_x, reach_y, reach_y))
    rows = torch.randint(0, 2 * reach_y + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * reach_x + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    images = torch.arange(count)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def seed_everything(seed: int) -> None:
    """Seed the global random generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
