"""Where `onnxruntime_c_api.h` lies, fetching Debian's copy into a cache of our own if it lies nowhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

HEADER = "onnxruntime_c_api.h"
# The release that has the package; older machines take it from there, unpacked aside and not installed.
RELEASE = "trixie"
PACKAGE = "libonnxruntime-dev"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitrim" / "onnxruntime-header"


def header_folder() -> Path | None:
    """The folder of the header, or None if it is not to be had here."""
    places = [Path(os.environ["ONNXRUNTIME_INCLUDE"])] if "ONNXRUNTIME_INCLUDE" in os.environ else []
    for place in [*places, Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime"), CACHE]:
        found = sorted(place.rglob(HEADER)) if place.is_dir() else []
        if found:
            return found[0].parent
    try:
        return _fetch()
    except (OSError, subprocess.SubprocessError):
        return None


def _fetch() -> Path | None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    root = CACHE / "apt"
    for folder in ("lists/partial", "archives/partial", "sources.d", "state"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "state" / "status").touch()
    uris, keyring = _debian_mirror()
    if not uris:
        return None
    signed = f" [signed-by={keyring}]" if keyring else ""
    (root / "sources.list").write_text(f"deb{signed} {uris} {RELEASE} main\n")
    options = [
        f"Dir::Etc::sourcelist={root}/sources.list", f"Dir::Etc::sourceparts={root}/sources.d", f"Dir::State::lists={root}/lists",
        f"Dir::State::status={root}/state/status", f"Dir::Cache={root}", f"Dir::Cache::archives={root}/archives", "APT::Sandbox::User=root",
        "Acquire::Languages=none", "Acquire::Retries=1",
    ]  # fmt: skip
    flags = [part for option in options for part in ("-o", option)]
    subprocess.run(["apt-get", *flags, "-q", "update"], check=True, capture_output=True, timeout=120)
    subprocess.run(["apt-get", *flags, "-q", "download", PACKAGE], check=True, capture_output=True, timeout=60, cwd=root)
    for package in root.glob(f"{PACKAGE}_*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(CACHE / "unpacked")], check=True, capture_output=True, timeout=60)
    shutil.rmtree(root)
    found = sorted(CACHE.rglob(HEADER))
    return found[0].parent if found else None


def _debian_mirror() -> tuple[str | None, str | None]:
    """The mirror that this machine's own sources name, and its keyring."""
    for file in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        for block in file.read_text().split("\n\n"):
            suites, uris = re.search(r"^Suites:(.*)$", block, re.M), re.search(r"^URIs:\s*(\S+)", block, re.M)
            if suites and uris and uris[1].rstrip("/").endswith("/debian"):
                keyring = re.search(r"^Signed-By:\s*(\S+)", block, re.M)
                return uris[1], keyring[1] if keyring else None
    for file in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt").glob("sources.list.d/*.list"))]:
        if not file.is_file():
            continue
        for line in file.read_text().splitlines():
            found = re.match(r"^deb\s+(?:\[.*?signed-by=([^\s\]]+).*?\]\s+)?(\S+/debian/?)\s", line)
            if found:
                return found[2], found[1]
    return None, None
