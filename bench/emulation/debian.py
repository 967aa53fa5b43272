"""Packages of a Debian release, of any architecture, downloaded and unpacked aside: nothing is
installed, and no root is needed.

The source is the machine's own with the release's name replaced, so no host is written down; apt
checks the archive's signatures as always.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InputError

RELEASE = "trixie"
# Shares of 1 and words, as everywhere in vitrim.bench.
Progress = Callable[[float, str], None]
ETC = Path("/etc/apt")
WITHOUT = "aarch64 emulation fetches its parts with Debian's apt-get"
ELSEWHERE = "on another system name an aarch64 root folder with python3 in VITRIM_AARCH64_ROOT, and qemu 10 or newer in VITRIM_QEMU_AARCH64"


@dataclass(frozen=True)
class Mirror:
    """Where this machine gets its Debian packages, and the keyring that signs them (None: apt's
    default).
    """

    uri: str
    keyring: str | None


def mirror(etc: Path = ETC) -> Mirror | None:
    """The first Debian archive among the machine's sources, in either format; None if there is
    none.
    """
    for file in sorted(etc.glob("sources.list.d/*.sources")):
        for block in file.read_text(errors="replace").split("\n\n"):
            uri = re.search(r"^URIs:\s*(\S+)", block, re.M)
            if (
                uri
                and re.search(r"^Suites:", block, re.M)
                and uri[1].rstrip("/").endswith("/debian")
            ):
                keyring = re.search(r"^Signed-By:\s*(/\S+)", block, re.M)
                return Mirror(uri[1], keyring[1] if keyring else None)
    for file in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
            found = re.match(
                r"^deb\s+(?:\[(?:.*?signed-by=(/[^\s\]]+))?[^\]]*\]\s+)?(\S+/debian/?)\s", line
            )
            if found:
                return Mirror(found[2], found[1])
    return None


def require_debian(etc: Path = ETC) -> Mirror:
    """Errors: InputError, one line, where packages cannot be fetched."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise InputError(
            f"{WITHOUT}, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not here; {ELSEWHERE}"
        )
    found = mirror(etc)
    if found is None:
        raise InputError(
            f"{WITHOUT}, and this machine's apt sources name no Debian archive; {ELSEWHERE}"
        )
    return found


def fetch(
    packages: Sequence[str],
    architecture: str,
    folder: Path,
    *,
    dependencies: bool,
    what: str,
    progress: Progress,
    release: str = RELEASE,
) -> list[Path]:
    """Download packages of a release and return the .deb files in `folder`; called again it goes on
    where it was interrupted.

    architecture: Debian's word (amd64, arm64). dependencies: also all that they depend on, as into
    an empty system. what: for the progress lines. Errors: InputError with apt's own reason.
    """
    source = require_debian()
    for name in ("lists/partial", "archives/partial", "state", "none"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state" / "status").touch()
    signed = f"[signed-by={source.keyring}] " if source.keyring else ""
    (folder / "sources.list").write_text(f"deb {signed}{source.uri} {release} main\n")
    settings = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "none",
        "Dir::Etc::preferences": folder / "none" / "preferences",
        "Dir::Etc::preferencesparts": folder / "none",
        "Dir::State": folder / "state",
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "state" / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Keep-Downloaded-Packages": "true",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
    }
    if os.geteuid() == 0:
        # apt would give its rights away and then could not write into a folder of root's.
        settings["APT::Sandbox::User"] = "root"
    flags = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    progress(0.0, f"reading Debian {release}'s list of {architecture} packages")
    _apt([*flags, "update"], folder, limit_s=300)
    wanted = (
        [*flags, "--yes", "--download-only", "install", *packages]
        if dependencies
        else [*flags, "download", *packages]
    )
    listed = _apt([*flags, "--print-uris", *wanted[len(flags) :]], folder, limit_s=60)
    sizes = {
        name: int(size) for name, size in re.findall(r"^'[^']+' (\S+\.deb) (\d+)", listed, re.M)
    }
    total = sum(sizes.values())
    home = folder / "archives"

    def watch() -> None:
        there = sum(
            file.stat().st_size
            for file in [*home.glob("*.deb"), *home.glob("partial/*")]
            if file.is_file()
        )
        progress(
            min(1.0, there / total) if total else 0.0,
            f"downloading {what}: {there / 1e6:.0f} of {total / 1e6:.0f} MB",
        )

    _apt(wanted, home, limit_s=3600, watch=watch)
    found = sorted(home.glob("*.deb"))
    if not found:
        raise InputError(
            f"Debian {release} gave no package for {', '.join(packages)} ({architecture}); look at the machine's apt sources"
        )
    return found


def unpack(package: Path, folder: Path) -> None:
    """The files of a .deb into a folder; none of its scripts run. Errors: InputError naming a
    damaged file.
    """
    done = subprocess.run(
        ["dpkg-deb", "-x", str(package), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InputError(
            f"{package.name}: cannot be unpacked ({' '.join(done.stderr.split())[-200:]}); prepare again"
        )


def _apt(
    arguments: list[str], folder: Path, *, limit_s: float, watch: Callable[[], None] | None = None
) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with subprocess.Popen(
        ["apt-get", "-q", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    ) as process:
        start = time.monotonic()
        while True:
            try:
                said, complained = process.communicate(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                if watch is not None:
                    watch()
                if time.monotonic() - start > limit_s:
                    process.kill()
                    raise InputError(
                        f"apt-get took more than {limit_s:.0f} s; look at the network, then prepare again: it goes on where it was"
                    ) from None
            except BaseException:
                process.kill()
                raise
    failed = [line for line in complained.splitlines() if line.startswith(("E:", "Err:"))]
    # `update` leaves with 0 where it could read nothing at all.
    unread = [line for line in complained.splitlines() if line.startswith("W: Failed to fetch")]
    if process.returncode != 0 or (unread and "update" in arguments):
        reason = (
            failed or unread or complained.splitlines() or [f"exit code {process.returncode}"]
        )[-1 if failed else 0]
        raise InputError(
            f"apt-get could not fetch what emulation needs: {' '.join(reason.split())[:300]}; look at the network, then prepare again"
        )
    return said
