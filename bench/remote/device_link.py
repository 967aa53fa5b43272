"""What a link to a device provides: shell commands, and copying files to it.

python_run.py and native_run.py are written once, for every kind of link.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ...core.errors import InputError

# The slowest link for which a copy does not time out.
SLOWEST_BYTES_PER_S = 65536


class LinkLost(InputError):
    """The device does not respond at present; a run that was started there goes on."""


class DeviceLink(Protocol):
    """A link to one device; its errors name the device by `label`, in one line."""

    kind: str

    @property
    def label(self) -> str:
        """The device's address for messages, without the user."""
        ...

    def run(self, script: str, *, send: bytes = b"", limit_s: float = 60.0) -> bytes:
        """Run a shell script on the device and return its output.

        Args:
            script: The script.
            send: Its standard input.
            limit_s: Time limit in seconds.

        Raises:
            InputError: The script failed.
            LinkLost: The device did not respond.
        """
        ...

    def copy(self, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Copy files (name: path or content) into a folder on the device, which is created."""
        ...

    def interactive(self, script: str) -> list[str]:
        """Return the command that runs a script there, with this machine's standard streams."""
        ...

    def default_folder(self) -> str:
        """Return the folder on the device for the files of a run."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def quote(path: str) -> str:
    """Quote a path for the device's shell, which still expands a leading $HOME."""
    if path.startswith("$HOME/"):
        return '"$HOME"/' + shlex.quote(path[len("$HOME/") :])
    return shlex.quote(path)


def disk_full(label: str) -> InputError:
    """Return the error for a device without free space."""
    return InputError(f"{label}: its disk is full; free some space there, then measure again")


def is_disk_full(output: str) -> bool:
    """Return whether a program's output reports a full disk."""
    lower = output.lower()
    # GNU tar only reports how much it could write.
    return any(
        text in lower for text in ("no space left on device", "disk quota exceeded", "wrote only")
    )


def last_line(output: str) -> str:
    """Return the last line of a program's output that is not blank."""
    lines = [line.strip() for line in output.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def size_bytes(source: Path | bytes) -> int:
    """Return the length of a file or of bytes."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size
