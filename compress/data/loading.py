"""Loading of data sets by name or path, as three splits without overlap.

1. The official test split is the test split, or else the official validation split.
2. Where both official splits exist, the validation split is the official one. Otherwise it is cut
   from train, stratified, by a fixed seed.
3. A data set with a train split only gives up a test split in the same way.
4. A stream has no division by class: its held-out images are the first rows of every shard.
5. Fashion-MNIST and the embedded data set have a fixed division, so that the embedded baseline was
   not trained on any validation image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...core.console import status
from ...core.errors import InputError
from . import fashion_mnist, hf_datasets, image_folder
from .decoding import LazyPixels, OnError, RawDataset, RawSplit, decode, from_arrays
from .embedded import read_quickstart
from .file_list import INDEX_ABOVE
from .named_datasets import NAMED_DATASETS, canonical_name, default_preprocessing
from .preprocessing import Preprocessing
from .splits import DataSplits, Indices, Split, require_splits, stratified_indices
from .streaming import TEST_SHARE, open_stream
from .streams import StreamPixels
from .tar_shards import read_tars

# In units of 2^30 bytes. CIFAR-10 at 224 x 224 needs 8.4, Tiny ImageNet 15.4, ImageNet-1k 180.
CACHE_GB = 16.0
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
    cache_gb: float = CACHE_GB,
    streaming: bool = False,
    on_error: OnError = "stop",
    quiet: bool = True,
) -> DataSplits:
    """Load a data set at a model's input size.

    Args:
        spec: `quickstart`, `fashion-mnist`, `cifar10`, `cifar100`, `mnist`, `tiny-imagenet`,
            `imagenet-1k`, a hub name `owner/name`, `imagefolder:PATH`, `parquet:PATH`,
            `arrow:PATH`, `webdataset:PATH` or `disk:PATH`.
        image: The input size (C, H, W), with the mean and std of the data set.
        preprocessing: The whole preprocessing; used instead of `image`.
        seed: For the division into splits.
        validation: The share of train that is held out if there is no official validation split.
        limit: The largest number of training images, drawn stratified (default: all).
        cache: The folder for decoded images (default: memory, or the user's cache folder beyond
            256 MB).
        cache_gb: The largest size of all decoded images in units of 2^30 bytes. Larger data sets
            are decoded when their images are read.
        streaming: Read the training images while they are needed, in the order of the shards. Only
            validation and test images are copied to the cache folder.
        on_error: "skip" leaves out images that cannot be decoded. Where images are decoded when
            they are read, `BatchLoader` replaces and counts them.
        quiet: Show no progress bar.

    Returns:
        The three splits.

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
    opening = _Opening(preprocessing, cache, on_error, quiet, f"decoding {spec}")
    if streaming:
        return _open_stream(spec, name, opening, validation, limit, cache_gb)
    raw = _read(name, quiet=quiet)
    plan = _plan(spec, raw, seed, validation)
    small = _decoded_gb(preprocessing, *(images for images, _ in plan.values())) <= cache_gb
    if small and name.startswith("imagefolder:") and len(raw.train) > INDEX_ABOVE // 2:
        # The cache of decoded images is looked up by the times of all files, not by an index.
        raw = _read(name, fresh=True, quiet=quiet)
        plan = _plan(spec, raw, seed, validation)
    splits = opening.splits(plan, small)
    left_out = sum(len(rows) - len(splits[part]) for part, (_, rows) in plan.items())
    if left_out:
        status(f"{spec}: {left_out} unreadable images are left out")
    data = DataSplits(
        spec, splits["train"], splits["val"], splits["test"], raw.labels, preprocessing, left_out
    )
    return data.limited(limit, seed)


@dataclass(frozen=True)
class _Opening:
    """How the images of a data set become splits."""

    preprocessing: Preprocessing
    cache: Path | None
    on_error: OnError
    quiet: bool
    title: str

    def splits(self, plan: Mapping[str, Part], small: bool) -> dict[str, Split]:
        """The splits of a plan; those of small data sets are decoded."""
        opened: dict[int, tuple[NDArray[np.uint8] | LazyPixels, list[int]]] = {}
        splits: dict[str, Split] = {}
        for part, (images, rows) in plan.items():
            if id(images) not in opened:
                opened[id(images)] = self._open(images, small)
            pixels, unreadable_rows = opened[id(images)]
            kept = np.setdiff1d(rows, unreadable_rows) if unreadable_rows else rows
            chosen = None if len(kept) == len(images) else kept
            stamp = sha256(images.fingerprint.encode() + kept.tobytes()).hexdigest()
            splits[part] = Split(pixels, images.targets[kept], self.preprocessing, chosen, stamp)
        return splits

    def _open(
        self, images: RawSplit, small: bool
    ) -> tuple[NDArray[np.uint8] | LazyPixels, list[int]]:
        if not small:
            return LazyPixels(images, self.preprocessing, self.on_error), []
        unreadable_rows: list[int] = []
        pixels = decode(
            images,
            self.preprocessing,
            title=self.title,
            cache=self.cache,
            quiet=self.quiet,
            unreadable_rows=unreadable_rows if self.on_error == "skip" else None,
        )
        return pixels, unreadable_rows


def _open_stream(
    spec: str,
    name: str,
    opening: _Opening,
    validation: float,
    limit: int | None,
    cache_gb: float,
) -> DataSplits:
    found = open_stream(name, validation=validation, limit=limit, quiet=opening.quiet)
    copied = {"val": found.val, "test": found.test}
    require_splits(spec, {part: raw.targets for part, raw in copied.items()}, found.labels)
    plan = {part: (raw, np.arange(len(raw), dtype=np.int64)) for part, raw in copied.items()}
    small = _decoded_gb(opening.preprocessing, *copied.values()) <= cache_gb
    splits = opening.splits(plan, small)
    unread = np.broadcast_to(np.int64(-1), (found.train.images,))
    train = Split(
        StreamPixels(found.train, opening.on_error),
        unread,
        opening.preprocessing,
        fingerprint=found.train.fingerprint,
    )
    return DataSplits(
        spec, train, splits["val"], splits["test"], found.labels, opening.preprocessing
    )


def _decoded_gb(preprocessing: Preprocessing, *splits: RawSplit) -> float:
    images = sum({id(split): len(split) for split in splits}.values())
    return images * float(np.prod(preprocessing.image)) / 2**30


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


def _read(name: str, *, fresh: bool = False, quiet: bool = True) -> RawDataset:
    """Open the source of a data set; nothing is decoded. `fresh` uses no index of a folder."""
    kind, colon, rest = name.partition(":")
    if name.startswith(UNLABELED):
        raise InputError(
            f"{name}: images without labels, and this needs labels; use imagefolder:PATH with "
            "one folder a class"
        )
    path = Path(rest).expanduser()
    if kind == "imagefolder":
        return image_folder.read_image_folder(path, fresh=fresh, quiet=quiet)
    if kind == "webdataset":
        return read_tars(path, quiet=quiet)
    readers = {
        "parquet": hf_datasets.read_parquet,
        "arrow": hf_datasets.read_arrow,
        "disk": hf_datasets.read_disk,
    }
    if colon:
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
