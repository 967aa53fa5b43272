"""Fashion-MNIST from Debian's package, with a fixed division into 55,000 / 5,000 / 10,000 images.

References:
    Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
    Learning Algorithms" (MIT licence).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError
from .idx import read_idx
from .splits import stratified_indices

FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of the 60,000 training images, in units of pixel / 255.
MEAN, STD = 0.2860, 0.3530
VALIDATION_IMAGES = 5_000
# The division is the same for every user, so that the embedded baseline was not trained on any
# validation image.
DIVISION_SEED = 2017

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def installed_folder() -> Path | None:
    """The folder of Debian's dataset-fashion-mnist, or None if it is not installed."""
    return next(
        (folder for folder in FOLDERS if (folder / "train-images-idx3-ubyte.gz").is_file()), None
    )


def read_files(folder: Path) -> tuple[Arrays, Arrays]:
    """Read (train, test), each uint8 images (N, 28, 28) and int64 labels (N,)."""
    return _pair(folder, "train"), _pair(folder, "t10k")


def _pair(folder: Path, part: str) -> Arrays:
    images_file = folder / f"{part}-images-idx3-ubyte.gz"
    labels_file = folder / f"{part}-labels-idx1-ubyte.gz"
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{images_file}: {images.shape} images, but {labels.shape} labels in "
            f"{labels_file.name}; the files do not match"
        )
    return images, labels.astype(np.int64)


def division(folder: Path) -> dict[str, Arrays]:
    """Read the splits "train" (55,000), "val" (5,000) and "test" (10,000).

    "test" is the official test file; the others are a stratified division of the train file.
    """
    (images, labels), test = read_files(folder)
    held_out, rest = stratified_indices(labels, min(VALIDATION_IMAGES, len(labels)), DIVISION_SEED)
    return {
        "train": (images[rest], labels[rest]),
        "val": (images[held_out], labels[held_out]),
        "test": test,
    }
