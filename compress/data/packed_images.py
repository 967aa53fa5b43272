"""Undecoded images of a stream, copied to a file so that they can be read in any order."""

from __future__ import annotations

import hashlib
import io
import os
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.console import progress_bar
from ...core.staging import staged_file
from ...core.storage import disk_errors, replace_file
from .decoding import RawSplit, cache_folder
from .streams import Record, open_bytes


@dataclass(frozen=True)
class PackedImages:
    """Images that lie one after the other in a file.

    Attributes:
        path: The file.
        ends: int64 (N,), where each image ends in it.
        names: The texts that name the images in messages, joined by line feeds.
    """

    path: str
    ends: NDArray[np.int64]
    names: bytes

    def where(self, index: int) -> str:
        """The image in the stream, for messages."""
        return os.fsdecode(self.names.split(b"\n")[index])

    def open(self, index: int) -> Image.Image:
        """Decode an image.

        Raises:
            ValueError: The row of the stream has no image.
        """
        start = int(self.ends[index - 1]) if index else 0
        size = int(self.ends[index]) - start
        if not size:
            raise ValueError("no image in this row")
        with Path(self.path).open("rb") as file:
            file.seek(start)
            return open_bytes(file.read(size))


def packed(
    records: Iterable[Record], key: str, count: int, *, title: str, quiet: bool = True
) -> RawSplit:
    """Copy images to the cache folder, or find the copy of an earlier run.

    Args:
        records: The images.
        key: Identifies them: the source, its version and which of its images.
        count: The expected number, for the progress bar.
        title: The text of the progress bar.
        quiet: Show no progress bar.

    Returns:
        The images.

    Raises:
        InputError: The stream cannot be read, or the disk is full.
    """
    stamp = hashlib.sha256(key.encode()).hexdigest()
    path = cache_folder() / "packed" / f"{stamp[:24]}.bin"
    listing = path.with_suffix(".npz")
    found = _listing(path, listing)
    if found is None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _write(records, path, count, title, quiet)
        buffer = io.BytesIO()
        np.savez(buffer, **found)  # type: ignore[arg-type]
        # Last, so that a copy with a listing is whole.
        replace_file(listing, buffer.getvalue())
    images = PackedImages(str(path), found["ends"], found["names"].tobytes())
    return RawSplit(found["targets"], images.open, images.where, stamp)


def _listing(path: Path, listing: Path) -> dict[str, NDArray[np.int64]] | None:
    try:
        with np.load(listing, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ("ends", "targets", "names")}
        return found if path.stat().st_size == (found["ends"].tolist() or [0])[-1] else None
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(
    records: Iterable[Record], path: Path, count: int, title: str, quiet: bool
) -> dict[str, NDArray[np.int64]]:
    ends, targets, names, end = array("q"), array("q"), [], 0
    started = time.perf_counter()
    with (
        staged_file(path.resolve()) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as file,
        progress_bar(title, count, quiet=quiet) as advance,
    ):
        for record in records:
            end += file.write(record.data or b"")
            ends.append(end)
            targets.append(record.target)
            names.append(os.fsencode(record.where.replace("\n", " ")))
            if len(ends) % 64 == 0 and time.perf_counter() - started > 2.0:
                advance(len(ends))
    texts = np.frombuffer(b"\n".join(names), dtype=np.uint8)
    return {"ends": np.array(ends), "targets": np.array(targets), "names": texts}
