"""A small data set of image files: noise in three colours, which a tiny model learns quickly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "fly")


def write_photos(folder: Path, train: int = 8, test: int = 4) -> Path:
    """Write PNG files of 16 x 16 to folder/{train,test}/CLASS, `train` and `test` for each class.

    Returns:
        `folder`.
    """
    noise = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for number, name in enumerate(CLASSES):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, number] += 120
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def write_recipe(path: Path, photos: Path, more: str = "", masks_epochs: int = 3) -> Path:
    """Write a recipe for the photos with a model that trains in seconds; `more` is appended."""
    path.write_text(f"""\
[data]
name = "imagefolder:{photos}"
validation = 0.25
[model]
overrides = {{ img_size = 16, patch_size = 8, embed_dim = 24, depth = 2, num_heads = 3 }}
[baseline]
epochs = 2
[masks]
params = 0.6
epochs = {masks_epochs}
round_to = 4
[finetune]
epochs = 1
[train]
batch_size = 8
threads = 1
{more}""")
    return path
