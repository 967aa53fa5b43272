"""Running aarch64 programs on another processor.

It takes qemu's user emulation, an arm64 user land with python3, and the runtimes' aarch64 wheels.
Emulated runs prove outputs, top-1, sizes and that a program starts; their times mean nothing.
"""

from __future__ import annotations

from .emulator import Emulator, ready
from .preparation import prepare

__all__ = ["Emulator", "prepare", "ready"]
