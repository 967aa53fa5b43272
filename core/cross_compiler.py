"""Processor names, and zig as a C++ cross compiler.

The `ziglang` package compiles for many processors. It is used where no other compiler is found.
"""

from __future__ import annotations

import platform
import sys

# The C library of the oldest device described, a Jetson Nano (Ubuntu 18.04). Other compilers link
# with the C library that they come with; only zig links with a chosen one.
OLDEST_GLIBC = "2.27"
PACKAGE = "ziglang"
# The names of a processor that systems other than Linux use.
_LINUX_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine_of(triple: str) -> str:
    """The processor of a triple, such as `aarch64`, as Linux names it."""
    first = triple.split("-")[0].lower()
    return _LINUX_NAMES.get(first, first)


def runs_here(triple: str) -> bool:
    """Whether this machine can start programs of the triple without an emulator."""
    return (
        machine_of(triple) == machine_of(platform.machine())
        and "android" not in triple
        and sys.platform == "linux"
    )


def zig_target(machine: str, system: str = "linux-gnu") -> str:
    """Zig's target name of a processor under Linux with the GNU C library.

    Args:
        machine: The processor, such as `aarch64`.
        system: `linux-gnu`, or `linux-gnueabihf`.
    """
    return f"{machine}-{system}.{OLDEST_GLIBC}"


def zig_command(machine: str, system: str = "linux-gnu") -> tuple[str, ...]:
    """The command line that starts zig's C++ compiler; the caller checks that zig is installed.

    Args:
        machine: The processor, such as `aarch64`.
        system: `linux-gnu`, or `linux-gnueabihf`.
    """
    return (sys.executable, "-m", PACKAGE, "c++", f"--target={zig_target(machine, system)}")
