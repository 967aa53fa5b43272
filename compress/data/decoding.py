"""Undecoded images of any source, and their decoding to the input size of a model."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.console import progress_bar
from ...core.errors import InputError
from ...core.storage import disk_errors
from .preprocessing import Preprocessing

# Above this, decoded images are kept in a memory-mapped file, which a second run finds again.
MEMORY_LIMIT_BYTES = 256 * 2**20
_CHUNK = 256
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class RawSplit:
    """The undecoded images of one split.

    Attributes:
        targets: (N,), their class numbers.
        open: `open(i)` returns image i as a PIL image or uint8 array.
        where: `where(i)` names image i in error messages.
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
        open_image, where = self.open, self.where
        return RawSplit(
            self.targets[indices],
            lambda index: open_image(int(indices[index])),
            lambda index: where(int(indices[index])),
            stamp,
        )


@dataclass(frozen=True)
class RawDataset:
    """An undecoded data set: its class names, and its official splits that have labels."""

    labels: tuple[str, ...]
    train: RawSplit
    val: RawSplit | None = None
    test: RawSplit | None = None


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
) -> NDArray[np.uint8]:
    """Decode all images of a split at the input size of a model.

    Args:
        images: The undecoded images.
        preprocessing: The input size, and how images are resized; mean and std are not applied.
        title: The text of the progress bar.
        cache: The folder for a memory-mapped result. By default results up to 256 MB are kept in
            memory, larger ones in `cache_folder()`.
        quiet: Show no progress bar.

    Returns:
        uint8 (N, C, H, W).

    Raises:
        InputError: An image cannot be decoded, and the message names it; or the disk is full.
    """
    shape = (len(images), *preprocessing.image)
    if cache is None and int(np.prod(shape, dtype=np.int64)) <= MEMORY_LIMIT_BYTES:
        whole = np.empty(shape, dtype=np.uint8)
        for start, rows in _decoded(images, preprocessing, title, quiet):
            whole[start : start + len(rows)] = rows
        return whole
    path = (cache or cache_folder()) / f"{_key(images, preprocessing)}.npy"
    if not _is_complete(path, shape):
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, shape, _decoded(images, preprocessing, title, quiet))
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _decoded(
    images: RawSplit, preprocessing: Preprocessing, title: str, quiet: bool
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    def one(index: int) -> NDArray[np.uint8]:
        try:
            return preprocessing.pixels(images.open(index))
        except _DECODING_ERRORS as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise InputError(
                f"{images.where(index)}: not a readable image ({reason}); repair or remove it"
            ) from error

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
    path: Path, shape: tuple[int, ...], chunks: Iterator[tuple[int, NDArray[np.uint8]]]
) -> None:
    # Not through a writable map, where a full disk would crash the process.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for _, rows in chunks:
                stream.write(rows.tobytes())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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
    return RawSplit(
        targets, lambda index: images[index], lambda index: f"{name}, image {index}", fingerprint
    )
