"""Loading of data sets by name or path, as three splits without overlap.

1. The official test split is the test split, or else the official validation split.
2. Where both official splits exist, the validation split is the official one. Otherwise it is cut
   from train, stratified, by a fixed seed.
3. A data set with a train split only gives up a test split in the same way.
4. Fashion-MNIST and the embedded data set have a fixed division, so that the embedded baseline was
   not trained on any validation image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError
from . import fashion_mnist, hf_datasets, image_folder
from .decoding import RawDataset, RawSplit, decode, from_arrays
from .embedded import read_quickstart
from .named_datasets import NAMED_DATASETS, canonical_name, default_preprocessing
from .preprocessing import Preprocessing
from .splits import DataSplits, Indices, Split, require_splits, stratified_indices

TEST_SHARE = 0.2
# A folder of images without labels.
UNLABELED = "images:"
# A raw split, and which of its images.
Part = tuple[RawSplit, Indices]


def open_dataset(
    spec: str,
    *,
    image: tuple[int, int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    validation: float = 0.1,
    limit: int | None = None,
    cache: Path | None = None,
    quiet: bool = True,
) -> DataSplits:
    """Load a data set at a model's input size.

    Args:
        spec: `quickstart`, `fashion-mnist`, `cifar10`, `cifar100`, `mnist`, `tiny-imagenet`,
            `imagenet-1k`, a hub name `owner/name`, `imagefolder:PATH`, `parquet:PATH`,
            `arrow:PATH` or `disk:PATH`.
        image: The input size (C, H, W), with the mean and std of the data set.
        preprocessing: The whole preprocessing; used instead of `image`.
        seed: For the division into splits.
        validation: The share of train that is held out if there is no official validation split.
        limit: The largest number of training images, drawn stratified (default: all).
        cache: The folder for decoded images (default: memory, or the user's cache folder beyond
            256 MB).
        quiet: Show no progress bar.

    Returns:
        The three splits with decoded images.

    Raises:
        InputError: An unknown name, a missing path, an unreachable hub, an image that cannot be
            decoded, or a data set without images or with a single class.
    """
    name = canonical_name(spec)
    if preprocessing is None:
        if image is None:
            raise ValueError(
                "open_dataset needs the model's input size: image=(C, H, W), or preprocessing="
            )
        preprocessing = default_preprocessing(spec, image)
    if not 0.0 < validation < 1.0:
        raise InputError(
            f"data.validation = {validation}: the share held out for validation lies between "
            "0 and 1, e.g. 0.1"
        )
    raw = _read(name)
    plan = _plan(spec, raw, seed, validation)
    decoded: dict[int, NDArray[np.uint8]] = {}
    splits: dict[str, Split] = {}
    for part, (images, rows) in plan.items():
        if id(images) not in decoded:
            title = f"decoding {spec}"
            decoded[id(images)] = decode(
                images, preprocessing, title=title, cache=cache, quiet=quiet
            )
        pixels, targets = decoded[id(images)], images.targets[rows]
        everything = len(rows) == len(images)
        splits[part] = Split(pixels, targets, preprocessing, None if everything else rows)
    data = DataSplits(
        spec, splits["train"], splits["val"], splits["test"], raw.labels, preprocessing
    )
    return data.limited(limit, seed)


def open_sample(
    spec: str,
    part: Literal["train", "val", "test"],
    count: int,
    *,
    preprocessing: Preprocessing,
    classes: int,
    seed: int = 0,
    validation: float = 0.1,
    draw_seed: int = 0,
    quiet: bool = True,
) -> Split:
    """Load a stratified sample of one split; no other images are decoded.

    Args:
        spec: The data set, as for `open_dataset`.
        part: The split.
        count: The largest number of images.
        preprocessing: From an image to the input of the model.
        classes: The number of classes that the data set must have.
        seed: For the division into splits, which is that of `open_dataset`.
        validation: The share of train that is held out, as for `open_dataset`.
        draw_seed: For the choice of the images.
        quiet: Show no progress bar.

    Returns:
        The sample, with each class in its share of the split.

    Raises:
        InputError: As for `open_dataset`, or the data set has another number of classes.
    """
    raw = _read(canonical_name(spec))
    if len(raw.labels) != classes:
        raise InputError(
            f"{spec} has {len(raw.labels)} classes, but the model has {classes} outputs; "
            "name the data set that it was trained on"
        )
    images, rows = _plan(spec, raw, seed, validation)[part]
    if count < len(rows):
        rows = rows[stratified_indices(images.targets[rows], count, draw_seed)[0]]
    drawn = images.select(rows)
    pixels = decode(drawn, preprocessing, title=f"decoding {spec}", quiet=quiet)
    return Split(pixels, drawn.targets, preprocessing)


def labels_of(spec: str) -> tuple[str, ...]:
    """The names of the classes of a data set; nothing is decoded.

    Raises:
        InputError: As for `open_dataset`.
    """
    return _read(canonical_name(spec)).labels


def open_unlabeled(
    spec: str,
    count: int,
    *,
    preprocessing: Preprocessing,
    seed: int = 0,
    validation: float = 0.1,
    draw_seed: int = 0,
    quiet: bool = True,
) -> Split:
    """Load images whose labels are not needed; no other images are decoded.

    Args:
        spec: `images:PATH`, a folder of images, nested or not; or a data set as for
            `open_dataset`, of which the training split is used.
        count: The largest number of images.
        preprocessing: From an image to the input of the model.
        seed: For the division into splits, as for `open_dataset`.
        validation: The share of train that is held out, as for `open_dataset`.
        draw_seed: For the choice of the images.
        quiet: Show no progress bar.

    Returns:
        The images; the targets of `images:PATH` are all 0.

    Raises:
        InputError: As for `open_dataset`, or the folder has no images.
    """
    if spec.startswith(UNLABELED):
        path = Path(spec.removeprefix(UNLABELED)).expanduser()
        images = image_folder.read_unlabeled_folder(path)
        rows = np.arange(len(images), dtype=np.int64)
    else:
        raw = _read(canonical_name(spec))
        images, rows = _plan(spec, raw, seed, validation)["train"]
    if count < len(rows):
        rows = np.sort(np.random.default_rng(draw_seed).permutation(rows)[:count])
    drawn = images.select(rows)
    pixels = decode(drawn, preprocessing, title=f"decoding {spec}", quiet=quiet)
    return Split(pixels, drawn.targets, preprocessing)


def require_classes(data: DataSplits, classes: int, model_name: str) -> None:
    """Validate that a model has one output per class.

    Raises:
        InputError: It has another number of outputs; the message names both numbers.
    """
    if data.classes != classes:
        raise InputError(
            f"{data.name} has {data.classes} classes, but {model_name} has {classes} outputs; "
            f"set num_classes = {data.classes} in the model's overrides, or choose another data set"
        )


def _read(name: str) -> RawDataset:
    """Open the source of a data set; nothing is decoded."""
    kind, colon, rest = name.partition(":")
    if colon:
        path = Path(rest).expanduser()
        readers = {
            "imagefolder": image_folder.read_image_folder,
            "parquet": hf_datasets.read_parquet,
            "arrow": hf_datasets.read_arrow,
            "disk": hf_datasets.read_disk,
        }
        if name.startswith(UNLABELED):
            raise InputError(
                f"{name}: images without labels, and this needs labels; use imagefolder:PATH with "
                "one folder a class"
            )
        return readers[kind](path) if kind in readers else hf_datasets.read_hub(rest)
    installed = fashion_mnist.installed_folder()
    if name == "quickstart":
        arrays = read_quickstart()
    elif name == "fashion-mnist" and installed is not None:
        arrays = fashion_mnist.division(installed)
    else:
        raw = hf_datasets.read_hub(NAMED_DATASETS[name].hub)
        return _fixed_division(raw) if name == "fashion-mnist" else raw
    train, val, test = (
        from_arrays(*arrays[part], f"{name}, split {part}") for part in ("train", "val", "test")
    )
    return RawDataset(fashion_mnist.LABELS, train, val, test)


def _fixed_division(raw: RawDataset) -> RawDataset:
    """Divide Fashion-MNIST from the hub, which has the order and so the division of the files."""
    train, count = raw.train, min(fashion_mnist.VALIDATION_IMAGES, len(raw.train))
    held_out, rest = stratified_indices(train.targets, count, fashion_mnist.DIVISION_SEED)
    return RawDataset(raw.labels, train.select(rest), train.select(held_out), raw.test)


def _plan(spec: str, raw: RawDataset, seed: int, validation: float) -> dict[str, Part]:
    """The images of the three splits, validated before the long decoding begins."""
    train, val, test = raw.train, raw.val, raw.test
    if test is None:
        val, test = None, val
    rest = np.arange(len(train), dtype=np.int64)
    plan: dict[str, Part] = {}
    if test is None:
        plan["test"], rest = _cut(spec, train, rest, TEST_SHARE, seed + 1)
    else:
        plan["test"] = (test, np.arange(len(test), dtype=np.int64))
    if val is None:
        plan["val"], rest = _cut(spec, train, rest, validation, seed)
    else:
        plan["val"] = (val, np.arange(len(val), dtype=np.int64))
    plan = {"train": (train, rest), "val": plan["val"], "test": plan["test"]}
    targets = {part: images.targets[rows] for part, (images, rows) in plan.items()}
    require_splits(spec, targets, raw.labels)
    return plan


def _cut(
    spec: str, train: RawSplit, rest: Indices, share: float, seed: int
) -> tuple[Part, Indices]:
    count = round(share * len(rest))
    if len(rest) and not 0 < count < len(rest):
        raise InputError(
            f"{spec}: {len(rest)} training images are too few for a held-out split of {share:.0%}; "
            "add images"
        )
    taken, left = stratified_indices(train.targets[rest], count, seed)
    return (train, rest[taken]), rest[left]
