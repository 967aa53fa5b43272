"""A link to an Android device, or anything that runs adbd, over the system's own `adb`.

Each failure becomes one clear line.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InputError
from .device_link import (
    SLOWEST_BYTES_PER_S,
    LinkLost,
    disk_full,
    is_disk_full,
    last_line,
    quote,
    size_bytes,
)

INSTALL = "adb is not installed here; install it (Debian: apt-get install adb)"
# adb's own messages, as opposed to those of the script that it ran.
_OWN_MESSAGE = re.compile(r"^(?:adb(?:\.exe)?: (?:error: )?|error: |\* )(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class AdbAddress:
    """The address adb://SERIAL, as `adb devices` lists it, or adb://host:port in the network."""

    serial: str

    @classmethod
    def parse(cls, url: str) -> AdbAddress:
        """Parse an address; raises InputError for anything else."""
        match = re.fullmatch(r"adb://([^/\s@]+)/?", url)
        if not match or match[1].startswith("-"):
            raise InputError(
                f"--on {url!r}: not an address; write adb://SERIAL, with the serial that "
                "`adb devices` lists, or adb://host:port"
            )
        return cls(match[1])

    @property
    def in_network(self) -> bool:
        """Whether adb has to connect to it first."""
        return re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^:]+):\d{1,5}", self.serial) is not None


class AdbLink:
    """A device of the adb server; one in the network stays connected, as after `adb connect`."""

    kind = "adb"

    def __init__(self, address: AdbAddress) -> None:
        self.address = address
        self._command = ["adb", "-s", address.serial]
        if address.in_network:
            self._connect()

    @property
    def label(self) -> str:
        """The device's serial, for messages."""
        return self.address.serial

    def run(self, script: str, *, send: bytes = b"", limit_s: float = 60.0) -> bytes:
        """Run a shell script on the device and return its output; see `DeviceLink`.

        Args:
            script: The script.
            send: Its standard input.
            limit_s: Time limit in seconds.
        """
        code, out, stderr = self._call(["shell", "-T", script], send=send, limit_s=limit_s)
        if code != 0:
            raise self._error(code, stderr)
        return out

    def copy(self, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Push files (name: path or content) into a folder on the device."""
        create = f"umask 077; mkdir -p {quote(folder)} && cd {quote(folder)} && pwd"
        absolute = self.run(create).decode().strip()
        limit_s = 60 + sum(size_bytes(source) for source in files.values()) / SLOWEST_BYTES_PER_S
        with tempfile.TemporaryDirectory(prefix="vitrim-adb-") as name:
            stage = Path(name)
            for path, source in files.items():
                target = stage / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(source, bytes):
                    target.write_bytes(source)
                else:
                    shutil.copyfile(source, target)
                target.chmod(0o700)
            # The folder exists, so one push puts every entry below it.
            entries = [str(entry) for entry in sorted(stage.iterdir())]
            code, out, stderr = self._call(["push", *entries, absolute + "/"], limit_s=limit_s)
        if code != 0:
            raise self._error(code, stderr or out.decode(errors="replace"))

    def interactive(self, script: str) -> list[str]:
        """Return the command that runs a script there, with this machine's standard streams."""
        return [*self._command, "shell", "-T", script]

    def default_folder(self) -> str:
        """Return Android's folder for pushed programs; elsewhere one of the user's cache."""
        script = (
            "folder=/data/local/tmp; [ -d $folder ] && [ -w $folder ] || folder=$HOME/.cache; "
            'echo "$folder/vitrim"'
        )
        return self.run(script).decode().strip()

    def close(self) -> None:
        """Do nothing: only adb's own server stays open."""

    def _connect(self) -> None:
        code, out, stderr = self._call(["connect", self.address.serial], general=True)
        message = " ".join((out.decode(errors="replace") + stderr).split())
        # In many releases `adb connect` ends with 0 whether or not it connected.
        if code != 0 or "connected to" not in message:
            raise LinkLost(
                f"{self.label}: no connection ({message[-200:] or f'exit code {code}'}); "
                "is the device on, and its adb over network allowed?"
            )

    def _call(
        self, words: list[str], *, send: bytes = b"", limit_s: float = 60.0, general: bool = False
    ) -> tuple[int, bytes, str]:
        command = ["adb", *words] if general else [*self._command, *words]
        try:
            done = subprocess.run(command, input=send, capture_output=True, timeout=limit_s)
        except FileNotFoundError:
            raise InputError(INSTALL) from None
        except subprocess.TimeoutExpired:
            raise LinkLost(
                f"{self.label}: no response for {limit_s:.0f} s; "
                "is the device on, and its cable or network?"
            ) from None
        return done.returncode, done.stdout, done.stderr.decode(errors="replace")

    def _error(self, code: int, stderr: str) -> InputError:
        words = " ".join(line.strip() for line in _OWN_MESSAGE.findall(stderr)).lower()
        last = last_line(stderr) or f"exit code {code}"
        if is_disk_full(stderr):
            return disk_full(self.label)
        if ("not found" in words and "device" in words) or "no devices" in words:
            return LinkLost(
                f"{self.label}: no such device is connected; `adb devices` lists those that are; "
                "plug it in, or start it"
            )
        if "unauthorized" in words:
            return InputError(
                f"{self.label}: this computer is not allowed yet; unlock the device, accept its "
                "question about USB debugging, then measure again"
            )
        if "no permissions" in words:
            return InputError(
                f"{self.label}: this user may not use the USB device; install Debian's "
                "android-sdk-platform-tools-common, or contact an administrator"
            )
        lost = ("offline", "protocol fault", "connection reset")
        if last == "error: closed" or any(text in words for text in lost):
            return LinkLost(
                f"{self.label}: the device is there but does not respond ({last}); "
                "unplug it and plug it in again, or restart it"
            )
        if "cannot connect to daemon" in words or "failed to start daemon" in words:
            return InputError(
                f"adb's own server does not start here ({last}); "
                "`adb kill-server`, then measure again"
            )
        return InputError(f"{self.label}: {last}")
