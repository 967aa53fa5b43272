"""Commands on an Android device, or whatever runs adbd, over the system's own `adb`, whose failures
become one clear line each.
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
from .device_link import LinkLost, disk_full, is_disk_full, quote, size_bytes

INSTALL = "adb is not installed here; install it (Debian: apt-get install adb)"
# The slowest link that is waited for.
SLOWEST_BYTES_PER_S = 65536
# adb's own words, as against those of the script that it ran there.
_OWN = re.compile(r"^(?:adb(?:\.exe)?: (?:error: )?|error: |\* )(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class AdbAddress:
    """Which device: adb://SERIAL as `adb devices` lists it, or adb://host:port of one in the
    network.
    """

    serial: str

    @classmethod
    def parse(cls, url: str) -> AdbAddress:
        """Errors: InputError for what is no such address."""
        match = re.fullmatch(r"adb://([^/\s@]+)/?", url)
        if not match or match[1].startswith("-"):
            raise InputError(
                f"--on {url!r}: not an address; write adb://SERIAL, with the serial that `adb devices` lists, or adb://host:port"
            )
        return cls(match[1])

    @property
    def in_network(self) -> bool:
        """Is it to be connected to first?"""
        return re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^:]+):\d{1,5}", self.serial) is not None


class AdbLink:
    """One device of the adb server; a device in the network is connected to, and left connected as
    `adb connect` leaves it.
    """

    kind = "adb"

    def __init__(self, address: AdbAddress) -> None:
        self.address = address
        self._command = ["adb", "-s", address.serial]
        if address.in_network:
            self._connect()

    @property
    def shown(self) -> str:
        return self.address.serial

    def run(self, script: str, *, send: bytes = b"", limit_s: float = 60.0) -> bytes:
        """Run a shell script on the device and return its output. Errors: InputError or LinkLost,
        one line.
        """
        code, out, said = self._call(["shell", "-T", script], send=send, limit_s=limit_s)
        if code != 0:
            raise self._explain(code, said)
        return out

    def copy(self, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Push files (name: path, or bytes) into a folder on the device."""
        place = (
            self.run(f"umask 077; mkdir -p {quote(folder)} && cd {quote(folder)} && pwd")
            .decode()
            .strip()
        )
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
            # One push for all: each entry goes below the folder, which is there already.
            code, out, said = self._call(
                ["push", *(str(entry) for entry in sorted(stage.iterdir())), place + "/"],
                limit_s=limit_s,
            )
        if code != 0:
            raise self._explain(code, said or out.decode(errors="replace"))

    def talk(self, script: str) -> list[str]:
        """The command that runs a script on the device with this machine's standard input and
        output.
        """
        return [*self._command, "shell", "-T", script]

    def default_folder(self) -> str:
        """Android's folder for programs pushed by a developer; elsewhere the user's cache."""
        told = self.run(
            'place=/data/local/tmp; [ -d $place ] && [ -w $place ] || place=$HOME/.cache; echo "$place/vitrim"'
        )
        return told.decode().strip()

    def close(self) -> None:
        """Nothing is kept open but adb's own server."""

    def _connect(self) -> None:
        code, out, said = self._call(["connect", self.address.serial], general=True)
        told = " ".join((out.decode(errors="replace") + said).split())
        # `adb connect` ends with 0 whether or not it connected, in many of its releases.
        if code != 0 or "connected to" not in told:
            raise LinkLost(
                f"{self.shown}: no connection ({told[-200:] or f'exit code {code}'}); is the device on, and its adb over network allowed?"
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
                f"{self.shown}: no answer for {limit_s:.0f} s; is the device on, and its cable or network?"
            ) from None
        return done.returncode, done.stdout, done.stderr.decode(errors="replace")

    def _explain(self, code: int, said: str) -> InputError:
        own = [line.strip() for line in _OWN.findall(said)]
        last = next(
            (line.strip() for line in reversed(said.splitlines()) if line.strip()),
            f"exit code {code}",
        )
        words = " ".join(own).lower()
        if is_disk_full(said):
            return disk_full(self.shown)
        if ("not found" in words and "device" in words) or "no devices" in words:
            return LinkLost(
                f"{self.shown}: no such device is connected; `adb devices` lists those that are; plug it in, or start it"
            )
        if "unauthorized" in words:
            return InputError(
                f"{self.shown}: this computer is not allowed yet; unlock the device, accept its question about USB debugging, then measure again"
            )
        if "no permissions" in words:
            return InputError(
                f"{self.shown}: this user may not use the USB device; install Debian's android-sdk-platform-tools-common, or ask an administrator"
            )
        if (
            "offline" in words
            or last == "error: closed"
            or "protocol fault" in words
            or "connection reset" in words
        ):
            return LinkLost(
                f"{self.shown}: the device is there but does not answer ({last}); unplug and plug it in again, or restart it"
            )
        if "cannot connect to daemon" in words or "failed to start daemon" in words:
            return InputError(
                f"adb's own server does not start here ({last}); `adb kill-server`, then measure again"
            )
        return InputError(f"{self.shown}: {last}")
