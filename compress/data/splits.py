"""Train, validation and test: what a data set is once it is open, and the rule that cuts validation
from train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InputError
from .preprocessing import Preprocessing

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images at the model's input size, decoded, and their labels.

    pixels: uint8 (M, C, H, W), perhaps memory-mapped; targets: int64 (N,); rows: int64 (N,), where
    in `pixels` each image lies, so that two splits share one file (None: pixels are exactly this
    split's, in order); preprocessing: how a picture became these pixels, and how they become
    floats.
    """

    pixels: NDArray[np.uint8]
    targets: NDArray[np.int64]
    preprocessing: Preprocessing
    rows: Indices | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Indices | slice) -> tuple[Tensor, Tensor]:
        """uint8 images (B, C, H, W) and int64 labels (B,)."""
        return torch.from_numpy(self._pixels(indices)), torch.from_numpy(
            np.array(self.targets[indices])
        )

    def floats(self, indices: Indices | slice = slice(None)) -> Tensor:
        """Normalised images, float32 (B, C, H, W), as the model reads them."""
        return normalise(torch.from_numpy(self._pixels(indices)), self.preprocessing)

    def arrays(self, limit: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Normalised images and labels as numpy, for export, calibration and measuring; the first
        `limit` of them.
        """
        part = slice(0, limit)
        return self.preprocessing.normalise(self._pixels(part)), np.array(self.targets[part])

    def take(self, indices: Indices) -> Split:
        """The part of the split at `indices`, in that order."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, targets=self.targets[indices], rows=rows)

    def _pixels(self, indices: Indices | slice) -> NDArray[np.uint8]:
        # np.array copies, so that a memory-mapped page is never handed out for writing.
        return np.array(self.pixels[indices if self.rows is None else self.rows[indices]])


@dataclass(frozen=True)
class DataSplits:
    """An open data set. Masks and early stopping look at `val`; only the final table looks at
    `test`.
    """

    name: str
    train: Split
    val: Split
    test: Split
    labels: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def classes(self) -> int:
        return len(self.labels)

    def limited(self, train_images: int | None, seed: int = 0) -> DataSplits:
        """At most so many training images, stratified; validation and test stay whole."""
        if train_images is None or train_images >= len(self.train):
            return self
        return replace(
            self,
            train=self.train.take(stratified_indices(self.train.targets, train_images, seed)[0]),
        )


def stratified_indices(
    targets: NDArray[np.int64], count: int, seed: int
) -> tuple[Indices, Indices]:
    """(taken, rest): `count` indices with every class in its own share, and all the others; both
    sorted, the same for the same seed.
    """
    if not 0 <= count <= len(targets):
        raise InputError(f"{count} images are asked for out of {len(targets)}; ask for fewer")
    generator = np.random.Generator(np.random.PCG64(seed))
    classes, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    exact = sizes * (count / max(1, len(targets)))
    share = np.floor(exact).astype(np.int64)
    # The images lost to rounding go to the largest remainders; ties go to the lower class, so that
    # the rule is fixed.
    for position in np.argsort(share - exact, kind="stable")[: count - int(share.sum())]:
        share[position] += 1
    taken = np.concatenate(
        [
            generator.permutation(np.flatnonzero(inverse == position))[: share[position]]
            for position in range(len(classes))
        ]
        or [np.zeros(0, np.int64)]
    )
    taken = np.sort(taken).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(targets), dtype=np.int64), taken, assume_unique=True)
    return taken, rest


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, C, H, W) -> float32, the same numbers as Preprocessing.normalise."""
    scale, shift = preprocessing.scale_and_shift()
    return (
        pixels.to(torch.float32) * torch.from_numpy(scale)[:, None, None]
        + torch.from_numpy(shift)[:, None, None]
    )


def require_splits(
    name: str, targets: Mapping[str, NDArray[np.int64]], labels: Sequence[str]
) -> None:
    """Refuse a data set that cannot be learned from: an empty split, or a single class. targets:
    those of train, val and test.
    """
    for part, numbers in targets.items():
        if len(numbers) == 0:
            whole = (
                "the data set is empty"
                if not any(map(len, targets.values()))
                else f"the {part} split holds no images"
            )
            raise InputError(f"{name}: {whole}; give it images, or choose another data set")
        if numbers.min() < 0 or numbers.max() >= len(labels):
            raise InputError(
                f"{name}: the {part} split has a label outside 0..{len(labels) - 1}; every image needs one of the {len(labels)} classes"
            )
    seen = np.unique(targets["train"])
    if len(seen) < 2:
        raise InputError(
            f"{name}: all training images are of one class ({labels[int(seen[0])]}); classification needs at least two"
        )
