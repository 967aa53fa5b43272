"""A link to a device over the system's own `ssh`; each failure becomes one clear line."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
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
)


@dataclass(frozen=True)
class SshAddress:
    """The address ssh://[user@]host[:port]; a password is refused."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> SshAddress:
        """Parse an address; raises InputError for anything else, and for a password."""
        match = re.fullmatch(
            r"ssh://(?:([^@/]+)@)?(\[[0-9a-fA-F:.%]+\]|[^@/:\s]+)(?::(\d{1,5}))?/?", url
        )
        if not match:
            raise InputError(
                f"--on {url.split('@')[-1]!r}: not an address; "
                "write ssh://user@host or ssh://user@host:port"
            )
        user, host, port = match.groups()
        if user and ":" in user:
            raise InputError(
                "--on ssh://…: a password does not belong in an address; "
                "use a key (`ssh-copy-id`) and write ssh://user@host"
            )
        if host.startswith("-") or (user or "").startswith("-"):
            raise InputError(f"--on {url!r}: a name cannot begin with '-'; write ssh://user@host")
        if port is not None and not 1 <= int(port) <= 65535:
            raise InputError(f"--on {url!r}: port {port} is outside of 1 to 65535")
        return cls(host.strip("[]"), user, int(port) if port else None)

    @property
    def label(self) -> str:
        """The address for messages, without the user."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


class SshLink:
    """A connection to a device, kept open between commands; `options` are those of ssh."""

    kind = "ssh"

    def __init__(self, address: SshAddress, options: Sequence[str] = ()) -> None:
        self.address = address
        # Unix limits the length of a socket's path; the folder is removed with the object.
        self._sockets = tempfile.TemporaryDirectory(prefix="vitrim-", ignore_cleanup_errors=True)
        settings = (
            *("BatchMode=yes", "ConnectTimeout=10"),
            *("ServerAliveInterval=5", "ServerAliveCountMax=3"),
            *("ControlMaster=auto", f"ControlPath={self._sockets.name}/%C", "ControlPersist=30"),
        )
        self._command = ["ssh", *(part for setting in settings for part in ("-o", setting))]
        self._command += options
        self._command += ["-p", str(address.port)] if address.port else []
        self._command += ["-l", address.user] if address.user else []

    @property
    def label(self) -> str:
        """The device's address for messages, without the user."""
        return self.address.label

    def run(self, script: str, *, send: bytes = b"", limit_s: float = 60.0) -> bytes:
        """Run a shell script on the device and return its output; see `DeviceLink`.

        Args:
            script: The script.
            send: Its standard input.
            limit_s: Time limit in seconds.
        """
        try:
            done = subprocess.run(
                [*self._command, "--", self.address.host, script],
                input=send,
                capture_output=True,
                timeout=limit_s,
            )
        except FileNotFoundError:
            raise InputError(
                "ssh is not installed here; install it (Debian: apt-get install openssh-client)"
            ) from None
        except subprocess.TimeoutExpired:
            raise LinkLost(
                f"{self.label}: no response for {limit_s:.0f} s; is the device on, and the network?"
            ) from None
        if done.returncode != 0:
            raise self._error(done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout

    def copy(self, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Copy files (name: path or content) into a folder on the device, through tar."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, source in files.items():
                data = source if isinstance(source, bytes) else source.read_bytes()
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o600
                archive.addfile(entry, io.BytesIO(data))
        content = stream.getvalue()
        self.run(
            f"umask 077; mkdir -p {quote(folder)} && tar -xf - -C {quote(folder)}",
            send=content,
            limit_s=60 + len(content) / SLOWEST_BYTES_PER_S,
        )

    def interactive(self, script: str) -> list[str]:
        """Return the command that runs a script there, with this machine's standard streams."""
        return [*self._command, "--", self.address.host, script]

    def default_folder(self) -> str:
        """Return a folder of the user's cache; the device's shell expands $HOME."""
        return "$HOME/.cache/vitrim"

    def close(self) -> None:
        """Close the connection."""
        subprocess.run(
            [*self._command, "-O", "exit", "--", self.address.host],
            capture_output=True,
            timeout=10,
            check=False,
        )
        self._sockets.cleanup()

    def _error(self, code: int, stderr: str) -> InputError:
        where, lower = self.label, stderr.lower()
        last = last_line(stderr) or f"exit code {code}"
        if "remote host identification has changed" in lower:
            return InputError(
                f"{where}: its host key differs from the known one: another device at this "
                "address, or an attack; if you reinstalled it, run "
                f"`ssh-keygen -R {self._known_name()}` and connect once by hand"
            )
        if "host key verification failed" in lower:
            return InputError(
                f"{where}: its host key is not known yet; "
                f"connect once by hand (`ssh {self.address.host}`) and accept it, then measure"
            )
        if "permission denied (" in lower:
            return InputError(
                f"{where}: the login was refused; put your public key there (`ssh-copy-id`), "
                f"or name the right user (ssh://user@{where})"
            )
        if is_disk_full(stderr):
            return disk_full(where)
        if code == 255:
            return LinkLost(
                f"{where}: no connection ({last}); "
                "is the device on, the address right, and its ssh server running?"
            )
        return InputError(f"{where}: {last}")

    def _known_name(self) -> str:
        port = self.address.port
        return self.address.host if port in (None, 22) else f"'[{self.address.host}]:{port}'"
