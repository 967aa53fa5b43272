"""Undecoded pictures of one split, wherever they come from, and the decoding of them all."""

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

from ...core.errors import InputError
from ...core.console import progress_bar
from ...core.storage import disk_errors
from .preprocessing import Preprocessing

# Above this, decoded images live in a memory-mapped file, so that neither memory nor a second run
# pays for them.
MEMORY_LIMIT_BYTES = 256 * 2**20
_CHUNK = 256


@dataclass(frozen=True)
class Pictures:
    """A split before decoding. `open(i)` gives a PIL image or uint8 array; `where(i)` names it;
    `fingerprint` follows its content.
    """

    targets: NDArray[np.int64]
    open: Callable[[int], Any]
    where: Callable[[int], str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, indices: NDArray[np.int64]) -> Pictures:
        """The pictures at `indices`, in that order."""
        stamp = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        whole_open, whole_where = self.open, self.where
        return Pictures(
            self.targets[indices],
            lambda index: whole_open(int(indices[index])),
            lambda index: whole_where(int(indices[index])),
            stamp,
        )


@dataclass(frozen=True)
class Sources:
    """An undecoded data set: the official splits that have labels, and the names of the classes."""

    labels: tuple[str, ...]
    train: Pictures
    val: Pictures | None = None
    test: Pictures | None = None


def cache_folder() -> Path:
    """Where decoded images are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrim"


def decode(
    pictures: Pictures,
    preprocessing: Preprocessing,
    *,
    title: str,
    cache: Path | None = None,
    quiet: bool = True,
) -> NDArray[np.uint8]:
    """All pictures at the model's input size, uint8 (N, C, H, W); in memory when small, else (or
    when `cache` is given) memory-mapped.

    Errors: InputError naming the picture that cannot be decoded; a full disk.
    """
    shape = (len(pictures), *preprocessing.image)
    if cache is None and int(np.prod(shape, dtype=np.int64)) <= MEMORY_LIMIT_BYTES:
        whole = np.empty(shape, dtype=np.uint8)
        for start, rows in _decoded(pictures, preprocessing, title, quiet):
            whole[start : start + len(rows)] = rows
        return whole
    path = (cache or cache_folder()) / f"{_key(pictures, preprocessing)}.npy"
    if not _is_whole(path, shape):
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, shape, _decoded(pictures, preprocessing, title, quiet))
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _decoded(
    pictures: Pictures, preprocessing: Preprocessing, title: str, quiet: bool
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    def one(index: int) -> NDArray[np.uint8]:
        try:
            return preprocessing.pixels(pictures.open(index))
        except (
            OSError,
            SyntaxError,
            ValueError,
            struct.error,
            Image.DecompressionBombError,
        ) as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise InputError(
                f"{pictures.where(index)}: not a readable image ({reason}); repair or remove it"
            ) from error

    started = time.perf_counter()
    # Pillow lets go of the interpreter while it decodes and resizes.
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
        progress_bar(title, len(pictures), quiet=quiet) as advance,
    ):
        for start in range(0, len(pictures), _CHUNK):
            indices = range(start, min(len(pictures), start + _CHUNK))
            yield start, np.stack(list(pool.map(one, indices)))
            if time.perf_counter() - started > 2.0:
                advance(indices.stop)


def _write(
    path: Path, shape: tuple[int, ...], chunks: Iterator[tuple[int, NDArray[np.uint8]]]
) -> None:
    # Plain writes, not a writable map: a full disk is an error here, but a crash of the process
    # there.
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for _, rows in chunks:
                stream.write(rows.tobytes())
        os.replace(aside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(array.shape == shape and array.dtype == np.uint8)


def _key(pictures: Pictures, preprocessing: Preprocessing) -> str:
    # Mean and std are applied after the cache.
    geometry = preprocessing.model_dump(mode="json", exclude={"mean", "std"})
    return hashlib.sha256(
        json.dumps([pictures.fingerprint, geometry], sort_keys=True).encode()
    ).hexdigest()[:24]


def from_arrays(images: NDArray[np.uint8], targets: NDArray[np.int64], name: str) -> Pictures:
    """Pictures that are arrays already: uint8 (N, H, W) or (N, H, W, 3)."""
    fingerprint = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return Pictures(
        targets, lambda index: images[index], lambda index: f"{name}, image {index}", fingerprint
    )
