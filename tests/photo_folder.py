"""A small set of real picture files: noise in three colours, so that a tiny model can tell the
classes apart at once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "fly")


def write_photos(folder: Path, train: int = 8, test: int = 4) -> Path:
    """PNG files of 16 x 16 in folder/train/CLASS and folder/test/CLASS, so many a class; returns
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
    """A recipe on the photos with a model that trains in no time; `more` is added at its end."""
    overrides = "{ img_size = 16, patch_size = 8, embed_dim = 24, depth = 2, num_heads = 3 }"
    path.write_text(
        f'[data]\nname = "imagefolder:{photos}"\nvalidation = 0.25\n[model]\noverrides = {overrides}\n[baseline]\nepochs = 2\n'
        f"[masks]\nparams = 0.6\nepochs = {masks_epochs}\nround_to = 4\n[finetune]\nepochs = 1\n"
        f"[train]\nbatch_size = 8\nthreads = 1\n{more}"
    )
    return path
