"""Object files into the shared library that a device loads, by a linker for its architecture."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.cross_compiler import PACKAGE, machine_of, runs_here, zig_command
from ...core.errors import InputError

_PROGRAM_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
)
# Kernels of two models have the same names; with -Bsymbolic each model calls its own.
_PROGRAM_LIBRARIES = ("-Wl,-Bsymbolic", "-Wl,--as-needed", "-lpthread", "-lm")


@dataclass(frozen=True)
class Linker:
    """A C++ compiler that links for one architecture.

    Attributes:
        command: The command line that starts it.
        name: Its name and version, for the manifest.
    """

    command: tuple[str, ...]
    name: str

    def link_shared(self, objects: Sequence[Path], path: Path) -> None:
        """Link objects into a shared library; raises InputError with the linker's last line."""
        self._run(path, ["-shared", "-fPIC", "-o", str(path), *map(str, objects)], path.parent)

    def link_program(
        self, source: Path, objects: Sequence[Path], headers: Sequence[Path], path: Path
    ) -> None:
        """Compile a C++ source and link it into a shared library that needs only the C library.

        Args:
            source: The source.
            objects: Linked with it.
            headers: The folders of included files.
            path: The library.

        Raises:
            InputError: The compiler failed; the message contains its last line.
        """
        arguments = [
            *_PROGRAM_FLAGS,
            *(f"-I{folder}" for folder in headers),
            source.name,
            *(str(found.resolve()) for found in objects),
            "-o",
            str(path.resolve()),
            *_PROGRAM_LIBRARIES,
        ]
        self._run(path, arguments, source.parent)

    def _run(self, path: Path, arguments: list[str], folder: Path) -> None:
        done = subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InputError(
                f"{self.name} cannot link {path.name}: {' '.join(last.split())[:300]}; "
                "look at this machine's compilers"
            )


def linker_for(triple: str) -> Linker:
    """A linker for a triple: this machine's, a cross compiler with Debian's name, or zig.

    Raises:
        InputError: None is installed; the message contains what to install.
    """
    here = runs_here(triple)
    names = [f"{triple}-g++", f"{triple}-clang++"]
    if here:
        chosen = [os.environ["CXX"]] if os.environ.get("CXX") else []
        names = [*chosen, "g++", "clang++", "c++", *names]
    for name in names:
        if (found := shutil.which(name)) is not None:
            return Linker((found,), _with_version(name, found, "-dumpfullversion", "-dumpversion"))
    if importlib.util.find_spec(PACKAGE) is not None and "linux-gnu" in triple:
        start = zig_command(machine_of(triple), triple[triple.index("linux-gnu") :])
        # The source uses nothing of the C++ library, which zig would build for each target, a
        # minute of work.
        return Linker((*start, "-nostdlib++"), _with_version("zig c++", *start[:3], "version"))
    package = "g++" if here else f"g++-{triple.replace('_', '-')}"
    raise InputError(
        f"no linker for {triple} on this machine; "
        f"install one with `apt-get install {package}`, or with `pip install 'vitrim[zig]'`"
    )


def _with_version(name: str, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    base = Path(name).name
    return f"{base} {lines[0]}" if done.returncode == 0 and lines else base
