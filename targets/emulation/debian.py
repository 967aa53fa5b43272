"""Download and unpack packages of a Debian release and architecture, without installing them.

The source is the machine's own archive with another release, and apt checks its signatures as
usual. No root privileges are needed.
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
from ...core.progress import Progress

RELEASE = "trixie"
ETC = Path("/etc/apt")
NEEDS_APT = "aarch64 emulation downloads its parts with Debian's apt-get"
OTHER_SYSTEMS = (
    "on another system name an aarch64 root folder with python3 in VITRIM_AARCH64_ROOT, "
    "and qemu 10 or newer in VITRIM_QEMU_AARCH64"
)


@dataclass(frozen=True)
class Mirror:
    """The Debian archive of this machine, and its keyring (None: apt's default)."""

    uri: str
    keyring: str | None


def mirror(etc: Path = ETC) -> Mirror | None:
    """Return the first Debian archive among apt's sources, in either format, or None."""
    for file in sorted(etc.glob("sources.list.d/*.sources")):
        for block in file.read_text(errors="replace").split("\n\n"):
            uri = re.search(r"^URIs:\s*(\S+/debian/?)(?!\S)", block, re.M)
            if uri and re.search(r"^Suites:", block, re.M):
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
    """Return the Debian archive of this machine; raises InputError where there is none."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise InputError(
            f"{NEEDS_APT}, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            f"not here; {OTHER_SYSTEMS}"
        )
    found = mirror(etc)
    if found is None:
        raise InputError(
            f"{NEEDS_APT}, and this machine's apt sources name no Debian archive; {OTHER_SYSTEMS}"
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
    """Download packages; a second call continues an interrupted one.

    Args:
        packages: Names of the packages.
        architecture: Debian's name of it (amd64, arm64).
        folder: The folder for apt's state and the downloads.
        dependencies: Also download all that they depend on, as for an empty system.
        what: What is downloaded, for the progress.
        progress: Called with the share done (0 to 1) and a text.
        release: Name of the Debian release.

    Returns:
        The .deb files.

    Raises:
        InputError: There is no Debian archive, or apt failed; the message contains its reason.
    """
    flags = _private_apt(require_debian(), folder, architecture, release)
    progress(0.0, f"reading Debian {release}'s list of {architecture} packages")
    _apt([*flags, "update"], folder, limit_s=300)
    action = ["--yes", "--download-only", "install"] if dependencies else ["download"]
    listed = _apt([*flags, "--print-uris", *action, *packages], folder, limit_s=60)
    sizes = dict(re.findall(r"^'[^']+' (\S+\.deb) (\d+)", listed, re.M))
    total = sum(int(size) for size in sizes.values())
    archives = folder / "archives"

    def watch() -> None:
        files = [*archives.glob("*.deb"), *archives.glob("partial/*")]
        done = sum(file.stat().st_size for file in files if file.is_file())
        share = min(1.0, done / total) if total else 0.0
        progress(share, f"downloading {what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    _apt([*flags, *action, *packages], archives, limit_s=3600, watch=watch)
    found = sorted(archives.glob("*.deb"))
    if not found:
        raise InputError(
            f"Debian {release} gave no package for {', '.join(packages)} ({architecture}); "
            "check the machine's apt sources"
        )
    return found


def _private_apt(source: Mirror, folder: Path, architecture: str, release: str) -> list[str]:
    """Set up apt's state in a folder, and return the options that make apt use only that."""
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
        # As its own user, apt could not write into a folder of root's.
        settings["APT::Sandbox::User"] = "root"
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def unpack(package: Path, folder: Path) -> None:
    """Unpack the files of a .deb into a folder, without running its scripts.

    Raises InputError for a damaged file.
    """
    done = subprocess.run(
        ["dpkg-deb", "-x", str(package), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InputError(
            f"{package.name}: cannot be unpacked ({' '.join(done.stderr.split())[-200:]}); "
            "prepare again"
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
                stdout, stderr = process.communicate(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                if watch is not None:
                    watch()
                if time.monotonic() - start > limit_s:
                    process.kill()
                    raise InputError(
                        f"apt-get took more than {limit_s:.0f} s; check the network, then prepare "
                        "again: it continues where it was"
                    ) from None
            except BaseException:
                process.kill()
                raise
    failed = [line for line in stderr.splitlines() if line.startswith(("E:", "Err:"))]
    # `update` returns 0 even where it could read nothing at all.
    unread = [line for line in stderr.splitlines() if line.startswith("W: Failed to fetch")]
    if process.returncode != 0 or (unread and "update" in arguments):
        other = unread or stderr.splitlines() or [f"exit code {process.returncode}"]
        reason = failed[-1] if failed else other[0]
        raise InputError(
            "apt-get could not fetch what emulation needs: "
            f"{' '.join(reason.split())[:300]}; check the network, then prepare again"
        )
    return stdout
