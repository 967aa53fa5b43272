"""Data sets available by name: their names on the hub, and the mean and std of their pixels."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

from ...core.errors import InputError
from . import fashion_mnist
from .preprocessing import Interpolation, Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATH_KINDS = ("imagefolder", "parquet", "arrow", "disk", "webdataset", "images")


@dataclass(frozen=True)
class NamedDataset:
    """A data set available by name.

    Attributes:
        hub: Its name on the hub.
        mean: The mean of the training images for each channel, in units of pixel / 255.
        std: The standard deviation, likewise.
    """

    hub: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


NAMED_DATASETS: dict[str, NamedDataset] = {
    "quickstart": NamedDataset("", (fashion_mnist.MEAN,), (fashion_mnist.STD,)),
    "fashion-mnist": NamedDataset(
        "zalando-datasets/fashion_mnist", (fashion_mnist.MEAN,), (fashion_mnist.STD,)
    ),
    "mnist": NamedDataset("ylecun/mnist", (0.1307,), (0.3081,)),
    "cifar10": NamedDataset("uoft-cs/cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": NamedDataset(
        "uoft-cs/cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "tiny-imagenet": NamedDataset("zh-plus/tiny-imagenet"),
    "imagenet-1k": NamedDataset("ILSVRC/imagenet-1k"),
}


def canonical_name(spec: str) -> str:
    """The canonical spelling of a name: `fashion_mnist` becomes `fashion-mnist`.

    Paths stay as they are; `owner/name` becomes `hub:owner/name`.

    Raises:
        InputError: The name is unknown; the message has the nearest known one.
    """
    kind, colon, rest = spec.partition(":")
    if colon:
        if kind not in (*PATH_KINDS, "hub"):
            kinds = ", ".join((*PATH_KINDS, "hub"))
            raise InputError(
                f"data set {spec!r}: {kind!r} is not a kind of source; choose one of {kinds}"
            )
        if not rest:
            raise InputError(f"data set {spec!r}: a path or name is missing after {kind}:")
        return spec
    if "/" in spec:
        return f"hub:{spec}"
    name = spec.lower().replace("_", "-")
    name = {
        "cifar-10": "cifar10",
        "cifar-100": "cifar100",
        "imagenet": "imagenet-1k",
        "tinyimagenet": "tiny-imagenet",
    }.get(name, name)
    if name in NAMED_DATASETS:
        return name
    near = difflib.get_close_matches(name, NAMED_DATASETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMED_DATASETS)}"
    raise InputError(
        f"data set {spec!r}: not known; {hint} A hub set is written owner/name, "
        "a local one imagefolder:PATH or parquet:PATH"
    )


def path_of(spec: str) -> Path | None:
    """The path in `imagefolder:PATH` and its like, with `~` expanded; None for other names."""
    kind, _, path = spec.partition(":")
    return Path(path).expanduser() if kind in PATH_KINDS and path else None


class DataConfig(Protocol):
    """What a model states about its images, in the terms of timm's data config."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, in units of pixel / 255."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation, likewise."""

    @property
    def interpolation(self) -> str:
        """Filter of resizing."""

    @property
    def crop_pct(self) -> float:
        """Share of the resized image that the crop keeps."""

    @property
    def crop_mode(self) -> str:
        """`center`, `squash` or `border`."""


def default_preprocessing(
    spec: str, image: tuple[int, int, int], stated: DataConfig | None = None
) -> Preprocessing:
    """Preprocessing to the input (C, H, W) of a model, with the mean and std of the data set.

    Args:
        spec: Name of the data set.
        image: (channels, height, width) of the model's input.
        stated: The data config of the model. A data set without a mean and std of its own, such as
            a folder of images, is prepared as it states, or as for ImageNet.
    """
    channels, height, width = image
    if channels not in (1, 3):
        raise InputError(f"the model reads {channels} channels; images have 1 or 3")
    name = canonical_name(spec)
    known = NAMED_DATASETS.get(name, NamedDataset(name))
    mean, std = known.mean, known.std
    if stated is not None and mean == IMAGENET_MEAN and len(stated.mean) == channels:
        return _stated(stated, image)
    if channels == 1 and len(mean) == 3:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if channels == 3 and len(mean) == 1:
        mean, std = mean * 3, std * 3
    return Preprocessing(
        channels=1 if channels == 1 else 3, height=height, width=width, mean=mean, std=std
    )


def _stated(config: DataConfig, image: tuple[int, int, int]) -> Preprocessing:
    """The preprocessing of a data config; a filter or a crop that is not known is the default."""
    channels, height, width = image
    known = get_args(Interpolation)
    return Preprocessing(
        channels=1 if channels == 1 else 3,
        height=height,
        width=width,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation if config.interpolation in known else "bicubic",
        resize="center-crop" if config.crop_mode == "center" else "squash",
        crop_ratio=config.crop_pct if config.crop_mode == "center" else 1.0,
    )
