"""The folder of `onnxruntime_c_api.h`; Debian's copy is fetched into a cache where it is absent."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from vitrim.core.errors import InputError
from vitrim.targets.emulation import debian

HEADER = "onnxruntime_c_api.h"
PACKAGE = "libonnxruntime-dev"
NO_HEADER = (
    "onnxruntime_c_api.h is not here and could not be fetched: "
    "set ONNXRUNTIME_INCLUDE to its folder"
)
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitrim" / "onnxruntime-header"
)


def header_folder() -> Path | None:
    """Return the folder of the header, or None if it is not available here."""
    places = (
        [Path(os.environ["ONNXRUNTIME_INCLUDE"])] if "ONNXRUNTIME_INCLUDE" in os.environ else []
    )
    for place in [
        *places,
        Path("/usr/include/onnxruntime"),
        Path("/usr/local/include/onnxruntime"),
        CACHE,
    ]:
        found = sorted(place.rglob(HEADER)) if place.is_dir() else []
        if found:
            return found[0].parent
    try:
        return _fetch()
    except (InputError, OSError, subprocess.SubprocessError):
        return None


def _fetch() -> Path | None:
    """Download the package and unpack it without installing it."""
    debian.require_debian()
    here = subprocess.run(
        ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()
    aside = CACHE / "apt"
    for package in debian.fetch(
        [PACKAGE],
        here,
        aside,
        dependencies=False,
        what="a header",
        progress=lambda share, text: None,
    ):
        debian.unpack(package, CACHE / "unpacked")
    shutil.rmtree(aside)
    found = sorted(CACHE.rglob(HEADER))
    return found[0].parent if found else None
