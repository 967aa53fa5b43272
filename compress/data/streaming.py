"""Data sets that are read while a model trains, without a copy of the training images.

The sources are the hub, local parquet files (both through `datasets`) and local WebDataset tars.
The validation and test images are copied once to the cache folder, since they are read in every
epoch. Splits that do not exist are the first rows of every training shard, so that shards sorted by
class give some of each; those rows are not trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InputError
from .decoding import RawSplit
from .hf_datasets import (
    NOT_ON_HUB,
    files_by_split,
    image_column,
    label_column,
    reading_errors,
)
from .packed_images import packed
from .sealed_index import seal_of
from .splits import SPLIT_NAMES
from .streams import Record, Shard, Stream
from .tar_shards import list_tars, shards_of

TEST_SHARE = 0.2


@dataclass(frozen=True)
class StreamedDataset:
    """An opened stream, and the splits that were copied from it."""

    labels: tuple[str, ...]
    train: Stream
    val: RawSplit
    test: RawSplit


@dataclass(frozen=True)
class _Part:
    """The shards of an official split; `images` is None where the number is not known."""

    shards: tuple[Shard, ...]
    images: int | None


@dataclass(frozen=True)
class _Source:
    parts: Mapping[str, _Part]
    labels: tuple[str, ...] | None
    fingerprint: str


@dataclass(frozen=True)
class DatasetShard:
    """A part of a data set of `datasets`.

    Attributes:
        rows: An `IterableDataset` with undecoded images.
        name: The part in messages.
        image: The column of images.
        label: The column of labels.
    """

    rows: Any
    name: str
    image: str
    label: str

    def records(self, start: int) -> Iterator[Record]:
        """The images from row `start` on.

        Raises:
            InputError: A row cannot be read, or its label is not a class number.
        """
        with reading_errors(self.name, "the stream cannot be read; check the network and resume"):
            for row, cells in enumerate(self.rows.skip(start), start):
                where = f"{self.name}, row {row}"
                yield Record(_content(cells[self.image]), _class(cells[self.label], where), where)


def open_stream(name: str, *, validation: float, limit: int | None, quiet: bool) -> StreamedDataset:
    """Open a data set as a stream.

    Args:
        name: `hub:NAME`, `parquet:PATH` or `webdataset:PATH`.
        validation: The share of train that is held out if there is no official validation split.
        limit: The number of images of an epoch; needed where the source does not state its own.
        quiet: Show no progress bar.

    Returns:
        The stream and the copied splits.

    Raises:
        InputError: The source cannot be read or streamed, has no training split, or the number of
            its images is unknown.
    """
    kind, _, rest = name.partition(":")
    if kind == "webdataset":
        source = _tars(Path(rest).expanduser(), quiet)
    elif kind in ("hub", "parquet"):
        source = _of_datasets(rest, kind)
    else:
        raise InputError(
            f"data.streaming: {name} is read in place already, image by image; leave streaming out "
            "(it is for hub names, parquet: and webdataset:)"
        )
    parts = {part: _labelled(found) for part, found in source.parts.items()}
    train, val, test = (parts.get(part) for part in ("train", "val", "test"))
    if train is None:
        raise InputError(f"{name}: it has no train split with labels; streaming needs one")
    if test is None:
        val, test = None, val
    images = train.images if train.images is not None else limit
    if images is None:
        raise InputError(
            f"{name}: the number of its training images is not stated; set data.limit to the "
            "number that one epoch reads"
        )
    copies = _Copies(name, source.fingerprint, train, images, quiet)
    tested = copies.held_out("test", TEST_SHARE) if test is None else copies.whole("test", test)
    checked = copies.held_out("val", validation) if val is None else copies.whole("val", val)
    left = min(images - copies.images, images if limit is None else limit)
    if left < 1:
        raise InputError(
            f"{name}: {images} training images are too few to hold some out of each of "
            f"{len(train.shards)} shards; add images, or leave data.streaming out"
        )
    labels = source.labels
    if labels is None:
        highest = max(int(copy.targets.max(initial=0)) for copy in (checked, tested))
        labels = tuple(map(str, range(highest + 1)))
    stream = Stream(train.shards, left, len(labels), copies.rows, source.fingerprint)
    return StreamedDataset(labels, stream, checked, tested)


class _Copies:
    """Copies splits of a stream to the cache folder."""

    def __init__(self, name: str, fingerprint: str, train: _Part, images: int, quiet: bool) -> None:
        self.name, self.fingerprint, self.train, self.quiet = name, fingerprint, train, quiet
        self.expected = images
        # The rows of each training shard, and the images in all of them, that are held out.
        self.rows, self.images = 0, 0

    def whole(self, part: str, source: _Part) -> RawSplit:
        """An official split."""
        records = itertools.chain.from_iterable(shard.records(0) for shard in source.shards)
        return self._copy(part, records, source.images or 0)

    def held_out(self, part: str, share: float) -> RawSplit:
        """The next rows of each training shard, about `share` of all training images."""
        shards = self.train.shards
        count = max(1, round(share * self.expected / len(shards)))
        first, self.rows = self.rows, self.rows + count
        rows = (itertools.islice(shard.records(first), count) for shard in shards)
        key = f"{part} rows {first} to {self.rows}"
        copy = self._copy(key, itertools.chain.from_iterable(rows), count * len(shards))
        self.images += len(copy)
        return copy

    def _copy(self, part: str, records: Iterable[Record], count: int) -> RawSplit:
        key, title = f"{self.name} {self.fingerprint} {part}", f"copying {part.split()[0]} images"
        return packed(records, key, count, title=title, quiet=self.quiet)


def _labelled(part: _Part) -> _Part | None:
    """The split, or None if its first image has no label, as in ImageNet's test split."""
    first = next(itertools.chain.from_iterable(shard.records(0) for shard in part.shards), None)
    return None if first is not None and first.target < 0 else part


def _tars(path: Path, quiet: bool) -> _Source:
    parts, stamp = {}, hashlib.sha256()
    listed = {part: list_tars(files, quiet) for part, files in files_by_split(path, "tar").items()}
    values = np.unique(listed["train"].labels)
    for part, images in listed.items():
        stamp.update(images.fingerprint().encode())
        parts[part] = _Part(shards_of(images, images.targets(values)), len(images))
    return _Source(parts, tuple(map(str, values.tolist())), stamp.hexdigest())


def _of_datasets(name: str, kind: str) -> _Source:
    """A data set of the hub, or local parquet files."""
    import datasets

    path = Path(name).expanduser()
    files = files_by_split(path, "parquet") if kind == "parquet" else None
    problem = NOT_ON_HUB if files is None else "not readable as parquet"
    with reading_errors(name, problem):
        if files is None:
            builder = datasets.load_dataset_builder(name)
            stated = builder.info.splits or {}
            counts = {split: info.num_examples for split, info in stated.items()}
            version: object = builder.hash, str(builder.config.data_files)
        else:
            builder = datasets.load_dataset_builder("parquet", data_files=files)
            counts = {split: sum(map(_rows_in, part)) for split, part in files.items()}
            names = [file for part in files.values() for file in part]
            version = [(Path(file).name, seal_of(file)) for file in names]
        splits = builder.as_streaming_dataset()
        parts, labels = _parts(splits, counts, name)
    return _Source(parts, labels, hashlib.sha256(repr(version).encode()).hexdigest())


def _parts(
    splits: Mapping[str, Any], counts: Mapping[str, int | None], name: str
) -> tuple[dict[str, _Part], tuple[str, ...] | None]:
    import datasets

    parts: dict[str, _Part] = {}
    labels: tuple[str, ...] | None = None
    named = {split.lower(): split for split in splits}
    for part, names in SPLIT_NAMES.items():
        split = next((named[each] for each in names if each in named), None)
        if split is None:
            continue
        rows = splits[split]
        if rows.features is None:
            rows = rows._resolve_features()
        image, label = image_column(rows.features, name), label_column(rows.features, name)
        if part == "train":
            labels = tuple(getattr(rows.features[label], "names", None) or ()) or None
        undecoded = rows.select_columns([image, label]).cast_column(
            image, datasets.Image(decode=False)
        )
        count = rows.num_shards
        shards = tuple(
            DatasetShard(
                undecoded.shard(num_shards=count, index=number),
                f"{name}, split {split}, shard {number}",
                image,
                label,
            )
            for number in range(count)
        )
        parts[part] = _Part(shards, counts.get(split))
    return parts, labels


def _rows_in(file: str) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(file).num_rows)


def _content(cell: Any) -> bytes | None:
    """The bytes of an image cell; None where there are none."""
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, Mapping) or (cell.get("bytes") is None and not cell.get("path")):
        return None
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    path = Path(cell["path"])
    return path.read_bytes() if path.is_file() else None


def _class(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: its label is {str(value)[:40]!r}; a stream needs class numbers, so leave "
            "data.streaming out or number the classes"
        ) from None
