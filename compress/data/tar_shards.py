"""WebDataset tars on this machine: an index of their images, so that they can be read in any order.

The members of a sample have the same name up to the first dot: `000123.jpg` and `000123.cls`, which
holds the class number as text, or `000123.json` with a key `label`. Tars are not unpacked.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.console import progress_bar
from ...core.errors import InputError
from .decoding import RawDataset, RawSplit
from .hf_datasets import LABEL_COLUMNS, files_by_split
from .sealed_index import index_path, read_index, seal_of, write_index
from .streams import Record, open_bytes

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class TarImages:
    """The images of some tars.

    Attributes:
        tars: The paths of the tars.
        numbers: int32 (N,), the tar of each image.
        starts: int64 (N,), where the image begins in its tar, in bytes.
        sizes: int64 (N,), its length in bytes.
        labels: int64 (N,), as written in the tars.
    """

    tars: tuple[str, ...]
    numbers: NDArray[np.int32]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        """The tar and the byte of an image, for messages."""
        return f"{self.tars[int(self.numbers[index])]}, image at byte {int(self.starts[index])}"

    def fingerprint(self) -> str:
        """Changes with the names, the sizes and the times of the last change of the tars."""
        seals = [(os.path.basename(tar), seal_of(tar)) for tar in self.tars]
        return sha256(repr(seals).encode()).hexdigest()

    def targets(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """The position of each label in `values`, the sorted labels of the training split.

        Raises:
            InputError: A label is not among them.
        """
        known = np.isin(self.labels, values)
        if not known.all():
            row = int(known.argmin())
            raise InputError(
                f"{self.where(row)}: label {int(self.labels[row])} does not occur in the training "
                "split; correct it, or add such images to train"
            )
        return np.searchsorted(values, self.labels).astype(np.int64)

    def read(self, index: int) -> bytes:
        """The content of an image file."""
        with Path(self.tars[int(self.numbers[index])]).open("rb") as tar:
            tar.seek(int(self.starts[index]))
            return tar.read(int(self.sizes[index]))

    def open(self, index: int) -> Image.Image:
        """Decode an image."""
        return open_bytes(self.read(index))


def read_tars(path: Path, *, quiet: bool = True) -> RawDataset:
    """Index a tar, or a folder of tars (or folders) named train*, validation*, test*.

    Args:
        path: The tar or the folder.
        quiet: Show no progress bar.

    Raises:
        InputError: A tar is missing, ends early or is compressed, or an image has no label.
    """
    parts = {part: list_tars(files, quiet) for part, files in files_by_split(path, "tar").items()}
    values = np.unique(parts["train"].labels)
    splits = {
        part: RawSplit(images.targets(values), images.open, images.where, images.fingerprint())
        for part, images in parts.items()
    }
    labels = tuple(map(str, values.tolist()))
    return RawDataset(labels, splits["train"], splits.get("val"), splits.get("test"))


def list_tars(files: list[str], quiet: bool) -> TarImages:
    """Index some tars; the index is kept in the cache folder while they do not change.

    Raises:
        InputError: As for `read_tars`.
    """
    path = index_path("tars", map(Path, files))
    found = read_index(path)
    if found is None or not {"numbers", "starts", "sizes", "labels"} <= set(found):
        seals = {os.path.abspath(file): seal_of(file) for file in files}
        started, rows = time.perf_counter(), array("q")
        with progress_bar("listing tars", len(files), quiet=quiet) as advance:
            for number, file in enumerate(files):
                for row in _images_of(file):
                    rows.extend((number, *row))
                if time.perf_counter() - started > 2.0:
                    advance(number + 1)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        names = ("numbers", "starts", "sizes", "labels")
        found = {name: np.ascontiguousarray(table[:, at]) for at, name in enumerate(names)}
        found["numbers"] = found["numbers"].astype(np.int32)
        write_index(path, seals, found)
    return TarImages(tuple(files), **found)


@dataclass(frozen=True)
class TarShard:
    """One tar, as a shard of a stream."""

    images: TarImages
    targets: NDArray[np.int64]
    first: int
    last: int

    @property
    def name(self) -> str:
        """The path of the tar."""
        return self.images.tars[int(self.images.numbers[self.first])]

    def records(self, start: int) -> Iterator[Record]:
        """The images from row `start` on."""
        for row in range(self.first + start, self.last):
            record = self.images.read(row)
            yield Record(record, int(self.targets[row]), self.images.where(row))


def shards_of(images: TarImages, targets: NDArray[np.int64]) -> tuple[TarShard, ...]:
    """One shard for each tar that has images."""
    edges = np.searchsorted(images.numbers, np.arange(len(images.tars) + 1))
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return tuple(TarShard(images, targets, first, last) for first, last in pairs if first < last)


def _images_of(file: str) -> Iterator[tuple[int, int, int]]:
    """Start, size and label of each image of a tar."""
    try:
        with tarfile.open(file, "r:") as tar:
            key: tuple[str, str] = ("", "")
            image, label = None, None
            for member in tar:
                if not member.isreg():
                    continue
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                if (folder, stem) != key:
                    yield from _sample(file, key, image, label)
                    key, image, label = (folder, stem), None, None
                ending = f".{ending.lower()}"
                if ending.endswith(_IMAGES):
                    image = (member.offset_data, member.size)
                elif ending.endswith((".cls", ".json")):
                    found = _label(tar.extractfile(member), ending, file, member.name)
                    label = label if found is None else found
            # First, since a sample may lack its label for that reason.
            _require_end(file, tar.offset)
            yield from _sample(file, key, image, label)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        if "unexpected end of data" in str(error):
            raise _ends_early(file) from error
        raise InputError(
            f"{file}: not a readable tar ({error}); write it again, uncompressed"
        ) from error


def _require_end(file: str, end: int) -> None:
    """Validate that a block of zeros follows the last member, as at the end of every tar.

    `tarfile` itself stops without an error at a damaged header.
    """
    with Path(file).open("rb") as tar:
        tar.seek(end)
        block = tar.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _ends_early(file)
    if block.strip(b"\0"):
        raise InputError(f"{file}: the tar is damaged at byte {end}; fetch or write it again")


def _ends_early(file: str) -> InputError:
    size = os.path.getsize(file)
    return InputError(f"{file}: the tar ends early, at byte {size}; fetch or write it again")


def _sample(
    file: str, key: tuple[str, str], image: tuple[int, int] | None, label: int | None
) -> Iterator[tuple[int, int, int]]:
    if image is None:
        return
    if label is None:
        raise InputError(
            f"{file}: sample {os.path.join(*key)} has no label; add a member of that name "
            "ending in .cls with the class number"
        )
    yield (*image, label)


def _label(member: Any, ending: str, file: str, name: str) -> int | None:
    """The class number in a member; None for a .json without one."""
    text = member.read().decode("utf-8", "replace").strip()
    value: Any = text
    if ending.endswith(".json"):
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            content = None
        keys = ("cls", *LABEL_COLUMNS)
        if not isinstance(content, dict) or not any(key in content for key in keys):
            return None
        value = next(content[key] for key in keys if key in content)
    try:
        return int(value)
    except (ValueError, TypeError):
        raise InputError(
            f"{file}: {name} holds {str(value)[:40]!r}; a label is a class number, e.g. 7"
        ) from None
