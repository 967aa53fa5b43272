"""zig as a C++ compiler: one package of the index that compiles for many processors, taken where no
other compiler is.
"""

from __future__ import annotations

import sys

# The C library of the oldest device described, a Jetson Nano (Ubuntu 18.04). Only zig can be told;
# others link with the one that they came with.
OLDEST_GLIBC = "2.27"
PACKAGE = "ziglang"


def zig_target(machine: str, system: str = "linux-gnu") -> str:
    """zig's words for a processor (`aarch64`) under Linux with the GNU C library (`linux-gnu`, or
    `linux-gnueabihf`).
    """
    return f"{machine}-{system}.{OLDEST_GLIBC}"


def zig_command(machine: str, system: str = "linux-gnu") -> tuple[str, ...]:
    """The words that start the compiler for a processor; whether the package is there the caller
    has found out.
    """
    return (sys.executable, "-m", PACKAGE, "c++", f"--target={zig_target(machine, system)}")
