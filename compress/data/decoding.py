"""Undecoded images of any source, and their decoding to the input size of a model."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.console import progress_bar
from ...core.errors import InputError
from ...core.staging import staged_file
from ...core.storage import disk_errors, replace_file
from .preprocessing import Preprocessing

# Above this, decoded images are kept in a memory-mapped file, which a second run finds again.
MEMORY_LIMIT_BYTES = 256 * 2**20
# What happens at an image that cannot be decoded.
OnError = Literal["stop", "skip"]
Converted = TypeVar("Converted")
_CHUNK = 256
# What Pillow raises for damaged images.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class RawSplit:
    """The undecoded images of one split.

    Attributes:
        targets: (N,), their class numbers.
        open: `open(i)` returns image i as a PIL image or uint8 array. Worker processes receive a
            pickled copy of it.
        where: `where(i)` names image i in error messages; picklable too.
        fingerprint: Changes with the content, for the cache of decoded images.
    """

    targets: NDArray[np.int64]
    open: Callable[[int], Any]
    where: Callable[[int], str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: NDArray[np.int64]) -> RawSplit:
        """The images at `indices`, in that order."""
        stamp = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        chosen = _Chosen(self.open, self.where, indices)
        return RawSplit(self.targets[indices], chosen.open, chosen.where, stamp)

    def read(self, index: int, convert: Callable[[Any], Converted]) -> Converted:
        """Open an image and convert it.

        Args:
            index: The number of the image.
            convert: Applied to what `open` returns; it decodes the rest of the image.

        Returns:
            What `convert` returns.

        Raises:
            InputError: The image cannot be decoded; the message names it.
        """
        try:
            return convert(self.open(index))
        except DECODING_ERRORS as error:
            raise unreadable(self.where(index), error) from error


@dataclass(frozen=True)
class _Chosen:
    """Some images of a split; a class, since closures cannot be pickled."""

    opener: Callable[[int], Any]
    namer: Callable[[int], str]
    indices: NDArray[np.int64]

    def open(self, index: int) -> Any:
        return self.opener(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.namer(int(self.indices[index]))


@dataclass(frozen=True)
class RawDataset:
    """An undecoded data set: its class names, and its official splits that have labels."""

    labels: tuple[str, ...]
    train: RawSplit
    val: RawSplit | None = None
    test: RawSplit | None = None


class LazyPixels:
    """Images that are decoded when they are indexed, in place of an array (N, C, H, W).

    Args:
        images: The undecoded images.
        preprocessing: The input size, and how images are resized; mean and std are not applied.
        on_error: "skip" returns a black image for one that cannot be decoded.

    Attributes:
        unreadable: The numbers of the images that could not be decoded so far.
    """

    def __init__(
        self, images: RawSplit, preprocessing: Preprocessing, on_error: OnError = "stop"
    ) -> None:
        self.images, self.preprocessing, self.on_error = images, preprocessing, on_error
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        """The images at `indices`, uint8 (B, C, H, W).

        Raises:
            InputError: An image cannot be decoded, and `on_error` is "stop".
        """
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)), dtype=np.int64)
        if not len(indices):
            return np.zeros((0, *self.preprocessing.image), dtype=np.uint8)
        with ThreadPoolExecutor(max_workers=min(len(indices), os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._read, map(int, indices))))

    def _read(self, index: int) -> NDArray[np.uint8]:
        unreadable_rows = self.unreadable if self.on_error == "skip" else None
        return _pixels(self.images, self.preprocessing, index, unreadable_rows)


def _pixels(
    images: RawSplit, preprocessing: Preprocessing, index: int, unreadable_rows: set[int] | None
) -> NDArray[np.uint8]:
    """Decode one image; `unreadable_rows` receives one that cannot be decoded, which is black."""
    try:
        return images.read(index, preprocessing.pixels)
    except InputError:
        if unreadable_rows is None:
            raise
        unreadable_rows.add(index)
        return np.zeros(preprocessing.image, dtype=np.uint8)


def unreadable(where: str, error: BaseException) -> InputError:
    """The error of an image that cannot be decoded; `where` names the image."""
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return InputError(
        f"{where}: not a readable image ({reason}); repair or remove it, or skip such images with "
        'data.on_error = "skip"'
    )


def cache_folder() -> Path:
    """The default folder for decoded images, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrim"


def decode(
    images: RawSplit,
    preprocessing: Preprocessing,
    *,
    title: str,
    cache: Path | None = None,
    quiet: bool = True,
    unreadable_rows: list[int] | None = None,
) -> NDArray[np.uint8]:
    """Decode all images of a split at the input size of a model.

    Args:
        images: The undecoded images.
        preprocessing: The input size, and how images are resized; mean and std are not applied.
        title: The text of the progress bar.
        cache: The folder for a memory-mapped result. By default results up to 256 MB are kept in
            memory, larger ones in `cache_folder()`.
        quiet: Show no progress bar.
        unreadable_rows: Receives the numbers of images that cannot be decoded, which are black in
            the result. None: such an image is an error.

    Returns:
        uint8 (N, C, H, W).

    Raises:
        InputError: An image cannot be decoded, and the message names it; or the disk is full.
    """
    shape = (len(images), *preprocessing.image)
    found: set[int] | None = None if unreadable_rows is None else set()
    if cache is None and int(np.prod(shape, dtype=np.int64)) <= MEMORY_LIMIT_BYTES:
        whole = np.empty(shape, dtype=np.uint8)
        for start, rows in _decoded(images, preprocessing, title, quiet, found):
            whole[start : start + len(rows)] = rows
    else:
        path = (cache or cache_folder()) / f"{_key(images, preprocessing)}.npy"
        marks = path.with_suffix(".unreadable.json")
        if not _is_complete(path, shape) or (marks.exists() and unreadable_rows is None):
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, shape, _decoded(images, preprocessing, title, quiet, found), found)
        elif marks.exists():
            found = set(json.loads(marks.read_text(encoding="utf-8")))
        whole = np.load(path, mmap_mode="r")
    if unreadable_rows is not None:
        unreadable_rows += sorted(found or ())
    return whole


def _decoded(
    images: RawSplit,
    preprocessing: Preprocessing,
    title: str,
    quiet: bool,
    unreadable_rows: set[int] | None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    def one(index: int) -> NDArray[np.uint8]:
        return _pixels(images, preprocessing, index, unreadable_rows)

    started = time.perf_counter()
    # Pillow releases the interpreter lock while it decodes and resizes.
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
        progress_bar(title, len(images), quiet=quiet) as advance,
    ):
        for start in range(0, len(images), _CHUNK):
            indices = range(start, min(len(images), start + _CHUNK))
            yield start, np.stack(list(pool.map(one, indices)))
            if time.perf_counter() - started > 2.0:
                advance(indices.stop)


def _write(
    path: Path,
    shape: tuple[int, ...],
    chunks: Iterator[tuple[int, NDArray[np.uint8]]],
    unreadable_rows: set[int] | None,
) -> None:
    with staged_file(path.resolve()) as descriptor:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            write_pixels(stream, shape, (rows for _, rows in chunks))
        marks = path.with_suffix(".unreadable.json")
        if unreadable_rows:
            # First, so that no complete file lacks its marks after a kill.
            replace_file(marks, json.dumps(sorted(unreadable_rows)))
        else:
            marks.unlink(missing_ok=True)


def write_pixels(
    stream: BinaryIO, shape: tuple[int, ...], chunks: Iterable[NDArray[np.uint8]]
) -> None:
    """Write uint8 images as an .npy file, part by part.

    Not through a writable map, where a full disk would crash the process.

    Args:
        stream: The open file.
        shape: (N, C, H, W), of all parts.
        chunks: The parts.
    """
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for rows in chunks:
        stream.write(rows.tobytes())


def _is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(array.shape == shape and array.dtype == np.uint8)


def _key(images: RawSplit, preprocessing: Preprocessing) -> str:
    # Mean and std are applied after the cache.
    geometry = preprocessing.model_dump(mode="json", exclude={"mean", "std"})
    return hashlib.sha256(
        json.dumps([images.fingerprint, geometry], sort_keys=True).encode()
    ).hexdigest()[:24]


def from_arrays(images: NDArray[np.uint8], targets: NDArray[np.int64], name: str) -> RawSplit:
    """A split of images that are arrays already: uint8 (N, H, W) or (N, H, W, 3)."""
    fingerprint = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    source = _Arrays(images, name)
    return RawSplit(targets, source.open, source.where, fingerprint)


@dataclass(frozen=True)
class _Arrays:
    images: NDArray[np.uint8]
    name: str

    def open(self, index: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[index]
        return image

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"
