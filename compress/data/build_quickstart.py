"""Make the embedded data set: `python -m vitrim.compress.data.build_quickstart [FOLDER]`.

The source is Debian's dataset-fashion-mnist. The images of each split come from the same split of
the fixed division (`fashion_mnist.division`), with each class in its share. The archive is one .xz
with the idx files of images and labels of each split, one after another.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from ...core.storage import replace_file
from .embedded import ARCHIVE, PARTS
from .fashion_mnist import Arrays, division, installed_folder
from .idx import idx_bytes
from .splits import stratified_indices

IMAGES = {"train": 11_000, "val": 1_500, "test": 3_000}
SEED = 28
LIMIT_BYTES = 6 * 10**6


def build(folder: Path) -> bytes:
    """The bytes of the archive, a function of the source files alone."""
    whole = division(folder)
    raw = b"".join(
        idx_bytes(images) + idx_bytes(labels)
        for images, labels in (_part(whole[part], IMAGES[part]) for part in PARTS)
    )
    # Larger: other literal and position contexts, delta filters, predicted residuals, and images
    # sorted by class.
    preset = 9 | lzma.PRESET_EXTREME
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_SHA256, preset=preset)


def _part(arrays: Arrays, count: int) -> Arrays:
    images, labels = arrays
    drawn, _ = stratified_indices(labels, count, SEED)
    # Shuffled, so that the first images of a part are of all classes.
    drawn = np.random.Generator(np.random.PCG64(SEED)).permutation(drawn)
    return images[drawn], labels[drawn]


def main() -> None:
    """Write the archive beside this module."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else installed_folder()
    if folder is None:
        raise InputError(
            "Fashion-MNIST's files are not installed (Debian: dataset-fashion-mnist); "
            "name their folder"
        )
    archive = build(folder)
    if len(archive) > LIMIT_BYTES:
        raise InputError(
            f"the archive has {len(archive)} bytes, more than {LIMIT_BYTES}; use fewer images"
        )
    replace_file(ARCHIVE, archive)
    print(f"{ARCHIVE.name}: {len(archive)} bytes, {sum(IMAGES.values())} images")


if __name__ == "__main__":
    main()
