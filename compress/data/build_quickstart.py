"""Make the embedded data set from Debian's dataset-fashion-mnist: `python -m
vitrim.compress.data.build_quickstart`.

Its training images come only from the 55,000 that the shipped baseline was trained on, its
validation images only from the 5,000 held out, its test images only from the official test file;
every class in its own share. Stored: for each part the idx file of the images and that of the
labels, one after another, as one .xz.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from ...core.storage import replace_file
from .fashion_mnist import Arrays, division, installed_folder
from .idx import idx_bytes
from .quickstart import ARCHIVE, PARTS
from .splits import stratified_indices

IMAGES = {"train": 11_000, "val": 1_500, "test": 3_000}
SEED = 28
LIMIT_BYTES = 6 * 10**6


def build(folder: Path) -> bytes:
    """The archive's bytes; the same for the same files."""
    whole = division(folder)
    raw = b"".join(
        idx_bytes(images) + idx_bytes(labels)
        for images, labels in (_part(whole[part], IMAGES[part]) for part in PARTS)
    )
    # Tried and worse: other literal and position contexts, delta filters, predicted residuals,
    # images sorted by class.
    return lzma.compress(
        raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_SHA256, preset=9 | lzma.PRESET_EXTREME
    )


def _part(arrays: Arrays, count: int) -> Arrays:
    images, labels = arrays
    taken, _ = stratified_indices(labels, count, SEED)
    # Mixed, so that the first images of a part are of all classes.
    taken = np.random.Generator(np.random.PCG64(SEED)).permutation(taken)
    return images[taken], labels[taken]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else installed_folder()
    if folder is None:
        raise InputError(
            "Fashion-MNIST's files are not installed (Debian: dataset-fashion-mnist); name their folder"
        )
    archive = build(folder)
    if len(archive) > LIMIT_BYTES:
        raise InputError(
            f"the archive has {len(archive)} bytes, more than {LIMIT_BYTES}; take fewer images"
        )
    replace_file(ARCHIVE, archive)
    print(f"{ARCHIVE.name}: {len(archive)} bytes, {sum(IMAGES.values())} images")


if __name__ == "__main__":
    main()
