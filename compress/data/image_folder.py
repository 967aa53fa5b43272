"""Images in folders: PATH/<class>/*.png, or PATH/{train,val,test}/<class>/*.png.

The names of splits may have any case. Folders that hold the same class folders under other names
are refused, not read as classes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.errors import InputError
from .decoding import RawDataset, RawSplit
from .file_list import list_images
from .splits import SPLIT_NAMES, split_of

# More folders with equal contents than these are classes, such as left/ and right/ of each.
MOST_SPLITS = 5
_SPLIT_WORD = re.compile(
    r"(train(ing)?|test(ing)?|val(id(ation)?)?|eval(uation)?|dev|hold|holdout|split|fold)"
    r"(set|data|images?)?s?"
)
_WORDS_AND_CAPITALS = re.compile(r"(?<=[a-z])(?=[A-Z])|[^a-zA-Z]+")


def read_image_folder(root: Path, *, fresh: bool = False, quiet: bool = True) -> RawDataset:
    """List the images of a folder; nothing is decoded.

    Args:
        root: The folder.
        fresh: List the files again although there is an index of the folder.
        quiet: Show no progress bar.

    Raises:
        InputError: The folder is missing, has no classes, or a class without images.
    """
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise InputError(f"{root}: {problem}; imagefolder: names a folder with one folder a class")
    parts = _splits(root)
    if "train" not in parts:
        if parts:
            other = next(iter(parts.values()))
            raise InputError(
                f"{root}: holds {other.name} but no train folder; "
                "add one, or name the folder that holds the classes"
            )
        _require_classes(root)
    train_root = parts.get("train", root)
    labels = tuple(label_of(folder) for folder in _folders(train_root))
    if not labels:
        raise InputError(
            f"{train_root}: no class folders in it; put the images into one folder a class"
        )

    def read(part: str) -> RawSplit | None:
        return _images(parts[part], labels, fresh, quiet) if part in parts else None

    train = _images(train_root, labels, fresh, quiet)
    return RawDataset(labels, train, read("val"), read("test"))


def read_unlabeled_folder(root: Path) -> RawSplit:
    """List all images of a folder and of the folders in it, without labels.

    Raises:
        InputError: The folder is missing, or has no images.
    """
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise InputError(f"{root}: {problem}; images: names a folder of images, nested or not")
    files = list_images(root, [root])
    if not len(files):
        raise InputError(f"{root}: no images in it; give some hundred, e.g. .jpg or .png")
    return RawSplit(np.zeros(len(files), np.int64), files.open, files.where, files.fingerprint)


def label_of(folder: Path) -> str:
    """The label of a class folder: its name, read as UTF-8 whatever the locale."""
    return os.fsencode(folder.name).decode("utf-8", "replace")


def _splits(root: Path) -> dict[str, Path]:
    # A class may be named `test`, but the folder of a split contains folders.
    found: dict[str, Path] = {}
    for folder in _folders(root):
        part = split_of(folder.name)
        if part is None or not _folders(folder):
            continue
        if part in found:
            images = {"train": "training", "val": "validation", "test": "test"}[part]
            raise InputError(
                f"{root}: {found[part].name} and {folder.name} both hold the {images} images; "
                "keep one of them"
            )
        found[part] = folder
    return found


def _require_classes(root: Path) -> None:
    """Refuse a folder whose folders are splits under other names, or lie around the classes."""
    folders = _folders(root)
    if not folders or any(_has_images(folder) for folder in folders):
        return
    inside = [{inner.name.lower() for inner in _folders(folder)} for folder in folders]
    same = len(set.intersection(*inside)) > 1
    named = [
        any(map(_SPLIT_WORD.fullmatch, map(str.lower, _WORDS_AND_CAPITALS.split(folder.name))))
        for folder in folders
    ]
    if not (all(inside) and all(named)) and not (
        same and (any(named) or len(folders) <= MOST_SPLITS)
    ):
        return
    ways = f"rename them to {', '.join(names[0] for names in SPLIT_NAMES.values())}"
    if len(folders) == 1:
        (only,) = folders
        raise InputError(
            f"{root}: its only folder, {only.name}, contains folders; name {only} if it holds the "
            "classes, or rename it to train if it is a split"
        )
    names = [folder.name for folder in folders[:MOST_SPLITS]]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    raise InputError(
        f"{root}: are {listed} splits? Each contains folders and no image; {ways}, "
        "or name the folder that holds the classes"
    )


def _has_images(folder: Path) -> bool:
    endings = set(Image.registered_extensions())
    return any(path.suffix.lower() in endings and path.is_file() for path in folder.iterdir())


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        names = [
            entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()
        ]
    return [root / name for name in sorted(names)]


def _images(root: Path, labels: tuple[str, ...], fresh: bool, quiet: bool) -> RawSplit:
    folders = _folders(root)
    numbers = {label: number for number, label in enumerate(labels)}
    for folder in folders:
        if label_of(folder) not in numbers:
            raise InputError(
                f"{folder}: a class that the training split does not have; "
                "remove it, or add it to train"
            )
    files = list_images(root, folders, fresh=fresh, quiet=quiet)
    found = np.bincount(files.folders, minlength=len(folders))
    if not found.all():
        empty = folders[int(found.argmin())]
        raise InputError(f"{empty}: no images in this class; add some, or remove the folder")
    classes = np.array([numbers[label_of(folder)] for folder in folders], dtype=np.int64)
    return RawSplit(classes[files.folders], files.open, files.where, files.fingerprint)
