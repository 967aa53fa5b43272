"""Listings of large sources, kept in the cache folder while the source does not change.

An index is sealed by the size and the time of the last change of each file or folder that was
listed. One that is damaged, or of another format, counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError
from ...core.storage import replace_file
from .decoding import cache_folder

# What changed in the last seconds could change again without another time stamp.
_SETTLED_S = 2.0
_FORMAT = 1
Seal = tuple[int, int]


def seal_of(path: str | Path) -> Seal:
    """The size in bytes and the time of the last change in nanoseconds."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def index_path(kind: str, paths: Iterable[Path]) -> Path:
    """The file of the index over some paths."""
    listed = b"\0".join([kind.encode(), *(os.fsencode(path.absolute()) for path in paths)])
    return cache_folder() / "index" / f"{hashlib.sha256(listed).hexdigest()[:24]}.npz"


def write_index(path: Path, seals: Mapping[str, Seal], arrays: Mapping[str, Any]) -> None:
    """Write an index; without a word where that fails, since it only saves time.

    Args:
        path: From `index_path`.
        seals: What was listed, with its seal from before it was listed.
        arrays: The content. Text is an array of bytes.
    """
    if time.time() - max(changed for _, changed in seals.values()) / 1e9 < _SETTLED_S:
        return
    buffer = io.BytesIO()
    np.savez(
        buffer,
        format=np.int64(_FORMAT),
        sealed=np.frombuffer(b"\0".join(map(os.fsencode, seals)), dtype=np.uint8),
        seals=np.array(list(seals.values()), dtype=np.int64),
        **arrays,
    )
    with contextlib.suppress(InputError):
        replace_file(path, buffer.getbuffer().tobytes())


def read_index(path: Path) -> dict[str, NDArray[Any]] | None:
    """The content of an index, or None where it is missing, damaged or out of date."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        sealed = arrays.pop("sealed").tobytes().split(b"\0")
        seals = arrays.pop("seals").tolist()
        if int(arrays.pop("format")) != _FORMAT or len(sealed) != len(seals):
            return None
        unchanged = all(
            seal_of(os.fsdecode(name)) == tuple(seal)
            for name, seal in zip(sealed, seals, strict=True)
        )
        return arrays if unchanged else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
