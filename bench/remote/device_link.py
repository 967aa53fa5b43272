"""A link to a device: commands of its shell, files there and back. What goes over it is written
once, in remote_run.py and remote_native.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ...core.errors import InputError


class LinkLost(InputError):
    """The device does not answer at present; a run that was begun there goes on."""


class DeviceLink(Protocol):
    """One device. Every error is an InputError of one line that names the device by `shown`, never
    by its user.
    """

    kind: str

    @property
    def shown(self) -> str:
        """The device's address for messages, without the user."""
        ...

    def run(self, script: str, *, send: bytes = b"", limit_s: float = 60.0) -> bytes:
        """Run a shell script there and return its output. Errors: InputError or LinkLost, one
        line.
        """
        ...

    def copy(self, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Put files (name: path, or bytes) into a folder there, which is made."""
        ...

    def talk(self, script: str) -> list[str]:
        """The command that runs a script there with this machine's standard input and output."""
        ...

    def default_folder(self) -> str:
        """Where files may lie there while something is measured."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


def quote(path: str) -> str:
    """A path for the device's shell, with a leading $HOME left to it."""
    if path.startswith("$HOME/"):
        return '"$HOME"/' + shlex.quote(path[len("$HOME/") :])
    return shlex.quote(path)


def disk_full(shown: str) -> InputError:
    """The one line for a device that has no space left."""
    return InputError(f"{shown}: its disk is full; free some space there, then measure again")


def is_disk_full(said: str) -> bool:
    """Do these words of a program say that a disk is full?"""
    low = said.lower()
    # GNU tar says no more than how much it could write.
    return "no space left on device" in low or "disk quota exceeded" in low or "wrote only" in low


def size_bytes(source: Path | bytes) -> int:
    """The length of a file, or of bytes."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size
