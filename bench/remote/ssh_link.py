"""Commands on a device over the system's own `ssh`, whose failures become one clear line each."""

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
from .device_link import LinkLost, disk_full, is_disk_full, quote


@dataclass(frozen=True)
class SshAddress:
    """Where to: ssh://[user@]host[:port]; a password has no place in it."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> SshAddress:
        """Errors: InputError for what is no such address, or holds a password."""
        match = re.fullmatch(
            r"ssh://(?:([^@/]+)@)?(\[[0-9a-fA-F:.%]+\]|[^@/:\s]+)(?::(\d{1,5}))?/?", url
        )
        if not match:
            raise InputError(
                f"--on {url.split('@')[-1]!r}: not an address; write ssh://user@host or ssh://user@host:port"
            )
        user, host, port = match.groups()
        if user and ":" in user:
            raise InputError(
                "--on ssh://…: a password does not belong into an address; use a key (`ssh-copy-id`) and write ssh://user@host"
            )
        if host.startswith("-") or (user or "").startswith("-"):
            raise InputError(f"--on {url!r}: a name cannot begin with '-'; write ssh://user@host")
        if port is not None and not 1 <= int(port) <= 65535:
            raise InputError(f"--on {url!r}: port {port} is outside of 1 to 65535")
        return cls(host.strip("[]"), user, int(port) if port else None)

    @property
    def shown(self) -> str:
        """The address for messages, without the user."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


class SshLink:
    """One connection to a device, kept open between commands; `options` are passed to ssh (["-i",
    "key"]).
    """

    kind = "ssh"

    def __init__(self, address: SshAddress, options: Sequence[str] = ()) -> None:
        self.address = address
        # The socket's path must stay short; the folder goes with the object.
        self._sockets = tempfile.TemporaryDirectory(prefix="vitrim-", ignore_cleanup_errors=True)
        self._command = [
            "ssh",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=10",
            "-o",
            "ServerAliveInterval=5",
            "-o",
            "ServerAliveCountMax=3",
        ]
        self._command += [
            "-o",
            "ControlMaster=auto",
            "-o",
            f"ControlPath={self._sockets.name}/%C",
            "-o",
            "ControlPersist=30",
            *options,
        ]
        self._command += ["-p", str(address.port)] if address.port else []
        self._command += ["-l", address.user] if address.user else []

    @property
    def shown(self) -> str:
        return self.address.shown

    def run(self, script: str, *, send: bytes = b"", limit_s: float = 60.0) -> bytes:
        """Run a shell script on the device and return its output. Errors: InputError or LinkLost,
        one line.
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
                f"{self.address.shown}: no answer for {limit_s:.0f} s; is the device on, and the network?"
            ) from None
        if done.returncode != 0:
            raise self._explain(done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout

    def copy(self, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Put files (name: path, or bytes) into a folder on the device, through tar."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, source in files.items():
                content = source if isinstance(source, bytes) else source.read_bytes()
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))
        size = stream.tell()
        # 64 KiB a second is the slowest link that is waited for.
        self.run(
            f"umask 077; mkdir -p {quote(folder)} && tar -xf - -C {quote(folder)}",
            send=stream.getvalue(),
            limit_s=60 + size / 65536,
        )

    def talk(self, script: str) -> list[str]:
        """The command that runs a script on the device with this machine's standard input and
        output.
        """
        return [*self._command, "--", self.address.host, script]

    def default_folder(self) -> str:
        """The user's cache; the device's shell says which that is."""
        return "$HOME/.cache/vitrim"

    def close(self) -> None:
        """End the connection that is kept open."""
        subprocess.run(
            [*self._command, "-O", "exit", "--", self.address.host],
            capture_output=True,
            timeout=10,
            check=False,
        )
        self._sockets.cleanup()

    def _explain(self, code: int, said: str) -> InputError:
        where, low = self.address.shown, said.lower()
        last = next(
            (line.strip() for line in reversed(said.splitlines()) if line.strip()),
            f"exit code {code}",
        )
        if "remote host identification has changed" in low:
            return InputError(
                f"{where}: its host key is not the one known here: another device at this address, or someone between; "
                f"if you set it up anew, run `ssh-keygen -R {self._known_name()}` and connect once by hand"
            )
        if "host key verification failed" in low:
            return InputError(
                f"{where}: its host key is not known yet; connect once by hand (`ssh {self.address.host}`) and accept it, then measure"
            )
        if "permission denied (" in low:
            return InputError(
                f"{where}: the login was refused; put your public key there (`ssh-copy-id`), or name the right user (ssh://user@{where})"
            )
        if is_disk_full(said):
            return disk_full(where)
        if code == 255:
            return LinkLost(
                f"{where}: no connection ({last}); is the device on, the address right, and its ssh server running?"
            )
        return InputError(f"{where}: {last}")

    def _known_name(self) -> str:
        port = self.address.port
        return self.address.host if port in (None, 22) else f"'[{self.address.host}]:{port}'"
