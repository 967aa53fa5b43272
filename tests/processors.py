"""This machine's processor, as tests need it: exact eight-bit products, and emulated processors."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache

import pytest
from vitrim.export import capabilities
from vitrim.targets.catalog import load_target
from vitrim.targets.instruction_sets import CPU_FEATURES

# Widths of eight-bit weights whose products are exact here.
WEIGHT_BITS = (7, 8) if capabilities.int8_exact("host") else (7,)
# The widest ones, as an export for this machine has them.
HOST_BITS = WEIGHT_BITS[-1]
# qemu translates AVX2 since 7.2.
_OLDEST_QEMU = (7, 2)


def taken_for(target: str) -> dict[str, str]:
    """The environment of a process that takes this machine for a target's processor."""
    return {**os.environ, CPU_FEATURES: " ".join(load_target(target).features)}


@cache
def _qemu() -> str | None:
    path = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    version = tuple(int(part) for part in words[2].split(".")[:2]) if len(words) > 2 else ()
    return path if version >= _OLDEST_QEMU else None


def emulated_x86(core: str, *command: object) -> list[str]:
    """The command that runs an x86-64 program as on a core that qemu knows, such as Haswell.

    Skips the test where there is no such emulator.
    """
    path = _qemu()
    if platform.machine() != "x86_64" or path is None:
        pytest.skip("no qemu-x86_64 of version 7.2 or newer: apt-get install qemu-user")
    return [path, "-cpu", core, *map(str, command)]
