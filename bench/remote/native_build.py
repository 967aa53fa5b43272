"""Build the runner for a device without Python: `native/` compiled, and ONNX Runtime's library."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...core.cross_compiler import PACKAGE, zig_command
from ...core.errors import InputError
from ...core.storage import replace_folder
from ...core.written_kinds import FolderKind
from ...targets.instruction_sets import HEADER as CPU_HEADER

SOURCES = Path(__file__).parents[1] / "native"
PROGRAM = "vitrim_runner"
LIBRARY = "libonnxruntime.so"
# A folder of vitrim's own cache, which another process may have written meanwhile.
BUILT = FolderKind("a built runner", PROGRAM, lambda folder: {PROGRAM: None})
# Debian's names of the cross compilers; VITRIM_CXX_<ARCHITECTURE> names another one.
COMPILERS = {
    "x86_64": "x86_64-linux-gnu-g++",
    "aarch64": "aarch64-linux-gnu-g++",
    "armv7l": "arm-linux-gnueabihf-g++",
}
PACKAGES = {
    "x86_64": "g++-x86-64-linux-gnu",
    "aarch64": "g++-aarch64-linux-gnu",
    "armv7l": "g++-arm-linux-gnueabihf",
}
# zig's names of (processor, system).
ZIG = {
    "x86_64": ("x86_64", "linux-gnu"),
    "aarch64": ("aarch64", "linux-gnu"),
    "armv7l": ("arm", "linux-gnueabihf"),
}
# The device may have no libstdc++, or an older one. -s removes the symbols, which are most of a
# small program.
FLAGS = ("-std=c++17", "-O2", "-s", "-static-libstdc++", "-static-libgcc")


@dataclass(frozen=True)
class NativeRunner:
    """A runner program and the runtime library that it opens, both for one kind of device."""

    program: Path
    library: Path

    def command(self, program: str | None = None, library: str | None = None) -> list[str]:
        """Return the command line that reads a job from standard input.

        program, library: Paths on the device, in place of those on this machine.
        """
        return [program or str(self.program), library or str(self.library), "-"]


def native_runner(
    architecture: str | None = None,
    *,
    program: Path | str | None = None,
    library: Path | str | None = None,
    android: bool = False,
) -> NativeRunner:
    """Return the runner for a device, built at its first use and kept in the user's cache.

    Args:
        architecture: The device's `uname -m`, by default this machine's.
        program: A runner to use instead of a built one.
        library: A runtime library to use instead of that of the wheel.
        android: Whether the device runs Android, for which nothing can be built here.

    Raises:
        InputError: The compiler or the library is missing, or a named file does not exist.
    """
    wanted = architecture or platform.machine()
    aliases = {"arm64": "aarch64", "amd64": "x86_64", "AMD64": "x86_64"}
    machine = aliases.get(wanted, wanted)
    for label, given in (("--runner-file", program), ("--runtime-library", library)):
        if given is not None and not Path(given).is_file():
            raise InputError(f"{label} {given}: no such file")
    if android and (program is None or library is None):
        raise InputError(
            "an Android device runs neither Python nor an ordinary Linux program: build "
            "bench/native with the NDK (see its README), take libonnxruntime.so from the "
            "onnxruntime-android package, and name both with --runner-file and --runtime-library"
        )
    built = compile_runner(machine) if program is None else Path(program)
    found = runtime_library(machine) if library is None else Path(library)
    return NativeRunner(built.resolve(), found.resolve())


def compile_runner(machine: str) -> Path:
    """Compile the runner for a processor, unless the cache has it, and return the program.

    The cache is keyed by sources, compiler and flags. Raises InputError with the first error of the
    compiler.
    """
    compiler = _compiler(machine)
    digest = hashlib.sha256(" ".join(("1", *compiler, *FLAGS)).encode())
    for source in [*sorted(SOURCES.glob("*.[hc]*")), CPU_HEADER]:
        digest.update(source.read_bytes())
    folder = cache() / f"runner-{machine}-{digest.hexdigest()[:16]}"
    program = folder / PROGRAM
    if not program.is_file():
        with replace_folder(folder, BUILT, overwrite=True) as new_folder:
            main_file, output = str(SOURCES / "runner.cpp"), str(new_folder / PROGRAM)
            include = f"-I{CPU_HEADER.parent}"
            command = [*compiler, *FLAGS, include, main_file, "-o", output, "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                message = errors[0] if errors else done.stderr.strip()[-200:]
                raise InputError(
                    f"{' '.join(compiler)} cannot build the native runner: {message}; "
                    "it needs C++17 (g++ 8 or newer)"
                )
    return program


def runtime_library(machine: str) -> Path:
    """Return ONNX Runtime's C library for a processor, from its wheel.

    It is the installed wheel for this machine's processor, else one that pip downloads. Raises
    InputError where there is none.
    """
    if machine == platform.machine():
        return _installed_library()
    if machine != "aarch64":
        raise InputError(
            f"onnxruntime has no wheel for {machine}; build its library for the device, "
            "and name it with --runtime-library"
        )
    from ...targets.emulation import wheels

    version = wheels.wanted_version("onnxruntime")
    folder = cache() / f"onnxruntime-{machine}-{version or 'newest'}"
    if not folder.is_dir():
        # Only the C library is extracted, so the wheel of any Python version will do.
        parts = (f"onnxruntime/capi/{LIBRARY}", "onnxruntime-")
        wheels.install("onnxruntime", version, "3.13", folder, only=parts)
    libraries = sorted(folder.glob(f"onnxruntime/capi/{LIBRARY}*"))
    if not libraries:
        raise InputError(
            f"onnxruntime's wheel for {machine} contains no {LIBRARY}; "
            "name one with --runtime-library"
        )
    return libraries[0]


def _installed_library() -> Path:
    found = importlib.util.find_spec("onnxruntime")
    if found and found.origin:
        libraries = sorted(Path(found.origin).parent.glob(f"capi/{LIBRARY}*"))
        if libraries:
            return libraries[0]
    raise InputError(
        "onnxruntime is not installed here, so its library cannot be sent; "
        "`pip install onnxruntime`, or name --runtime-library"
    )


def cache() -> Path:
    """Return vitrim's folder for built programs, within the user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "vitrim" / "native"


def _compiler(machine: str) -> tuple[str, ...]:
    native = machine == platform.machine()
    variable = f"VITRIM_CXX_{machine.upper()}"
    names = [os.environ[variable]] if variable in os.environ else []
    cross = COMPILERS.get(machine, f"{machine}-linux-gnu-g++")
    names += ["g++", "c++", "clang++"] if native else [cross]
    for name in names:
        if found := shutil.which(name):
            return (found,)
    if machine in ZIG and importlib.util.find_spec(PACKAGE) is not None:
        return zig_command(*ZIG[machine])
    package = "g++" if native else PACKAGES.get(machine, f"a C++ compiler for {machine}")
    raise InputError(
        f"no C++ compiler for {machine} here ({', '.join(names)}), and the device has no Python: "
        f"install one (Debian: apt-get install {package}; or pip install 'vitrim[zig]'), "
        f"name one in {variable}, or put Python with onnxruntime on the device"
    )
