"""The runner for a device that has no Python: native/ compiled for the device's processor, and ONNX
Runtime's shared library for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_folder
from ...core.cross_compiler import PACKAGE, zig_command

SOURCES = Path(__file__).parents[1] / "native"
PROGRAM = "vitrim_runner"
LIBRARY = "libonnxruntime.so"
# Debian's names of the cross compilers; another one is named by VITRIM_CXX_<ARCHITECTURE>.
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
# (processor, system) in zig's words.
ZIG = {
    "x86_64": ("x86_64", "linux-gnu"),
    "aarch64": ("aarch64", "linux-gnu"),
    "armv7l": ("arm", "linux-gnueabihf"),
}
# The device may have no libstdc++, or an older one. -s: names for a debugger are most of a small
# program's bytes.
FLAGS = ("-std=c++17", "-O2", "-s", "-static-libstdc++", "-static-libgcc")


@dataclass(frozen=True)
class NativeRunner:
    """A runner and the runtime that it opens, both for one kind of device."""

    program: Path
    library: Path

    def command(self, program: str | None = None, library: str | None = None) -> list[str]:
        """The command line that takes a job on standard input; the paths on the device stand for
        those here.
        """
        return [program or str(self.program), library or str(self.library), "-"]


def native_runner(
    architecture: str | None = None,
    *,
    program: Path | str | None = None,
    library: Path | str | None = None,
    android: bool = False,
) -> NativeRunner:
    """The runner for a device, built at its first use and kept in the user's cache. `architecture`
    as `uname -m` tells it, this machine's by default.

    program, library: files to take instead. Errors: InputError naming the compiler, or the library,
    that is missing.
    """
    machine = {"arm64": "aarch64", "amd64": "x86_64", "AMD64": "x86_64"}.get(
        wanted := architecture or platform.machine(), wanted
    )
    for label, given in (("--runner-file", program), ("--runtime-library", library)):
        if given is not None and not Path(given).is_file():
            raise InputError(f"{label} {given}: no such file")
    if android and (program is None or library is None):
        raise InputError(
            "an Android device runs neither Python nor a Linux program as they are: build bench/native with the NDK (its README says how), take "
            "libonnxruntime.so from the onnxruntime-android package, and name both with --runner-file and --runtime-library"
        )
    built = Path(program) if program is not None else compiled(machine)
    return NativeRunner(
        built.resolve(),
        (Path(library) if library is not None else runtime_library(machine)).resolve(),
    )


def compiled(machine: str) -> Path:
    """The program for `machine`, compiled if the cache has none of these very sources. Errors:
    InputError with the compiler's first complaint.
    """
    compiler = _compiler(machine)
    seal = hashlib.sha256(" ".join(("1", *compiler, *FLAGS)).encode())
    for source in sorted(SOURCES.glob("*.[hc]*")):
        seal.update(source.read_bytes())
    folder = cache() / f"runner-{machine}-{seal.hexdigest()[:16]}"
    program = folder / PROGRAM
    if not program.is_file():
        with replace_folder(folder, overwrite=True) as aside:
            command = [
                *compiler,
                *FLAGS,
                str(SOURCES / "runner.cpp"),
                "-o",
                str(aside / PROGRAM),
                "-ldl",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                complaint = next(
                    (line for line in done.stderr.splitlines() if "error" in line),
                    done.stderr.strip()[-200:],
                )
                raise InputError(
                    f"{' '.join(compiler)} cannot build the native runner: {complaint}; it needs C++17 (g++ 8 or newer)"
                )
    return program


def runtime_library(machine: str) -> Path:
    """ONNX Runtime's C library for `machine`: out of the wheel that is installed here, or of the
    one that pip has for that processor.
    """
    if machine == platform.machine():
        found = importlib.util.find_spec("onnxruntime")
        libraries = (
            sorted(Path(found.origin).parent.glob(f"capi/{LIBRARY}*"))
            if found and found.origin
            else []
        )
        if libraries:
            return libraries[0]
        raise InputError(
            "onnxruntime is not installed here, so its library cannot be sent; `pip install onnxruntime`, or name --runtime-library"
        )
    if machine != "aarch64":
        raise InputError(
            f"onnxruntime has no wheel for {machine}; build its library for the device, and name it with --runtime-library"
        )
    from ..emulation import wheels

    version = wheels.wanted_version("onnxruntime")
    folder = cache() / f"onnxruntime-{machine}-{version or 'newest'}"
    if not folder.is_dir():
        # Only the C library is taken out of it, so any Python's wheel will do.
        wheels.install(
            "onnxruntime",
            version,
            "3.13",
            folder,
            only=(f"onnxruntime/capi/{LIBRARY}", "onnxruntime-"),
        )
    libraries = sorted(folder.glob(f"onnxruntime/capi/{LIBRARY}*"))
    if not libraries:
        raise InputError(
            f"onnxruntime's wheel for {machine} carries no {LIBRARY}; name one with --runtime-library"
        )
    return libraries[0]


def cache() -> Path:
    """vitrim's folder for what it has built, within the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vitrim" / "native"


def _compiler(machine: str) -> tuple[str, ...]:
    variable = f"VITRIM_CXX_{machine.upper()}"
    names = [os.environ[variable]] if variable in os.environ else []
    names += (
        ["g++", "c++", "clang++"]
        if machine == platform.machine()
        else [COMPILERS.get(machine, f"{machine}-linux-gnu-g++")]
    )
    for name in names:
        if found := shutil.which(name):
            return (found,)
    if machine in ZIG and importlib.util.find_spec(PACKAGE) is not None:
        return zig_command(*ZIG[machine])
    package = (
        "g++"
        if machine == platform.machine()
        else PACKAGES.get(machine, f"a C++ compiler for {machine}")
    )
    raise InputError(
        f"no C++ compiler for {machine} here ({', '.join(names)}), and the device has no Python: install one (Debian: apt-get install {package}; or "
        f"pip install 'vitrim[zig]'), name one in {variable}, or put Python with onnxruntime on the device"
    )
