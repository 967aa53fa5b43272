"""An sshd on the loopback interface, on a free port with keys of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
needs_sshd = pytest.mark.skipif(
    not Path(SSHD).exists(), reason="sshd is not installed (Debian: apt-get install openssh-server)"
)


@dataclass
class Server:
    """A running sshd: its address, and the options of ssh that reach it."""

    url: str
    options: list[str]
    process: subprocess.Popen[bytes]
    folder: Path

    def known(self, line: str) -> list[str]:
        """Return the options with another file of known hosts."""
        path = self.folder / f"known-{abs(hash(line))}"
        path.write_text(line)
        return [option.replace(str(self.folder / "known"), str(path)) for option in self.options]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ssh_server(folder: Path, path: str | None = None) -> Iterator[Server]:
    """Run an sshd; `path` is the PATH of its commands, by default that of the user's shell."""
    for name in ("host", "user", "unauthorized"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    port = free_port()
    shutil.copy(folder / "user.pub", folder / "authorized")
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nPidFile none\n"
        # The start files of a shell may set another PATH, so it is set for the command.
        + (f'ForceCommand PATH={path} exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n' if path else "")
    )
    if os.geteuid() == 0:
        # The folder of sshd's privilege separation.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    process = subprocess.Popen(
        [SSHD, "-D", "-f", str(folder / "config"), "-E", str(folder / "log")]
    )
    key = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    settings = (
        f"UserKnownHostsFile={folder}/known",
        "GlobalKnownHostsFile=/dev/null",
        "IdentitiesOnly=yes",
        f"IdentityFile={folder}/user",
    )
    options = ["-F", "/dev/null", *(part for setting in settings for part in ("-o", setting))]
    for _ in range(50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    try:
        yield Server(f"ssh://{getpass.getuser()}@127.0.0.1:{port}", options, process, folder)
    finally:
        process.terminate()
        process.wait(timeout=10)
