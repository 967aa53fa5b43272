"""Pictures in folders: PATH/<class>/*.png, or PATH/train/<class>/*.png with val (or validation) and
test beside it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.errors import InputError
from .decoding import Pictures, Sources

_TRAIN, _VAL, _TEST = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
)


def read_image_folder(root: Path) -> Sources:
    """List the pictures; nothing is decoded yet. Errors: InputError for a missing path, no classes,
    a class without pictures.
    """
    if not root.is_dir():
        raise InputError(
            f"{root}: {'not a folder' if root.exists() else 'no such folder'}; imagefolder: names a folder with one folder a class"
        )
    parts = {
        kind: _part(root, names)
        for kind, names in (("train", _TRAIN), ("val", _VAL), ("test", _TEST))
    }
    train_root = parts["train"]
    if train_root is None:
        if parts["val"] or parts["test"]:
            other = parts["val"] or parts["test"]
            raise InputError(
                f"{root}: holds {other.name if other else ''} but no train folder; add one, or name the folder that holds the classes"
            )
        train_root = root
    labels = tuple(folder.name for folder in _folders(train_root))
    if not labels:
        raise InputError(
            f"{train_root}: no class folders in it; put the pictures into one folder a class"
        )
    read = {
        kind: _pictures(folder, labels)
        for kind, folder in parts.items()
        if folder is not None and kind != "train"
    }
    return Sources(labels, _pictures(train_root, labels), read.get("val"), read.get("test"))


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    # A class may be called `test`; a split folder holds folders of its own.
    return next(
        (root / name for name in names if (root / name).is_dir() and _folders(root / name)), None
    )


def _folders(root: Path) -> list[Path]:
    return sorted(
        folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )


def _pictures(root: Path, labels: tuple[str, ...]) -> Pictures:
    endings = set(Image.registered_extensions())
    files: list[Path] = []
    targets: list[int] = []
    stamp = hashlib.sha256(str(root.resolve()).encode())
    for folder in _folders(root):
        if folder.name not in labels:
            raise InputError(
                f"{folder}: a class that the training split does not have; remove it, or add it to train"
            )
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in endings and path.is_file() and not path.name.startswith(".")
        )
        if not found:
            raise InputError(f"{folder}: no pictures in this class; add some, or remove the folder")
        for path in found:
            status = path.stat()
            stamp.update(
                f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
            )
        files += found
        targets += [labels.index(folder.name)] * len(found)

    def open_file(index: int) -> Image.Image:
        with Image.open(files[index]) as image:
            image.load()
            return image

    return Pictures(
        np.array(targets, dtype=np.int64),
        open_file,
        lambda index: str(files[index]),
        stamp.hexdigest(),
    )
