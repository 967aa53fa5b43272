"""A small data set and a small model, for tests of training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import DataSplits, Split

SIZE = Preprocessing(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,))


def spots(images: int = 96, seed: int = 0) -> DataSplits:
    """Noise with a bright spot in one of three corners.

    There are `images` for training, and a third of that for validation and for test.
    """

    def split(count: int, seed: int) -> Split:
        generator = np.random.default_rng(seed)
        targets = np.arange(count) % 3
        pixels = generator.integers(0, 120, (count, 1, 8, 8), dtype=np.uint8)
        for index, target in enumerate(targets):
            row, column = ((0, 0), (0, 5), (5, 0))[target]
            pixels[index, 0, row : row + 3, column : column + 3] += 130
        return Split(pixels, targets.astype(np.int64), SIZE)

    return DataSplits(
        "spots",
        split(images, seed),
        split(images // 3, seed + 1),
        split(images // 3, seed + 2),
        ("a", "b", "c"),
        SIZE,
    )


def stripes(images: int = 128, seed: int = 0) -> DataSplits:
    """Images of four classes: a bright band in one of four places, with noise."""
    generator = np.random.Generator(np.random.PCG64(seed))
    preprocessing = Preprocessing(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)

    def split(count: int) -> Split:
        targets = np.arange(count) % 4
        pixels = generator.integers(0, 120, (count, 3, 16, 16), dtype=np.uint8)
        for pixel, target in zip(pixels, targets, strict=True):
            pixel[:, 4 * target : 4 * target + 4] += 100
        return Split(pixels, targets.astype(np.int64), preprocessing)

    return DataSplits(
        "stripes", split(images), split(32), split(32), ("a", "b", "c", "d"), preprocessing
    )


class Net(nn.Module):
    """Two layers with dropout, whose outputs depend on the random generator."""

    def __init__(self, seed: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 3)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are equal bit for bit."""
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
