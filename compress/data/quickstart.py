"""The embedded data set: 15,500 real images of Fashion-MNIST, so that the first run needs no
network. `build_quickstart` made it.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from .fashion_mnist import Arrays
from .idx import parse_idx

ARCHIVE = Path(__file__).with_name("quickstart.idx.xz")
PARTS = ("train", "val", "test")


@cache
def read_quickstart() -> dict[str, Arrays]:
    """{"train", "val", "test"}: uint8 images (N, 28, 28) and int64 labels (N,). Errors: InputError
    if the package is damaged.
    """
    try:
        raw = lzma.decompress(ARCHIVE.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise InputError(
            f"{ARCHIVE}: the embedded data set cannot be read ({error}); install vitrim again"
        ) from error
    found: dict[str, Arrays] = {}
    start = 0
    for part in PARTS:
        images, used = parse_idx(raw[start:], str(ARCHIVE))
        start += used
        labels, used = parse_idx(raw[start:], str(ARCHIVE))
        start += used
        found[part] = (images, labels.astype(np.int64))
    return found
