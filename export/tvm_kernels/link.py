"""Objects of machine code into the shared library that a device loads: a linker of the device's
architecture.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InputError
from ...core.cross_compiler import PACKAGE, zig_command

# `x86_64-linux-gnu` without what names no machine: Debian's cross compilers carry it so.
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Linker:
    """A C++ compiler that links for one architecture: the words that start it, and its name and
    release for the manifest.
    """

    command: tuple[str, ...]
    name: str

    def shared(self, objects: Sequence[Path], path: Path) -> None:
        """Link `path`. Errors: InputError with the linker's last words."""
        self._run(path, ["-shared", "-fPIC", "-o", str(path), *map(str, objects)], path.parent)

    def program(self, source: Path, objects: Sequence[Path], headers: Path, path: Path) -> None:
        """Compile one C++ source and link it with `objects` into a shared library that needs
        nothing but the C library. Errors: InputError.
        """
        # Kernels of two models have the same names, and each model must call its own.
        flags = [
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-fno-exceptions",
            "-fno-rtti",
            f"-I{headers}",
        ]
        libraries = ["-Wl,-Bsymbolic", "-Wl,--as-needed", "-lpthread", "-lm"]
        self._run(
            path,
            [
                *flags,
                source.name,
                *(str(found.resolve()) for found in objects),
                "-o",
                str(path.resolve()),
                *libraries,
            ],
            source.parent,
        )

    def _run(self, path: Path, words: list[str], folder: Path) -> None:
        done = subprocess.run(
            [*self.command, *words], capture_output=True, text=True, check=False, cwd=folder
        )
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InputError(
                f"{self.name} cannot link {path.name}: {' '.join(said.split())[:300]}; look at this machine's compilers"
            )


def machine_of(triple: str) -> str:
    """The processor of a triple, such as `aarch64`."""
    first = triple.split("-")[0].lower()
    return MACHINES.get(first, first)


def is_here(triple: str) -> bool:
    """Whether programs of the triple start on this machine itself."""
    here = platform.machine().lower()
    return (
        machine_of(triple) == MACHINES.get(here, here)
        and "android" not in triple
        and sys.platform == "linux"
    )


def linker_for(triple: str) -> Linker:
    """A linker for a triple: this machine's, a cross compiler as Debian names them, or the
    `ziglang` package. Errors: InputError with what to install.
    """
    names = [f"{triple}-g++", f"{triple}-clang++"]
    if is_here(triple):
        names = [
            *([os.environ["CXX"]] if os.environ.get("CXX") else []),
            "g++",
            "clang++",
            "c++",
            *names,
        ]
    for name in names:
        if (found := shutil.which(name)) is not None:
            return Linker((found,), _named(name, [found, "-dumpfullversion", "-dumpversion"]))
    if importlib.util.find_spec(PACKAGE) is not None and "linux-gnu" in triple:
        start = zig_command(machine_of(triple), triple[triple.index("linux-gnu") :])
        # The source takes nothing of the C++ library, which zig would build anew for each target, a
        # minute of work.
        return Linker((*start, "-nostdlib++"), _named("zig c++", [*start[:3], "version"]))
    package = "g++" if is_here(triple) else f"g++-{triple.replace('_', '-')}"
    raise InputError(
        f"no linker for {triple} on this machine; install one with `apt-get install {package}`, or with `pip install 'vitrim[zig]'`"
    )


def _named(name: str, ask: list[str]) -> str:
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    release = done.stdout.strip().splitlines()
    return (
        f"{Path(name).name} {release[0]}" if done.returncode == 0 and release else Path(name).name
    )
