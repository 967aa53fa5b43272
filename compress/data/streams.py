"""Images that can only be read in the order in which shards hold them.

An epoch reads the shards in an order that follows from the seed and the epoch, several at a time.
The images pass through blocks of `BLOCK` undecoded images, each permuted. A position is the start
of the present block (rows of the open shards) and the number of images taken from it, so that a
resumed run reads at most one block again, and yields the same images in the same order.

The first rows of each shard can be held out, for a validation split that shares no image with the
training split.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from PIL import Image

from ...core.errors import InputError
from .decoding import DECODING_ERRORS, Converted, OnError, unreadable

# Undecoded images in memory at a time, about 0.5 GB of ImageNet's.
BLOCK = 4096
# Shards that are read in turn, so that shards of few classes are mixed.
OPEN_SHARDS = 8
Position = dict[str, Any]


class Record(NamedTuple):
    """One undecoded image of a stream.

    Attributes:
        data: The content of the image file; None where the row has no image.
        target: Its class number.
        where: Names the image in error messages.
    """

    data: bytes | None
    target: int
    where: str

    def read(self, convert: Callable[[Any], Converted]) -> Converted:
        """Decode the image and convert it.

        Args:
            convert: Applied to the PIL image.

        Returns:
            What `convert` returns.

        Raises:
            InputError: The image cannot be decoded; the message names it.
        """
        try:
            if self.data is None:
                raise ValueError("no image in this row")
            return convert(open_bytes(self.data))
        except DECODING_ERRORS as error:
            raise unreadable(self.where, error) from error


def open_bytes(data: bytes) -> Image.Image:
    """Decode the content of an image file; Pillow raises `DECODING_ERRORS`."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


class Shard(Protocol):
    """A file, or a part of a data set, that is read from its beginning to its end."""

    @property
    def name(self) -> str:
        """The shard in error messages."""

    def records(self, start: int) -> Iterator[Record]:
        """The images from row `start` on."""


@dataclass(frozen=True)
class Stream:
    """The images of one split, in shards.

    Attributes:
        shards: The shards, each read by one rank.
        images: The number of images, without those held out.
        classes: The number of classes.
        held_out: How many rows at the beginning of each shard belong to another split.
        fingerprint: Changes with the shards.
    """

    shards: tuple[Shard, ...]
    images: int
    classes: int
    held_out: int = 0
    fingerprint: str = ""

    def records(
        self, seed: int, epoch: int, rank: int, ranks: int, position: Position | None
    ) -> Iterator[tuple[int, Record, Position]]:
        """Yield the images of a rank; without an end, since ranks may have unequal shards.

        Args:
            seed: For the order.
            epoch: The number of the epoch.
            rank: The number of the process.
            ranks: The number of processes; each reads every `ranks`-th shard.
            position: Start after the image that was yielded with this position.

        Yields:
            A number that no other image of this rank has in this epoch, the image, and the
            position after it.

        Raises:
            InputError: There are fewer shards than ranks, the shards have no images, or a label
                is outside the classes.
        """
        if len(self.shards) < ranks:
            raise InputError(
                f"{self.shards[0].name}: {len(self.shards)} shards cannot be divided among {ranks} "
                "processes; write at least as many shards, or leave data.streaming out"
            )
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(self.shards))
        mine = [self.shards[number] for number in order[rank::ranks]]
        start = position or {"block": 0, "taken": 0, "next": 0, "open": []}
        taken, block = int(start["taken"]), int(start["block"])
        shards = _OpenShards(mine, self.held_out, int(start["next"]), start["open"])
        rows, fruitful = iter(shards), False
        while True:
            begin: Position = {"block": block, "next": shards.next, "open": shards.state()}
            records = list(islice(rows, BLOCK))
            if not records:
                if not fruitful:
                    raise InputError(f"{mine[0].name}: it holds no images; give it images")
                shards = _OpenShards(mine, self.held_out, 0, [])
                rows, fruitful = iter(shards), False
                continue
            fruitful = True
            generator = np.random.Generator(np.random.PCG64([seed, epoch, rank, block]))
            for place, index in enumerate(generator.permutation(len(records))[taken:], taken):
                self._require_class(records[index])
                yield block * BLOCK + place, records[index], {**begin, "taken": place + 1}
            taken, block = 0, block + 1

    def first(self, count: int) -> Iterator[Record]:
        """The first images, in the order of the shards."""
        rows = (record for shard in self.shards for record in shard.records(self.held_out))
        for record in islice(rows, count):
            self._require_class(record)
            yield record

    def _require_class(self, record: Record) -> None:
        if not 0 <= record.target < self.classes:
            raise InputError(
                f"{record.where}: label {record.target} is outside 0..{self.classes - 1}; every "
                f"image needs one of the {self.classes} classes"
            )


class _OpenShards:
    """Reads rows of several shards in turn, until all shards are read."""

    def __init__(
        self, shards: list[Shard], held_out: int, following: int, opened: list[list[int]]
    ) -> None:
        self.shards, self.held_out, self.next = shards, held_out, following
        # The number of each open shard, its next row, and its iterator.
        self.open = deque((number, row, shards[number].records(row)) for number, row in opened)

    def state(self) -> list[list[int]]:
        """What the argument `opened` needs to continue here."""
        return [[number, row] for number, row, _ in self.open]

    def __iter__(self) -> Iterator[Record]:
        while True:
            while self.next < len(self.shards) and len(self.open) < OPEN_SHARDS:
                records = self.shards[self.next].records(self.held_out)
                self.open.append((self.next, self.held_out, records))
                self.next += 1
            if not self.open:
                return
            number, row, records = self.open.popleft()
            record = next(records, None)
            if record is not None:
                self.open.append((number, row + 1, records))
                yield record


class StreamPixels:
    """Stands in for the pixels of a split whose images cannot be indexed.

    Args:
        stream: The images.
        on_error: What happens at an image that cannot be decoded.
    """

    def __init__(self, stream: Stream, on_error: OnError = "stop") -> None:
        self.stream, self.on_error = stream, on_error
        # As of `LazyPixels`; images of a stream are not numbered.
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return self.stream.images

    def __getitem__(self, indices: object) -> NoReturn:
        raise InputError(
            "single images of a stream cannot be read, and this step needs some; leave "
            "data.streaming out"
        )
