"""What was prepared for running aarch64 programs here, and the command line that runs one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .place import place

RECORD = "emulation.json"
SCHEMA = "vitrim.emulation/1"
# What the host's environment must not tell a program of the other architecture.
HIDDEN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONSTARTUP")
# Cores that qemu does not know, by the instructions that a runtime chooses its kernels by.
STAND_INS = (("i8mm", "cortex-a710"), ("asimddp", "cortex-a76"), ("asimd", "cortex-a72"))


@dataclass(frozen=True)
class Emulator:
    """qemu-aarch64, a user land (`root`) with its python3 (`python`), and the folders of the
    packages that python imports.

    versions: of qemu, python and each package. cpu: the processor that is emulated, in qemu's
    words.
    """

    qemu: Path
    root: Path
    python: Path
    packages: tuple[Path, ...]
    versions: dict[str, str]
    cpu: str = "max"

    @property
    def name(self) -> str:
        """For measurements and messages: `qemu-aarch64 10.0.13 (cortex-a72)`."""
        return f"qemu-aarch64 {self.versions.get('qemu', '?')} ({self.cpu})"

    @property
    def tvm_library(self) -> Path | None:
        """The folder of libtvm_runtime.so for aarch64, where that was prepared."""
        return next(
            (
                folder / "tvm" / "lib"
                for folder in self.packages
                if (folder / "tvm" / "lib" / "libtvm_runtime.so").is_file()
            ),
            None,
        )

    @property
    def onnxruntime_library(self) -> Path | None:
        """ONNX Runtime's C library for aarch64, as its wheel carries it."""
        return next(
            (
                found
                for folder in self.packages
                for found in sorted(folder.glob("onnxruntime/capi/libonnxruntime.so*"))
            ),
            None,
        )

    def command(self, program: Sequence[str | Path]) -> list[str]:
        """The command line that runs an aarch64 program here; `python3` as its first word is the
        user land's.

        Absolute paths are looked for in the user land first and then on this machine, so that a
        program reads files of both.
        """
        first, *rest = [str(word) for word in program]
        hidden = [part for variable in HIDDEN for part in ("-U", variable)]
        paths = ["-E", f"PYTHONPATH={os.pathsep.join(map(str, self.packages))}"]
        executable = str(self.python) if first in ("python3", "python") else first
        return [
            str(self.qemu),
            "-cpu",
            self.cpu,
            "-L",
            str(self.root),
            *hidden,
            *paths,
            executable,
            *rest,
        ]

    def as_cpu(self, cpu: str) -> Emulator:
        """The same, emulating another processor."""
        return Emulator(self.qemu, self.root, self.python, self.packages, self.versions, cpu)

    def like(self, cores: Sequence[str], features: Sequence[str] = ()) -> Emulator:
        """The same, emulating the first of the named cores (`Cortex-A72`) that qemu knows, else one
        with the same instructions.

        A runtime then chooses the kernels that it would choose on that device.
        """
        known = processors(self.qemu)
        words = [word for core in cores for word in re.findall(r"[a-z]+-[a-z]\d+", core.lower())]
        stand_ins = [cpu for feature, cpu in STAND_INS if feature in features]
        return self.as_cpu(next((word for word in [*words, *stand_ins] if word in known), self.cpu))


def processors(qemu: Path) -> tuple[str, ...]:
    """The processors that this qemu can be."""
    done = subprocess.run(
        [str(qemu), "-cpu", "help"], capture_output=True, text=True, check=False, timeout=30
    )
    return tuple(word for line in done.stdout.splitlines()[1:] for word in line.split()[:1])


def ready() -> Emulator | None:
    """What was prepared here, or None. Starts no process and downloads nothing."""
    return read(place())


def read(folder: Path) -> Emulator | None:
    """The emulator that a folder's record describes; None where there is none, or a part of it is
    gone.
    """
    try:
        told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        return None
    try:
        found = Emulator(
            qemu=folder / str(told["qemu"]),
            root=folder / str(told["root"]),
            python=folder / str(told["python"]),
            packages=tuple(folder / str(name) for name in told["packages"]),
            versions={str(key): str(value) for key, value in told["versions"].items()},
        )
    except (KeyError, TypeError, AttributeError):
        return None
    whole = (
        os.access(found.qemu, os.X_OK)
        and found.python.is_file()
        and all(path.is_dir() for path in found.packages)
    )
    return found if whole else None


def record(folder: Path, emulator: Emulator) -> str:
    """The text of the record: paths within the folder are told relative to it, so that it can be
    moved.
    """

    def told(path: Path) -> str:
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    content: dict[str, Any] = {
        "schema": SCHEMA,
        "qemu": told(emulator.qemu),
        "root": told(emulator.root),
        "python": told(emulator.python),
        "packages": [told(path) for path in emulator.packages],
        "versions": emulator.versions,
    }
    return json.dumps(content, indent=1) + "\n"
