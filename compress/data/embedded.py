"""The data that the package contains, for a first run without a network.

A data set of 15,500 images of Fashion-MNIST, which `build_quickstart` made, and a baseline trained
on Fashion-MNIST with a card that describes it.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InputError
from .fashion_mnist import Arrays
from .idx import parse_idx

ARCHIVE = Path(__file__).with_name("quickstart.idx.xz")
PARTS = ("train", "val", "test")
WEIGHTS = Path(__file__).with_name("quickstart_vit.safetensors")
CARD = Path(__file__).with_name("quickstart_vit.json")


@cache
def read_quickstart() -> dict[str, Arrays]:
    """Read the embedded data set.

    Returns:
        For "train", "val" and "test", uint8 images (N, 28, 28) and int64 labels (N,).

    Raises:
        InputError: The package is damaged.
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


def embedded_card() -> dict[str, Any]:
    """Read the card of the embedded baseline.

    Returns:
        `model` (timm name), `overrides`, `preprocessing`, `recipes`, `val_top1` and `test_top1`
        (between 0 and 1, measured from the stored file), and where and how it was trained.

    Raises:
        InputError: The package is damaged.
    """
    if not WEIGHTS.is_file():
        raise InputError(f"{WEIGHTS}: the embedded baseline is missing; install vitrim again")
    try:
        card = json.loads(CARD.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{CARD}: the card of the embedded baseline cannot be read ({error}); "
            "install vitrim again"
        ) from error
    if not isinstance(card, dict):
        raise InputError(
            f"{CARD}: the card of the embedded baseline is not a table; install vitrim again"
        )
    return card
