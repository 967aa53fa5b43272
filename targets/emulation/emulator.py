"""The prepared emulation on this machine, and the command line that runs an aarch64 program."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "VITRIM_EMULATION"
RECORD = "emulation.json"
SCHEMA = "vitrim.emulation/1"
# Variables of the host's environment that an emulated program must not inherit.
HIDDEN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONSTARTUP")
# Substitutes for cores that qemu lacks, by the instructions that runtimes select kernels by.
SUBSTITUTES = (("i8mm", "cortex-a710"), ("asimddp", "cortex-a76"), ("asimd", "cortex-a72"))


@dataclass(frozen=True)
class Emulator:
    """A prepared emulation.

    Attributes:
        qemu: The program qemu-aarch64.
        root: The root folder of the arm64 user land.
        python: The python3 in it.
        packages: The folders of the packages that this python3 imports.
        versions: Versions of qemu, python and each package.
        cpu: qemu's name of the emulated processor.
    """

    qemu: Path
    root: Path
    python: Path
    packages: tuple[Path, ...]
    versions: dict[str, str]
    cpu: str = "max"

    @property
    def name(self) -> str:
        """The title for measurements and messages: `qemu-aarch64 10.0.13 (cortex-a72)`."""
        return f"qemu-aarch64 {self.versions.get('qemu', '?')} ({self.cpu})"

    @property
    def onnxruntime_library(self) -> Path | None:
        """ONNX Runtime's C library for aarch64, from its wheel."""
        libraries = (
            found
            for folder in self.packages
            for found in sorted(folder.glob("onnxruntime/capi/libonnxruntime.so*"))
        )
        return next(libraries, None)

    def command(self, program: Sequence[str | Path]) -> list[str]:
        """Return the command line that runs an aarch64 program.

        A program called `python3` is that of the user land. Absolute paths are searched for in the
        user land first and then on this machine, so a program can read files of both.
        """
        first, *rest = [str(word) for word in program]
        hidden = [part for variable in HIDDEN for part in ("-U", variable)]
        paths = ["-E", f"PYTHONPATH={os.pathsep.join(map(str, self.packages))}"]
        executable = str(self.python) if first in ("python3", "python") else first
        qemu = [str(self.qemu), "-cpu", self.cpu, "-L", str(self.root)]
        return [*qemu, *hidden, *paths, executable, *rest]

    def like(self, cores: Sequence[str], features: Sequence[str] = ()) -> Emulator:
        """Return an emulator of the first of these cores (`Cortex-A72`) that qemu supports.

        Without one it is a core with the same instructions. A runtime then selects the kernels that
        it would select on the device.
        """
        supported = processors(self.qemu)
        names = [name for core in cores for name in re.findall(r"[a-z]+-[a-z]\d+", core.lower())]
        names += [cpu for feature, cpu in SUBSTITUTES if feature in features]
        return replace(self, cpu=next((name for name in names if name in supported), self.cpu))


def processors(qemu: Path) -> tuple[str, ...]:
    """Return the processors that this qemu can emulate."""
    done = subprocess.run(
        [str(qemu), "-cpu", "help"], capture_output=True, text=True, check=False, timeout=30
    )
    return tuple(word for line in done.stdout.splitlines()[1:] for word in line.split()[:1])


def emulation_folder() -> Path:
    """Return $VITRIM_EMULATION, else vitrim's folder for the emulation in the user's cache."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vitrim" / "emulation"


def ready() -> Emulator | None:
    """Return the prepared emulation, or None; starts no process and downloads nothing."""
    return read_record(emulation_folder())


def read_record(folder: Path) -> Emulator | None:
    """Return the emulation that a folder's record describes; None if any part of it is missing."""
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return None
    try:
        found = Emulator(
            qemu=folder / str(data["qemu"]),
            root=folder / str(data["root"]),
            python=folder / str(data["python"]),
            packages=tuple(folder / str(name) for name in data["packages"]),
            versions={str(key): str(value) for key, value in data["versions"].items()},
        )
    except (KeyError, TypeError, AttributeError):
        return None
    complete = (
        os.access(found.qemu, os.X_OK)
        and found.python.is_file()
        and all(path.is_dir() for path in found.packages)
    )
    return found if complete else None


def record_text(folder: Path, emulator: Emulator) -> str:
    """Return the text of a record; paths in the folder are relative, so that it can be moved."""

    def written(path: Path) -> str:
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    content: dict[str, Any] = {
        "schema": SCHEMA,
        "qemu": written(emulator.qemu),
        "root": written(emulator.root),
        "python": written(emulator.python),
        "packages": [written(path) for path in emulator.packages],
        "versions": emulator.versions,
    }
    return json.dumps(content, indent=1) + "\n"
