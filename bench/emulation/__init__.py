"""Running aarch64 programs on another processor: qemu's user emulation, an arm64 user land with
python3, and the runtimes' aarch64 wheels.

What runs here proves outputs, top-1, sizes and that a program starts at all. It says nothing of a
device's latency.
"""

from __future__ import annotations

from .emulator import Emulator, ready
from .preparation import prepare

__all__ = ["Emulator", "prepare", "ready"]
