"""The images of a saved model: those of its run, or those of the data set on the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..compress.data.preprocessing import Preprocessing
    from ..compress.network.architecture import DataSpec

CARD = "data.json"
SCHEMA = "vitrim.data/1"
BATCH = 32
# A bar appears after this many seconds.
PATIENCE_S = 2.0


@dataclass(frozen=True)
class ModelData:
    """A data set for a model.

    Attributes:
        name: Name of the data set.
        preprocessing: How its images become the model's inputs.
        division: `seed` and `validation` of its splits where a run fixed them, else empty.
    """

    name: str
    preprocessing: Preprocessing
    division: dict[str, Any]


def read_card(path: Path) -> dict[str, Any] | None:
    """Read data.json of the run that contains a model; None if the model is in no run.

    Raises:
        InputError: The file is damaged.
    """
    if not path.is_file():
        return None
    way_out = "run the recipe again with --resume"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {way_out}") from error
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a {SCHEMA} file; {way_out}")
    return card


def model_data(
    card: dict[str, Any] | None,
    requested: str | None,
    image: tuple[int, int, int],
    stated: DataSpec | None = None,
) -> ModelData | None:
    """The requested data set, else that of the run; None where there is neither.

    Args:
        card: `data.json` of the run that contains the model.
        requested: Name of the data set; None: that of the run.
        image: (channels, height, width) of the model's input.
        stated: The data config of the model, for data sets without a mean and std of their own.

    Raises:
        InputError: The data set does not exist, or the card is damaged.
    """
    from ..compress.data.loading import UNLABELED
    from ..compress.data.named_datasets import default_preprocessing
    from ..compress.data.preprocessing import Preprocessing

    name = requested or (card["name"] if card else None)
    if name is None:
        return None
    unlabeled = name.startswith(UNLABELED)
    if card is None or (requested not in (None, card["name"]) and not unlabeled):
        return ModelData(name, default_preprocessing(name, image, stated), {})
    try:
        preprocessing = Preprocessing.model_validate(card["preprocessing"])
    except (ValidationError, KeyError) as error:
        raise InputError(
            f"{CARD}: invalid preprocessing ({error}); run the recipe again with --resume"
        ) from error
    if unlabeled:
        # A folder has no mean and std of its own; the model expects those of its training.
        return ModelData(name, preprocessing, {})
    # The splits of the run, so that images that it held out stay held out.
    division: dict[str, Any] = {key: card[key] for key in ("seed", "validation") if key in card}
    return ModelData(name, preprocessing, division)


def calibration_images(
    data: ModelData, count: int, classes: int | None
) -> tuple[NDArray[np.float32], list[str] | None]:
    """Images for parity and calibration, and the labels of the model that they come with.

    Args:
        data: A data set, or `images:FOLDER`, which has no labels.
        count: Maximum number of validation images, with the class proportions of the split.
        classes: Number of outputs of the model; None if unknown, 0 for a model without classifier,
            whose outputs have no labels.

    Returns:
        float32 (count, channels, height, width), normalized, and one label per class or None.

    Raises:
        InputError: The data set has another number of classes; raised before an image is decoded.
    """
    from ..compress.data.loading import UNLABELED, labels_of, open_sample, open_unlabeled

    name, preprocessing = data.name, data.preprocessing
    if name.startswith(UNLABELED):
        return open_unlabeled(name, count, preprocessing=preprocessing).arrays()[0], None
    labels = labels_of(name)
    if classes and len(labels) != classes:
        raise InputError(
            f"{name} has {len(labels)} classes, but the model has {classes} outputs; name the data "
            f"set that it was trained on, or {UNLABELED}FOLDER, whose images need no labels"
        )
    split = open_sample(
        name,
        "val",
        count,
        preprocessing=preprocessing,
        classes=len(labels),
        quiet=False,
        **data.division,
    )
    return split.arrays()[0], None if classes == 0 else list(labels)


@dataclass
class SaliencyImages:
    """Batches of (images, class numbers) from a training split, opened at the first batch.

    Attributes:
        data: The data set.
        count: Maximum number of images, with the class proportions of the split.
        seed: Seed of the sample.
        classes: Number of outputs of the model.
        title: Title of the progress bar.
        note: Description of the images, empty until the first batch.
    """

    data: ModelData
    count: int
    seed: int
    classes: int
    title: str

    def __post_init__(self) -> None:
        self.note: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from ..compress.data.loading import open_sample
        from ..core.console import progress_bar

        split = open_sample(
            self.data.name,
            "train",
            self.count,
            preprocessing=self.data.preprocessing,
            classes=self.classes,
            draw_seed=self.seed,
            quiet=False,
            **self.data.division,
        )
        total = len(split)
        self.note = {
            "data": self.data.name,
            "split": "train",
            "images": str(total),
            "seed": str(self.seed),
        }
        started = time.perf_counter()
        with progress_bar(self.title, total) as advance:
            for start in range(0, total, BATCH):
                stop = min(total, start + BATCH)
                rows = slice(start, stop)
                yield split.floats(rows), split.batch(rows)[1]
                # The network has processed the batch by now.
                if time.perf_counter() - started > PATIENCE_S:
                    advance(stop)
