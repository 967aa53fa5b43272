"""The runtimes besides ONNX Runtime that vitrim exports for, one `<runtime>_runtime.py` each."""

from __future__ import annotations

import importlib
from pathlib import Path

from ...core.errors import InputError
from .runtime import Role, Runtime, RuntimeFiles, Source

__all__ = ["Role", "Runtime", "RuntimeFiles", "Source", "runtime_named", "runtime_names"]

SUFFIX = "_runtime.py"


def runtime_names() -> list[str]:
    """The runtimes of this folder, installed or not, sorted; onnxruntime is not among them."""
    folder = Path(__file__).parent
    return sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}"))


def runtime_named(name: str) -> Runtime:
    """The runtime of a name, installed or not.

    Raises:
        InputError: There is no such runtime; the message lists those that exist.
    """
    if name not in runtime_names():
        raise InputError(
            f"runtime {name!r} is unknown; "
            f"this vitrim exports for onnxruntime, {', '.join(runtime_names())}"
        )
    found: Runtime = importlib.import_module(f"{__name__}.{name}_runtime").RUNTIME
    return found
