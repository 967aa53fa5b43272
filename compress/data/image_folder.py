"""Images in folders: PATH/<class>/*.png, or PATH/{train,val,test}/<class>/*.png."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.errors import InputError
from .decoding import RawDataset, RawSplit

_TRAIN, _VAL, _TEST = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
)


def read_image_folder(root: Path) -> RawDataset:
    """List the images of a folder; nothing is decoded.

    Raises:
        InputError: The folder is missing, has no classes, or a class without images.
    """
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise InputError(
            f"{root}: {problem}; imagefolder: needs a folder with one folder per class"
        )
    parts = {
        kind: _part(root, names)
        for kind, names in (("train", _TRAIN), ("val", _VAL), ("test", _TEST))
    }
    train_root = parts["train"]
    if train_root is None:
        other = parts["val"] or parts["test"]
        if other is not None:
            raise InputError(
                f"{root}: holds {other.name} but no train folder; "
                "add one, or name the folder that holds the classes"
            )
        train_root = root
    labels = tuple(folder.name for folder in _folders(train_root))
    if not labels:
        raise InputError(
            f"{train_root}: no class folders in it; put the images into one folder per class"
        )
    read = {
        kind: _images(folder, labels)
        for kind, folder in parts.items()
        if folder is not None and kind != "train"
    }
    return RawDataset(labels, _images(train_root, labels), read.get("val"), read.get("test"))


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    # A class may be named `test`, but the folder of a split contains folders.
    return next(
        (root / name for name in names if (root / name).is_dir() and _folders(root / name)), None
    )


def _folders(root: Path) -> list[Path]:
    return sorted(
        folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )


def _images(root: Path, labels: tuple[str, ...]) -> RawSplit:
    endings = set(Image.registered_extensions())
    files: list[Path] = []
    targets: list[int] = []
    stamp = hashlib.sha256(str(root.resolve()).encode())
    for folder in _folders(root):
        if folder.name not in labels:
            raise InputError(
                f"{folder}: a class that the training split does not have; "
                "remove it, or add it to train"
            )
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in endings and path.is_file() and not path.name.startswith(".")
        )
        if not found:
            raise InputError(f"{folder}: no images in this class; add some, or remove the folder")
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

    return RawSplit(
        np.array(targets, dtype=np.int64),
        open_file,
        lambda index: str(files[index]),
        stamp.hexdigest(),
    )
