"""Files with changed bytes, for tests of what reads untrusted files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vitrim.core.errors import InputError

Value = TypeVar("Value")


def load_changed(load: Callable[[Path], Value], path: Path, tail: bytes) -> Value | None:
    """Overwrite bytes of a file, spread over it, and load it.

    Returns:
        What was loaded; None where it was refused.
    """
    whole = bytearray(path.read_bytes())
    for place, byte in enumerate(tail):
        whole[(7 * place + byte) % len(whole)] = byte
    path.write_bytes(whole)
    try:
        return load(path)
    except InputError:
        return None
