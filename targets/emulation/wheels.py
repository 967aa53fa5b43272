"""Download wheels for aarch64 with pip, and unpack them without installing them."""

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
from ...core.written_kinds import FolderKind

# Accepted versions of the C library; pip does not derive older tags from newer ones.
GLIBC_MINORS = (39, 36, 35, 34, 31, 28, 27, 26, 24, 17)
# A folder of vitrim's own cache, which another process may have written meanwhile.
UNPACKED = FolderKind("an unpacked wheel", "", lambda folder: {"**": None})
TAGS = (*(f"manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS), "manylinux2014_aarch64")


def wanted_version(distribution: str) -> str | None:
    """Return the version that is installed here, which results can be compared with, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install(
    distribution: str, version: str | None, python: str, folder: Path, *, only: Sequence[str] = ()
) -> None:
    """Unpack the aarch64 wheel of a distribution into a new folder.

    Args:
        distribution: Name of the distribution.
        version: Its version; where it has no wheel for that Python, the newest one is used.
        python: Version of Python, such as "3.13".
        folder: The folder to create.
        only: Prefixes of the paths to unpack; all of them by default.

    Raises:
        InputError: pip failed, or the wheel contains a path outside of its folder.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-wheel-") as name:
        try:
            wheel = _download(distribution, version, python, Path(name))
        except InputError:
            if version is None:
                raise
            wheel = _download(distribution, None, python, Path(name))
        with (
            replace_folder(folder, UNPACKED, overwrite=True) as new_folder,
            zipfile.ZipFile(wheel) as archive,
        ):
            for entry in archive.infolist():
                if entry.is_dir() or (only and not entry.filename.startswith(tuple(only))):
                    continue
                path = Path(entry.filename)
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(
                        f"{wheel.name}: contains the path {entry.filename!r}, which is outside of "
                        "its folder; it is refused"
                    )
                target = new_folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)


def unpacked_version(folder: Path) -> str:
    """Return the version of an unpacked wheel, from its .dist-info."""
    found = next(iter(sorted(folder.glob("*.dist-info"))), None)
    return (
        found.name.removesuffix(".dist-info").split("-")[1] if found and "-" in found.name else "?"
    )


def _download(distribution: str, version: str | None, python: str, folder: Path) -> Path:
    what = distribution if version is None else f"{distribution}=={version.split('+')[0]}"
    abis = (f"cp{python.replace('.', '')}", "abi3", "none")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary=:all:", "--disable-pip-version-check"),
        *("--python-version", python, "--implementation", "cp"),
        *(part for abi in abis for part in ("--abi", abi)),
        *(part for tag in TAGS for part in ("--platform", tag)),
        *("--dest", str(folder), what),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "No module named pip" in done.stderr:
        raise InputError(
            f"this Python has no pip to download {what} for aarch64; "
            f"run `{Path(sys.executable).name} -m ensurepip`, then prepare again"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or ["no wheel arrived"])[-1]
        raise InputError(
            f"pip could not download {what} for aarch64 and Python {python}: "
            f"{' '.join(reason.split())[:300]}; check the network"
        )
    return wheels[0]
