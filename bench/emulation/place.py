"""Where the emulation lies on this machine, and how a folder appears there: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ...core.errors import InputError

VARIABLE = "VITRIM_EMULATION"


def place() -> Path:
    """The folder of all that was prepared: $VITRIM_EMULATION, else vitrim's part of the user's
    cache folder.
    """
    if moved := os.environ.get(VARIABLE):
        return Path(moved).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vitrim" / "emulation"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time prepares; what an earlier one left half-written is removed. Errors:
    InputError where no such lock exists.
    """
    if sys.platform != "linux":
        raise InputError(
            "aarch64 emulation needs Linux (qemu's user emulation); measure on the device itself with --on ssh://user@host"
        )
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for rest in folder.glob(".*"):
            # replace_folder writes aside under a name that begins with a dot.
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
        yield
