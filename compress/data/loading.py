"""The one door through which every data set comes in: a name or a path in, three splits that do not
leak out.

The official test split is the test (the official validation split where no labelled test exists);
validation is the official one where both exist, else it is cut from train, stratified, by a fixed
seed; a set with nothing but train gives up a test of its own the same way. Fashion-MNIST and the
embedded quickstart have a fixed division, so that the shipped baseline has seen nobody's validation
images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError
from . import fashion_mnist, image_folder
from . import hf_datasets as hub
from .decoding import Pictures, Sources, decode, from_arrays
from .named_datasets import KNOWN, canonical, default_preprocessing
from .preprocessing import Preprocessing
from .quickstart import read_quickstart
from .splits import DataSplits, Indices, Split, require_splits, stratified_indices

TEST_SHARE = 0.2
# Pictures of a source, and which of them.
Part = tuple[Pictures, Indices]


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
    """Open a data set at a model's input size.

    spec: `quickstart`, `fashion-mnist`, `cifar10`, `cifar100`, `mnist`, `tiny-imagenet`,
    `imagenet-1k`, a hub name `owner/name`, `imagefolder:PATH`, `parquet:PATH`, `arrow:PATH` or
    `disk:PATH`. Give `image` = (C, H, W), then mean and std are the data set's own, or a whole
    `preprocessing`. validation: the share of train held out where no official split serves. limit:
    at most so many training images, stratified. cache: folder for decoded images (default: memory,
    or the user's cache folder beyond 256 MB). Errors: InputError, one line, for an unknown name, a
    missing path, an unreachable hub, a corrupt image, an empty or one-class set.
    """
    name = canonical(spec)
    if preprocessing is None:
        if image is None:
            raise ValueError(
                "open_dataset needs the model's input size: image=(C, H, W), or preprocessing="
            )
        preprocessing = default_preprocessing(spec, image)
    if not 0.0 < validation < 1.0:
        raise InputError(
            f"data.validation = {validation}: the share held out for validation lies between 0 and 1, e.g. 0.1"
        )
    sources = _sources(name)
    plan = _plan(spec, sources, seed, validation)
    # The splits are checked before the long decoding begins.
    require_splits(
        spec,
        {part: pictures.targets[rows] for part, (pictures, rows) in plan.items()},
        sources.labels,
    )
    decoded: dict[int, NDArray[np.uint8]] = {}
    splits: dict[str, Split] = {}
    for part, (pictures, rows) in plan.items():
        if id(pictures) not in decoded:
            decoded[id(pictures)] = decode(
                pictures, preprocessing, title=f"decoding {spec}", cache=cache, quiet=quiet
            )
        everything = len(rows) == len(pictures)
        splits[part] = Split(
            decoded[id(pictures)],
            pictures.targets[rows],
            preprocessing,
            None if everything else rows,
        )
    data = DataSplits(
        spec, splits["train"], splits["val"], splits["test"], sources.labels, preprocessing
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
    """At most `count` images of one split of a data set, every class in its own share; no others
    are decoded.

    spec, preprocessing, seed and validation as for `open_dataset`, which gives the same splits;
    `draw_seed` says which of the images. Errors: as `open_dataset`, and InputError if the data set
    has another number of classes than `classes`.
    """
    sources = _sources(canonical(spec))
    if len(sources.labels) != classes:
        raise InputError(
            f"{spec} has {len(sources.labels)} classes, but the model has {classes} outputs; name the data set that it was trained on"
        )
    plan = _plan(spec, sources, seed, validation)
    require_splits(
        spec,
        {name: pictures.targets[rows] for name, (pictures, rows) in plan.items()},
        sources.labels,
    )
    pictures, rows = plan[part]
    if count < len(rows):
        rows = rows[stratified_indices(pictures.targets[rows], count, draw_seed)[0]]
    drawn = pictures.part(rows)
    return Split(
        decode(drawn, preprocessing, title=f"decoding {spec}", quiet=quiet),
        drawn.targets,
        preprocessing,
    )


def require_classes(data: DataSplits, classes: int, model_name: str) -> None:
    """Refuse a model whose head does not have one output a class."""
    if data.classes != classes:
        raise InputError(
            f"{data.name} has {data.classes} classes, but {model_name} has {classes} outputs; "
            f"set num_classes = {data.classes} in the model's overrides, or choose another data set"
        )


def _sources(name: str) -> Sources:
    kind, colon, rest = name.partition(":")
    if colon:
        path = Path(rest).expanduser()
        readers = {
            "imagefolder": image_folder.read_image_folder,
            "parquet": hub.read_parquet,
            "arrow": hub.read_arrow,
            "disk": hub.read_disk,
        }
        return readers[kind](path) if kind in readers else hub.read_hub(rest)
    installed = fashion_mnist.installed_folder()
    if name == "quickstart":
        arrays = read_quickstart()
    elif name == "fashion-mnist" and installed is not None:
        arrays = fashion_mnist.division(installed)
    else:
        sources = hub.read_hub(KNOWN[name].hub)
        return _fixed_division(sources) if name == "fashion-mnist" else sources
    train, val, test = (
        from_arrays(*arrays[part], f"{name}, split {part}") for part in ("train", "val", "test")
    )
    return Sources(fashion_mnist.LABELS, train, val, test)


def _fixed_division(sources: Sources) -> Sources:
    """The hub keeps Fashion-MNIST in the order of the original files, so the same division falls
    out.
    """
    held_out, rest = stratified_indices(
        sources.train.targets,
        min(fashion_mnist.VALIDATION_IMAGES, len(sources.train)),
        fashion_mnist.DIVISION_SEED,
    )
    return Sources(
        sources.labels, sources.train.part(rest), sources.train.part(held_out), sources.test
    )


def _plan(spec: str, sources: Sources, seed: int, validation: float) -> dict[str, Part]:
    train, val, test = sources.train, sources.val, sources.test
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
    return {"train": (train, rest), "val": plan["val"], "test": plan["test"]}


def _cut(
    spec: str, train: Pictures, rest: Indices, share: float, seed: int
) -> tuple[Part, Indices]:
    count = round(share * len(rest))
    if len(rest) and not 0 < count < len(rest):
        raise InputError(
            f"{spec}: {len(rest)} training images cannot give up {share:.0%} of themselves for a held-out split; add images"
        )
    taken, left = stratified_indices(train.targets[rest], count, seed)
    return (train, rest[taken]), rest[left]
