"""Wheels of another architecture, downloaded by pip and unpacked aside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_folder

# What a wheel may ask of the system's C library; pip does not derive the older names from the newer
# ones.
GLIBC_MINORS = (39, 36, 35, 34, 31, 28, 27, 26, 24, 17)
TAGS = (*(f"manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS), "manylinux2014_aarch64")


def wanted_version(distribution: str) -> str | None:
    """The version that this machine runs, so that like is compared with like; None where it is not
    installed.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install(
    distribution: str, version: str | None, python: str, folder: Path, *, only: Sequence[str] = ()
) -> None:
    """Unpack the aarch64 wheel of a distribution for `python` ("3.13") into a new `folder`.

    only: name the parts that are wanted (paths that begin so); everything by default. A version
    without a wheel for that Python falls back to the newest that has one. Errors: InputError with
    pip's own reason.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-wheel-") as name:
        try:
            wheel = _download(distribution, version, python, Path(name))
        except InputError:
            if version is None:
                raise
            wheel = _download(distribution, None, python, Path(name))
        with replace_folder(folder, overwrite=True) as aside, zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or (only and not entry.filename.startswith(tuple(only))):
                    continue
                path = Path(entry.filename)
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(
                        f"{wheel.name}: holds the path {entry.filename!r}, which leads out of its folder; it is refused"
                    )
                place = aside / path
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, place.open("wb") as stream:
                    shutil.copyfileobj(source, stream)


def unpacked_version(folder: Path) -> str:
    """The version of what `install` unpacked, by its .dist-info."""
    found = next(iter(sorted(folder.glob("*.dist-info"))), None)
    return (
        found.name.removesuffix(".dist-info").split("-")[1] if found and "-" in found.name else "?"
    )


def _download(distribution: str, version: str | None, python: str, folder: Path) -> Path:
    what = distribution if version is None else f"{distribution}=={version.split('+')[0]}"
    tags = [part for tag in TAGS for part in ("--platform", tag)]
    digits = python.replace(".", "")
    command = [
        *(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
        ),
        *(
            "--python-version",
            python,
            "--implementation",
            "cp",
            "--abi",
            f"cp{digits}",
            "--abi",
            "abi3",
            "--abi",
            "none",
            *tags,
        ),
        *("--dest", str(folder), what),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "No module named pip" in done.stderr:
        raise InputError(
            f"this Python has no pip to fetch {what} for aarch64; run `{Path(sys.executable).name} -m ensurepip`, then prepare again"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["no wheel came"]
        )
        raise InputError(
            f"pip could not fetch {what} for aarch64 and Python {python}: {' '.join(reasons[-1].split())[:300]}; look at the network"
        )
    return wheels[0]
