"""How good a network's answers and features are on labelled images: top-1, neighbours, probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compress.data.loading import UNLABELED, labels_of, open_sample
from ..compress.data.preprocessing import Preprocessing
from ..compress.data.splits import Split
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.probe import probe
from ..compress.train.evaluate import predict
from ..core.console import progress_bar


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images that no cut is fitted to.

    Attributes:
        train: Images whose labels the neighbours and the linear probe use.
        val: Images that are classified.
        fits_head: Whether the classes are those of the model's classifier.
    """

    train: Split
    val: Split
    fits_head: bool


@dataclass(frozen=True)
class Quality:
    """Shares of the validation images that are classified correctly.

    Attributes:
        images: Their number.
        knn: By the nearest neighbours of the features.
        linear: By a linear probe of the features.
        top1: By the network's own classifier; None without one of these classes.
        agreement: Share of the images with the class of the dense network; None without a head.
    """

    images: int
    knn: float
    linear: float
    top1: float | None = None
    agreement: float | None = None


def open_labelled(
    name: str,
    count: int,
    *,
    preprocessing: Preprocessing,
    head_classes: int | None,
    division: dict[str, Any],
    seed: int,
) -> LabelledImages | None:
    """Open labelled images for `measure_quality`.

    Args:
        name: The data set.
        count: Largest number of training and of validation images; 0 for none.
        preprocessing: From an image to the input of the model.
        head_classes: Classes of the model's classifier; None without one.
        division: `seed` and `validation` of the splits, where a run fixed them.
        seed: Seed of the sample.

    Returns:
        The images; None for `images:FOLDER`, which has no labels, and for a count of 0.

    Raises:
        InputError: The data set cannot be read.
    """
    if name.startswith(UNLABELED) or not count:
        return None
    classes = len(labels_of(name))
    train, val = (
        open_sample(
            name,
            part,
            count,
            preprocessing=preprocessing,
            classes=classes,
            draw_seed=seed,
            quiet=False,
            **division,
        )
        for part in ("train", "val")
    )
    return LabelledImages(train, val, classes == head_classes)


def predicted_classes(model: CompactModel, images: LabelledImages) -> Tensor:
    """The class of each validation image by a network's own classifier, (images,)."""
    return predict(model, images.val).argmax(dim=1)


def measure_quality(
    model: CompactModel,
    images: LabelledImages,
    *,
    title: str,
    dense_classes: Tensor | None = None,
    quiet: bool = False,
) -> Quality:
    """Classify the validation images in three ways, and compare with the dense network.

    Args:
        model: The network.
        images: The images and their labels.
        title: Title of the progress bar.
        dense_classes: The classes that it should agree with: `predicted_classes` of the dense
            network (default: its own).
        quiet: Show no progress bar.

    Returns:
        The accuracies.
    """
    total = len(images.train) + len(images.val)
    with progress_bar(title, total, quiet=quiet) as advance:
        found = probe(model, images.train, images.val, progress=advance)
    if model.architecture.head is None:
        return Quality(found.test_images, found.knn, found.linear)
    classes = predicted_classes(model, images)
    wanted = classes if dense_classes is None else dense_classes
    right = torch.from_numpy(images.val.targets) == classes
    return Quality(
        images=found.test_images,
        knn=found.knn,
        linear=found.linear,
        top1=float(right.float().mean()) if images.fits_head else None,
        agreement=float((wanted == classes).float().mean()),
    )
