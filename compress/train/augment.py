"""Augmentation of whole batches of uint8 tensors, which is fast compared with a training step.

Presets:

- `none`;
- `erasing`: random erasing at 0.1, for images that are all centred and have one orientation;
- `light`: shifted crop, flip and random erasing at 0.1, for small images;
- `thesis`: RandAugment(2, 9), MixUp 0.8, CutMix 1.0 and random erasing 0.25, by timm.

References:
    L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (`thesis`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ...core.errors import InputError
from ..data.preprocessing import Preprocessing
from ..data.splits import normalise

Preset = Literal["none", "erasing", "light", "thesis"]
# A shift of 2 in 28 pixels, and the same share of larger images.
SHIFT_SHARE = 1 / 14
LIGHT_ERASING, THESIS_ERASING = 0.1, 0.25


class Augmentation:
    """Augments and normalises batches.

    Random numbers come from the global generators of torch, numpy and Python, which the training
    loop seeds and saves.

    Args:
        preset: The name of the augmentation.
        preprocessing: The mean and std, and the image size.
        classes: The number of classes, for soft targets.
        label_smoothing: Applied to the soft targets of `thesis`.

    Raises:
        InputError: There is no such preset.
    """

    def __init__(
        self,
        preset: Preset,
        preprocessing: Preprocessing,
        classes: int,
        label_smoothing: float = 0.0,
    ) -> None:
        if preset not in get_args(Preset):
            known = ", ".join(get_args(Preset))
            raise InputError(f"augmentation {preset!r}: not known; choose one of {known}")
        self.preset, self.preprocessing = preset, preprocessing
        self.mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.erase: Callable[[Tensor], Tensor] | None = None
        self.policy: Callable[[Any], Any] | None = None
        if preset in ("erasing", "light"):
            self.erase = RandomErasing(probability=LIGHT_ERASING, mode="pixel", device="cpu")
        if preset == "thesis":
            fill = tuple(round(255 * mean) for mean in preprocessing.mean)
            self.policy = rand_augment_transform(
                "rand-m9-n2",
                {
                    "translate_const": max(1, int(0.45 * preprocessing.width)),
                    "img_mean": fill if len(fill) > 1 else fill[0],
                },
            )
            self.mix = Mixup(
                mixup_alpha=0.8,
                cutmix_alpha=1.0,
                label_smoothing=label_smoothing,
                num_classes=classes,
            )
            self.erase = RandomErasing(probability=THESIS_ERASING, mode="pixel", device="cpu")

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
        images = normalise(
            pixels if self.preset == "erasing" else shift_and_flip(pixels), self.preprocessing
        )
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
        array = np.asarray(self.policy(Image.fromarray(image)), dtype=np.uint8)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


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
