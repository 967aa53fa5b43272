"""The splits of an opened data set, and the stratified division of one split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InputError
from .decoding import LazyPixels
from .preprocessing import Preprocessing
from .streams import StreamPixels

Indices = NDArray[np.int64]
PartName = Literal["train", "val", "test"]
# The names of splits in folders and files, the most usual one first.
SPLIT_NAMES: Mapping[PartName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Split:
    """Decoded images at the model's input size, and their labels.

    Attributes:
        pixels: uint8 (M, C, H, W), possibly memory-mapped; or `LazyPixels`, which decodes images
            when it is indexed; or `StreamPixels`, which cannot be indexed.
        targets: int64 (N,), the class numbers; -1 where a stream has yet to be read.
        preprocessing: How images became these pixels, and how pixels are normalised.
        rows: int64 (N,), the row of each image in `pixels`, which several splits can share; None if
            `pixels` has exactly the images of this split, in order.
        fingerprint: Changes with the content of the source; "" where it is unknown.
    """

    pixels: NDArray[np.uint8] | LazyPixels | StreamPixels
    targets: NDArray[np.int64]
    preprocessing: Preprocessing
    rows: Indices | None = None
    fingerprint: str = ""

    @property
    def decoded(self) -> bool:
        """Whether all images are decoded, so that reading them again costs little."""
        return isinstance(self.pixels, np.ndarray)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Indices | slice) -> tuple[Tensor, Tensor]:
        """uint8 images (B, C, H, W) and int64 labels (B,)."""
        targets = np.array(self.targets[indices])
        return torch.from_numpy(self._pixels(indices)), torch.from_numpy(targets)

    def floats(self, indices: Indices | slice = slice(None)) -> Tensor:
        """Normalised images, float32 (B, C, H, W), the input of the model."""
        return normalise(torch.from_numpy(self._pixels(indices)), self.preprocessing)

    def arrays(self, limit: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The first `limit` (default: all) normalised images and labels, as numpy arrays."""
        part = slice(0, limit)
        return self.preprocessing.normalise(self._pixels(part)), np.array(self.targets[part])

    def select(self, indices: Indices) -> Split:
        """The images at `indices`, in that order."""
        rows = indices if self.rows is None else self.rows[indices]
        stamp = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        return replace(self, targets=self.targets[indices], rows=rows, fingerprint=stamp)

    def _pixels(self, indices: Indices | slice) -> NDArray[np.uint8]:
        # np.array copies, so that no caller writes to a memory-mapped page.
        return np.array(self.pixels[indices if self.rows is None else self.rows[indices]])


@dataclass(frozen=True)
class DataSplits:
    """An opened data set.

    Mask learning and early stopping use `val`; only the final table uses `test`. `left_out` is the
    number of images that could not be decoded and belong to no split.
    """

    name: str
    train: Split
    val: Split
    test: Split
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    left_out: int = 0

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.labels)

    def limited(self, train_images: int | None, seed: int = 0) -> DataSplits:
        """The data set with at most `train_images` training images, drawn stratified."""
        if train_images is None or train_images >= len(self.train):
            return self
        rows, _ = stratified_indices(self.train.targets, train_images, seed)
        return replace(self, train=self.train.select(rows))


def split_of(name: str) -> PartName | None:
    """The split that a folder of this name holds, in any case; None for other names."""
    return next((part for part, names in SPLIT_NAMES.items() if name.lower() in names), None)


def stratified_indices(
    targets: NDArray[np.int64], count: int, seed: int
) -> tuple[Indices, Indices]:
    """Divide indices in two, with each class in its share.

    Args:
        targets: (N,), the class numbers.
        count: The size of the first part.
        seed: Equal seeds give equal parts.

    Returns:
        `count` indices and the other ones, both sorted.

    Raises:
        InputError: `count` exceeds the number of images.
    """
    if not 0 <= count <= len(targets):
        raise InputError(f"{count} images of {len(targets)} requested; request fewer")
    generator = np.random.Generator(np.random.PCG64(seed))
    classes, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    exact = sizes * (count / max(1, len(targets)))
    share = np.floor(exact).astype(np.int64)
    # The rest goes to the classes with the largest remainders; ties go to the lower class.
    for position in np.argsort(share - exact, kind="stable")[: count - int(share.sum())]:
        share[position] += 1
    selected = np.concatenate(
        [
            generator.permutation(np.flatnonzero(inverse == position))[: share[position]]
            for position in range(len(classes))
        ]
        or [np.zeros(0, np.int64)]
    )
    selected = np.sort(selected).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(targets), dtype=np.int64), selected, assume_unique=True)
    return selected, rest


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, C, H, W) -> float32, equal to `Preprocessing.normalise`."""
    scale, shift = (torch.from_numpy(part) for part in preprocessing.scale_and_shift())
    return pixels.to(torch.float32) * scale[:, None, None] + shift[:, None, None]


def require_splits(
    name: str, targets: Mapping[str, NDArray[np.int64]], labels: Sequence[str]
) -> None:
    """Validate that a data set can be learned from.

    Args:
        name: The data set, for the message.
        targets: The class numbers (N,) of train, val and test; without train for a stream, whose
            labels are validated when they are read.
        labels: The names of the classes.

    Raises:
        InputError: A split is empty, a label has no class, or train has a single class.
    """
    for part, numbers in targets.items():
        if len(numbers) == 0:
            empty = not any(map(len, targets.values()))
            problem = "the data set is empty" if empty else f"the {part} split holds no images"
            raise InputError(f"{name}: {problem}; give it images, or choose another data set")
        if numbers.min() < 0 or numbers.max() >= len(labels):
            raise InputError(
                f"{name}: the {part} split has a label outside 0..{len(labels) - 1}; "
                f"every image needs one of the {len(labels)} classes"
            )
    found = np.unique(targets.get("train", np.arange(2)))
    if len(found) < 2:
        raise InputError(
            f"{name}: all training images are of one class ({labels[int(found[0])]}); "
            "classification needs at least two"
        )
