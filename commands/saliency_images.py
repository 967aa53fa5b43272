"""The images that a saliency looks at: drawn from a data set's training split, opened only when the
first batch is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from ..compress.data.loading import open_sample
from ..core.console import progress_bar
from .model_data import ModelData

BATCH = 32
PATIENCE_S = 2.0


class SaliencyImages:
    """Batches of (images, class numbers), with a bar on a terminal once it lasts; `note` says which
    images they were.

    count: at most so many, every class in its own share; classes: the outputs of the model. Errors:
    InputError as `open_sample`.
    """

    def __init__(self, data: ModelData, count: int, seed: int, classes: int, title: str) -> None:
        self._data, self._count, self._seed, self._classes, self._title = (
            data,
            count,
            seed,
            classes,
            title,
        )
        self.note: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self._data
        split = open_sample(
            data.name,
            "train",
            self._count,
            preprocessing=data.preprocessing,
            classes=self._classes,
            draw_seed=self._seed,
            quiet=False,
            **data.division,
        )
        self.note = {
            "data": data.name,
            "split": "train",
            "images": str(len(split)),
            "seed": str(self._seed),
        }
        started = time.perf_counter()
        with progress_bar(self._title, len(split)) as advance:
            for start in range(0, len(split), BATCH):
                stop = min(len(split), start + BATCH)
                part = slice(start, stop)
                yield split.floats(part), split.batch(part)[1]
                # Only now has the network seen them.
                if time.perf_counter() - started > PATIENCE_S:
                    advance(stop)
