"""Batches of one split, in an order that a resumed run, and any number of processes, repeats.

1. The order of an epoch follows from the seed and the number of the epoch. Where images can be
   indexed it is a permutation of all of them; for a stream see `streams`.
2. A step reads `batch_size` images over all ranks. Each rank gets its contiguous part, so that a
   step sees the same images whatever the number of ranks.
3. The random numbers of the transform of an image follow from the seed, the epoch and the image,
   so that they do not depend on the number of workers.
4. The position within an epoch is plain data: `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ...core.errors import InputError
from .decoding import Converted, LazyPixels, OnError
from .preprocessing import as_eight_bits
from .splits import Split
from .streams import Record, StreamPixels

# From a PIL image in grey or colour to uint8 (C, H, W); it draws from the global random generators.
ImageTransform = Callable[[Image.Image], NDArray[np.uint8]]
State = dict[str, Any]


class Item(NamedTuple):
    """One image of a batch.

    Attributes:
        number: Its number, from which its random numbers follow.
        record: The undecoded image of a stream; None where images can be indexed.
    """

    number: int
    record: Record | None = None


# The number of an epoch, and the images of one batch.
Planned = tuple[int, list[Item]]


class _Batch(NamedTuple):
    images: Tensor
    targets: Tensor
    skipped: tuple[str, ...]


class BatchLoader:
    """Reads the batches of a split, in worker processes where that pays.

    `for images, targets in loader.epoch(3): ...` yields uint8 images (B, C, H, W) and int64 targets
    (B,). Decoded splits without a transform are read in the calling process.

    Args:
        split: The images.
        batch_size: The number of images in a step, over all ranks.
        seed: For the order of the images and the transforms.
        workers: The number of worker processes; 0 reads in the calling process.
        transform: Applied to each image in place of the split's preprocessing, e.g.
            `Augmentation.image_transform`. It must be picklable.
        shuffle: Give each epoch an order of its own; False keeps that of the split.
        drop_last: Leave out the last step of an epoch if it has fewer images.
        rank: The number of this process, from 0.
        ranks: The number of processes that share the steps.
        on_error: "skip" replaces an unreadable image by another one of the batch, and counts it.
            None: as the data set was opened.
        pin_memory: Copy the batches to page-locked memory, for a GPU.

    Raises:
        InputError: There are fewer images in a step than ranks.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        transform: ImageTransform | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        ranks: int = 1,
        on_error: OnError | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < ranks or (drop_last and batch_size % ranks):
            raise InputError(
                f"{batch_size} images a step cannot be divided among {ranks} processes; choose a "
                "train.batch_size that is a multiple of their number"
            )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.rank, self.ranks = rank, ranks
        whole, rest = divmod(len(split), batch_size)
        #: The number of steps of an epoch.
        self.steps = whole if drop_last else whole + (rest > 0)
        #: Unreadable images that were replaced since the beginning of the epoch, on this rank.
        self.skipped = 0
        #: The error line of the first one of them.
        self.first_skipped: str | None = None
        self._plan = _Plan(split, batch_size, seed, self.steps, shuffle, rank, ranks)
        if on_error is None:
            on_error = "stop" if isinstance(split.pixels, np.ndarray) else split.pixels.on_error
        self._reader = _Reader(split, transform, seed, on_error)
        self._state: State = {"epoch": 0, "step": 0}
        self._loaded: State | None = None
        # Decoded pixels are only copied, which costs less than sending them between processes.
        self.workers = 0 if split.decoded and transform is None else workers
        self._loader: DataLoader[Any] | None = None
        if self.workers:
            self._loader = DataLoader(
                self._reader,
                sampler=self._plan,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_unchanged,
                persistent_workers=True,
                pin_memory=pin_memory,
                # By default each start of an epoch would draw from the generator of the training.
                generator=torch.Generator(),
            )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from the loaded position if there is one.

        Args:
            epoch: The number of the epoch, which determines the order.

        Yields:
            uint8 images (B, C, H, W) and int64 targets (B,) of this rank.

        Raises:
            InputError: An image cannot be decoded, a label is outside the classes, or a worker
                process ended.
        """
        loaded, self._loaded = self._loaded, None
        resumed = loaded if loaded is not None and loaded["epoch"] == epoch else None
        if resumed is None:
            self.skipped, self.first_skipped = 0, None
        start = 0 if resumed is None else int(resumed["step"])
        self._plan.begin(epoch, start, None if resumed is None else resumed.get("source"))
        self._set_state(epoch, start, self._plan.position)
        for step, batch in enumerate(self._batches(), start):
            self.skipped += len(batch.skipped)
            if batch.skipped and self.first_skipped is None:
                self.first_skipped = batch.skipped[0]
            self._set_state(epoch, step + 1, self._plan.positions.popleft())
            yield batch.images, batch.targets

    def state_dict(self) -> State:
        """The position after the last batch that `epoch` yielded, as plain data."""
        return {**self._state, "skipped": self.skipped, "data": self._identity()}

    def load_state_dict(self, state: State) -> None:
        """Continue at a position: `epoch(state["epoch"])` yields the batches after it.

        Raises:
            InputError: The data, the seed or the number of images in a step has changed since.
        """
        before, now = state["data"], self._identity()
        for key, value in now.items():
            if before.get(key) != value:
                what = {
                    "content": "the data changed (a file was added, removed or rewritten)",
                    "images": f"the data had {before.get(key)} images, now {value}",
                }.get(key, f"{key} was {before.get(key)}, now {value}")
                raise InputError(
                    f"resuming within epoch {state['epoch']}: {what}; restore what it was, or "
                    "start again without --resume"
                )
        self._loaded = self._state = {
            key: value for key, value in state.items() if key in ("epoch", "step", "source")
        }
        self.skipped = int(state["skipped"])

    def close(self) -> None:
        """End the worker processes; `epoch` starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if self._loader is not None and iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _set_state(self, epoch: int, step: int, source: Any) -> None:
        self._state = {"epoch": epoch, "step": step}
        if source is not None:
            self._state["source"] = source

    def _identity(self) -> State:
        return {
            "content": self.split.fingerprint,
            "images": len(self.split),
            "seed": self.seed,
            "batch_size": self.batch_size,
            **({"ranks": self.ranks} if isinstance(self.split.pixels, StreamPixels) else {}),
        }

    def _batches(self) -> Iterator[_Batch]:
        results = map(self._reader.__getitem__, self._plan)
        try:
            for result in results if self._loader is None else self._loader:
                if isinstance(result, str):
                    raise InputError(result)
                yield result
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0][:160]
            raise InputError(
                f"a process that reads images ended ({reason}); memory or /dev/shm may be "
                "exhausted: lower train.workers (0 reads in the training process)"
            ) from error


class _Plan(Sampler[Planned]):
    """The items of each batch of the present epoch; always used in the calling process."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        steps: int,
        shuffle: bool,
        rank: int,
        ranks: int,
    ) -> None:
        self.split, self.batch_size, self.seed, self.steps = split, batch_size, seed, steps
        self.shuffle, self.rank, self.ranks = shuffle, rank, ranks
        self.begin(0, 0, None)

    def begin(self, epoch: int, step: int, position: Any) -> None:
        self.epoch, self.first, self.position = epoch, step, position
        # The position in a stream after each batch that was planned and not yielded yet.
        self.positions: deque[Any] = deque()

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[Planned]:
        planned = self._of_stream if isinstance(self.split.pixels, StreamPixels) else self._indexed
        for items, position in planned():
            self.positions.append(position)
            yield self.epoch, items

    def _indexed(self) -> Iterator[tuple[list[Item], None]]:
        order: NDArray[np.int64] = np.arange(len(self.split), dtype=np.int64)
        if self.shuffle:
            generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
            order = generator.permutation(len(self.split))
        for step in range(self.first, self.steps):
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            part = np.array_split(whole, self.ranks)[self.rank]
            # Only the last step of an epoch can have fewer images than ranks.
            if len(part):
                yield [Item(int(index)) for index in part], None

    def _of_stream(self) -> Iterator[tuple[list[Item], Any]]:
        assert isinstance(self.split.pixels, StreamPixels)
        records = self.split.pixels.stream.records(
            self.seed, self.epoch, self.rank, self.ranks, self.position
        )
        for _ in range(self.first, self.steps):
            planned = list(islice(records, self.batch_size // self.ranks))
            items = [Item(number * self.ranks + self.rank, record) for number, record, _ in planned]
            yield items, planned[-1][2]


class _Reader(Dataset[Any]):
    """Reads the items of a batch, in a worker process or in the calling one.

    Errors of images are returned as text: torch would turn an exception of a worker into several
    lines.
    """

    def __init__(
        self, split: Split, transform: ImageTransform | None, seed: int, on_error: OnError
    ) -> None:
        self.split, self.transform, self.seed, self.on_error = split, transform, seed, on_error

    def __getitem__(self, planned: Planned) -> _Batch | str:
        epoch, items = planned
        indices = np.array([item.number for item in items], dtype=np.int64)
        if self.split.decoded and self.transform is None:
            return _Batch(*self.split.batch(indices), ())
        if self.transform is None or get_worker_info() is not None:
            return self._read(epoch, items)
        # The random numbers of the training itself do not depend on the transforms.
        with restored_generators():
            return self._read(epoch, items)

    def _read(self, epoch: int, items: Sequence[Item]) -> _Batch | str:
        images: list[NDArray[np.uint8]] = []
        targets: list[int] = []
        failures: list[str] = []
        for item in items:
            try:
                images.append(self._image(epoch, item))
                targets.append(self._target(item))
            except InputError as error:
                failures.append(str(error))
                if self.on_error == "stop":
                    return failures[0]
        if not images:
            return f"{failures[0]}; no image of this batch can be read"
        # Other images of the batch take the place of unreadable ones.
        places = np.arange(len(items)) % len(images)
        return _Batch(
            torch.from_numpy(np.stack([images[place] for place in places])),
            torch.tensor([targets[place] for place in places], dtype=torch.int64),
            tuple(failures),
        )

    def _image(self, epoch: int, item: Item) -> NDArray[np.uint8]:
        if self.transform is not None:
            words = np.random.SeedSequence([self.seed, epoch, item.number]).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            torch.default_generator.manual_seed(int(words[2]))
            return self.transform(self._source(item, self._eight_bits))
        return self._source(item, self.split.preprocessing.pixels)

    def _source(self, item: Item, convert: Callable[[Any], Converted]) -> Converted:
        """The converted image; only errors of its file count as those of an unreadable image."""
        pixels = self.split.pixels
        if item.record is not None:
            return item.record.read(convert)
        row = item.number if self.split.rows is None else int(self.split.rows[item.number])
        if isinstance(pixels, LazyPixels):
            return pixels.images.read(row, convert)
        return convert(np.asarray(pixels[row : row + 1])[0].transpose(1, 2, 0))

    def _eight_bits(self, source: Any) -> Image.Image:
        return as_eight_bits(source, "L" if self.split.preprocessing.channels == 1 else "RGB")

    def _target(self, item: Item) -> int:
        if item.record is not None:
            return int(item.record.target)
        return int(self.split.targets[item.number])


@contextlib.contextmanager
def restored_generators() -> Iterator[None]:
    """Restore the global random generators of Python, numpy and torch (on the CPU) afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _unchanged(batch: Any) -> Any:
    return batch
