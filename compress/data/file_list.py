"""The image files of a folder, kept in about 40 bytes for each, and an index that spares a scan.

Names lie one after the other in one array, so that a million of them take tens of megabytes and
worker processes share them. The index of a large folder is kept in the user's cache folder. It is
valid while every folder in it has the time of its last change; a file that is rewritten in place
changes no folder, which is why decoded images are never looked up by an index.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.console import progress_bar
from ...core.errors import InputError
from .sealed_index import Seal, index_path, read_index, seal_of, write_index

# Folders with fewer files are scanned in a second or two.
INDEX_ABOVE = 100_000


@dataclass(frozen=True)
class FileList:
    """The image files below a folder.

    Attributes:
        root: The folder.
        names: uint8, the names relative to `root`, as the file system encodes them.
        ends: int64 (N,), where each name ends in `names`.
        folders: int32 (N,), the position in the scanned folders that holds each file.
        fingerprint: Changes with the names, the sizes and the times of the last change.
        indexed: Whether the list was read from an index.
    """

    root: str
    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    folders: NDArray[np.int32]
    fingerprint: str
    indexed: bool = False

    def __len__(self) -> int:
        return len(self.ends)

    def where(self, index: int) -> str:
        """The path of file `index`."""
        start = int(self.ends[index - 1]) if index else 0
        name = os.fsdecode(self.names[start : int(self.ends[index])].tobytes())
        return name if self.root == "." else os.path.join(self.root, name)

    def open(self, index: int) -> Image.Image:
        """Decode file `index`."""
        with Image.open(self.where(index)) as image:
            image.load()
            return image


def list_images(
    root: Path, folders: Sequence[Path], *, fresh: bool = False, quiet: bool = True
) -> FileList:
    """List the image files in some folders of `root`, and in the folders in them, by name.

    Hidden files are left out, and links to folders are not followed.

    Args:
        root: The folder to which names are relative.
        folders: `root` itself, or folders in it.
        fresh: Scan although there is an index.
        quiet: Show no progress bar.

    Returns:
        The files, one folder after the other.
    """
    path = index_path("images", [root, *folders])
    found = None if fresh else _read(path, root)
    if found is not None:
        return found
    scan = _Scan(root)
    started = time.perf_counter()
    try:
        with progress_bar(f"listing {root}", len(folders), quiet=quiet) as advance:
            for number, folder in enumerate(folders):
                before = len(scan.ends)
                scan.add(os.fspath(folder), number)
                if time.perf_counter() - started > 2.0:
                    advance(number + 1)
                if len(scan.ends) == before:
                    break  # The caller refuses a folder without images.
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: it vanished while {root} was listed; start again when the folder "
            "no longer changes"
        ) from error
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or remove it"
        ) from error
    found = scan.result()
    if len(found) > INDEX_ABOVE:
        _write(path, scan, found)
    return found


class _Scan:
    def __init__(self, root: Path) -> None:
        self.root = os.fspath(root)
        self.skip = 0 if self.root == "." else len(os.fsencode(self.root).rstrip(b"/")) + 1
        self.names, self.ends, self.folders = bytearray(), array("q"), array("i")
        self.stamp = hashlib.sha256()
        # Each folder that was read, from before it was.
        self.seals: dict[str, Seal] = {}
        self.endings = set(Image.registered_extensions())

    def add(self, folder: str, number: int) -> None:
        """Append the files of a folder, in the order of the parts of their paths."""
        self.seals[folder] = seal_of(folder)
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.is_dir(follow_symlinks=False):
                self.add(entry.path, number)
            elif self._is_image(entry):
                self._append(entry, number)

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        name = entry.name
        ending = os.path.splitext(name)[1].lower()
        return not name.startswith(".") and ending in self.endings and entry.is_file()

    def _append(self, entry: os.DirEntry[str], number: int) -> None:
        status = entry.stat()
        name = os.fsencode(entry.path)[self.skip :]
        self.stamp.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        self.names += name
        self.ends.append(len(self.names))
        self.folders.append(number)

    def result(self) -> FileList:
        return FileList(
            self.root,
            np.frombuffer(bytes(self.names), dtype=np.uint8),
            np.array(self.ends, dtype=np.int64),
            np.array(self.folders, dtype=np.int32),
            self.stamp.hexdigest(),
        )


def _write(path: Path, scan: _Scan, found: FileList) -> None:
    stamp = np.frombuffer(found.fingerprint.encode(), dtype=np.uint8)
    arrays = {"names": found.names, "ends": found.ends, "folders": found.folders, "stamp": stamp}
    write_index(path, scan.seals, arrays)


def _read(path: Path, root: Path) -> FileList | None:
    found = read_index(path)
    if found is None or not {"names", "ends", "folders", "stamp"} <= set(found):
        return None
    stamp = found["stamp"].tobytes().decode()
    names, ends, folders = found["names"], found["ends"], found["folders"]
    return FileList(os.fspath(root), names, ends, folders, stamp, indexed=True)
