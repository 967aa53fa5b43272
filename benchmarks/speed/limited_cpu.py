"""Run a command with runtime libraries limited to AVX2: `python -m benchmarks.speed.limited_cpu`.

    python -m benchmarks.speed.limited_cpu onnxruntime [PACKAGE ...] -- python -m MODULE ARGS

Libraries such as ONNX Runtime choose their kernels by the CPUID instruction and have no switch, and
many kernels refuse to trap it (arch_prctl ARCH_SET_CPUID). So the command gets a private copy of
each Python package, in a temporary folder that is removed afterwards, in which every `cpuid`
instruction is replaced by `ud2`; a preloaded library (masked_cpuid.c) handles the signal and
returns what the processor reports without AVX-512, AMX, VNNI, AVX-VNNI and BF16. Code that an
ordinary run would choose on an AVX2 machine runs then, on this machine's caches and clock: it is
not an AVX2 machine. Needs Linux on x86-64, a C compiler and objdump.

The C library's own functions, torch's and oneDNN's are limited by their variables.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitrim.core.errors import InputError

HERE = Path(__file__).parent
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
# Set for the command, so that a benchmark knows which packages are limited.
LIMITED = "VITRIM_BENCHMARK_LIMITED"
VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ",
}


@contextmanager
def limited_environment(packages: Sequence[str]) -> Iterator[dict[str, str]]:
    """Environment variables under which Python imports limited copies of packages.

    Args:
        packages: Names of installed packages.

    Raises:
        InputError: A package is not installed, or has no `cpuid` instruction.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-limited-") as name:
        folder = Path(name)
        for package in packages:
            if copy_limited(package, folder) == 0:
                raise InputError(f"{package}: no library of it executes cpuid; leave it out")
        library = compile_handler(folder)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {
            **os.environ,
            **VARIABLES,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": os.pathsep.join(paths),
            LIMITED: " ".join(packages),
        }


def copy_limited(package: str, folder: Path) -> int:
    """Copy a package and replace the `cpuid` instructions of its libraries.

    Returns:
        How many instructions were replaced.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"{package}: no such package is installed")
    source = Path(found.submodule_search_locations[0])
    copy = folder / package
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return sum(patch(path) for path in copy.rglob("*") if is_library(path))


def is_library(path: Path) -> bool:
    """Whether a file is an ELF shared object."""
    if path.is_symlink() or not path.is_file() or ".so" not in path.name:
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def patch(path: Path) -> int:
    """Replace every `cpuid` instruction of a shared object by `ud2`.

    The instructions are found by disassembly: their two bytes occur within others too.

    Raises:
        InputError: The file's bytes differ from the disassembly.
    """
    done = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-w", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    addresses = [
        int(match[1], 16)
        for match in re.finditer(r"^\s*([0-9a-f]+):\s+cpuid\s*$", done.stdout, re.MULTILINE)
    ]
    if not addresses:
        return 0
    content = bytearray(path.read_bytes())
    segments = list(load_segments(content))
    for address in addresses:
        offset = next(
            at + address - start for start, at, size in segments if 0 <= address - start < size
        )
        if content[offset : offset + 2] != CPUID:
            raise InputError(f"{path.name}: no cpuid at {address:#x}, where objdump reports one")
        content[offset : offset + 2] = UD2
    path.write_bytes(content)
    return len(addresses)


def load_segments(content: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """(address, offset, size) of each part of a 64-bit ELF file that is mapped."""
    (table,) = struct.unpack_from("<Q", content, 32)
    entry, count = struct.unpack_from("<HH", content, 54)
    for number in range(count):
        kind, _, offset, address, _, size = struct.unpack_from(
            "<IIQQQQ", content, table + number * entry
        )
        if kind == 1:
            yield address, offset, size


def compile_handler(folder: Path) -> Path:
    """Compile masked_cpuid.c into a library to preload."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise InputError("no C compiler on this machine; install one, e.g. `apt-get install gcc`")
    library = folder / "masked_cpuid.so"
    source = HERE / "masked_cpuid.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", str(source), "-o", str(library)], check=True
    )
    return library


def run_limited(packages: Sequence[str], command: Sequence[str]) -> int:
    """Run a command with limited packages, and return its exit code."""
    with limited_environment(packages) as environment:
        return subprocess.run(list(command), env=environment, check=False).returncode


def main() -> int:
    """Run the command after `--`."""
    arguments = sys.argv[1:]
    if "--" not in arguments or arguments[0] == "--":
        print(__doc__)
        return 2
    split = arguments.index("--")
    try:
        return run_limited(arguments[:split], arguments[split + 1 :])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
