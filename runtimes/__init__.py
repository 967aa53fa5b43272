"""How a model is opened and asked in each runtime, one file each.

Within vitrim this is `vitrim.runtimes`. On a device, where there is no vitrim, the runner loads the
same folder from beside itself, so nothing here imports more than Python 3.9, numpy and the runtime
that the job names.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from .engine import CPU, Engine, EngineError, Json, Requirement, concrete_shape, one_line

__all__ = [
    "CPU",
    "Engine",
    "EngineError",
    "Json",
    "Requirement",
    "concrete_shape",
    "engine_names",
    "one_line",
    "open_engine",
    "requirement",
]

HERE = os.path.dirname(os.path.abspath(__file__))
SUFFIX = "_engine.py"


def engine_names() -> list[str]:
    """The runtimes that have an engine here, installed or not, sorted."""
    return sorted(name[: -len(SUFFIX)] for name in os.listdir(HERE) if name.endswith(SUFFIX))


def open_engine(job: Json) -> Engine:
    """The engine for job["runtime"] (default onnxruntime), its runtime imported, its model not yet
    loaded. Errors: EngineError.
    """
    engine: Engine = _module(str(job.get("runtime") or "onnxruntime")).ENGINE(job)
    return engine


def requirement(runtime: str) -> Requirement:
    """What must be importable for a runtime's engine, and what pip is given for it. Imports nothing
    of the runtime.
    """
    found: Requirement = _module(runtime).REQUIREMENT
    return found


def _module(runtime: str) -> Any:
    # A manifest is somebody else's text: only the name of a file that lies here becomes an import.
    if runtime not in engine_names():
        raise EngineError(
            f"there is no engine for the runtime {runtime!r}; there are {', '.join(engine_names())}"
        )
    return importlib.import_module(f"{__name__}.{runtime}_engine")
