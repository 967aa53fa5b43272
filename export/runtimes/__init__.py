"""The runtimes besides ONNX Runtime that vitrim writes artifacts for, one file each."""

from __future__ import annotations

import importlib
from pathlib import Path

from ...core.errors import InputError
from .runtime import Role, Runtime, Source, Written

__all__ = ["Role", "Runtime", "Source", "Written", "runtime_named", "runtime_names"]

SUFFIX = "_runtime.py"


def runtime_names() -> list[str]:
    """The runtimes of this folder, installed or not, sorted; onnxruntime, which is always there, is
    not among them.
    """
    return sorted(
        path.name.removesuffix(SUFFIX) for path in Path(__file__).parent.glob(f"*{SUFFIX}")
    )


def runtime_named(name: str) -> Runtime:
    """The runtime of a name, installed or not. Errors: InputError with the names that there are."""
    if name not in runtime_names():
        raise InputError(
            f"runtime {name!r} is unknown; this vitrim exports for onnxruntime, {', '.join(runtime_names())}"
        )
    found: Runtime = importlib.import_module(f"{__name__}.{name}_runtime").RUNTIME
    return found
