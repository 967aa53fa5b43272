"""How each runtime opens and runs a model: one `<runtime>_engine.py` a runtime.

Within vitrim this is `vitrim.runtimes`. On a device without vitrim the runner loads a copy of this
folder next to it, so nothing here imports more than Python 3.9, numpy and the job's runtime.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from .cpu_features import require_features
from .dataset import DatasetError, open_dataset, prepare_images
from .engine import CPU, Engine, EngineError, Json, Requirement, concrete_shape, one_line

__all__ = [
    "CPU",
    "DatasetError",
    "Engine",
    "EngineError",
    "Json",
    "Requirement",
    "concrete_shape",
    "engine_names",
    "one_line",
    "open_dataset",
    "open_engine",
    "prepare_images",
    "requirement",
]

HERE = os.path.dirname(os.path.abspath(__file__))
SUFFIX = "_engine.py"


def engine_names() -> list[str]:
    """The runtimes that have an engine here, installed or not, sorted."""
    return sorted(name[: -len(SUFFIX)] for name in os.listdir(HERE) if name.endswith(SUFFIX))


def open_engine(job: Json) -> Engine:
    """The engine of job["runtime"], by default onnxruntime, with the model not yet loaded.

    Raises:
        EngineError: There is no such engine, its runtime is not installed, or this processor lacks
            an instruction set that the artifact states.
    """
    module = _module(str(job.get("runtime") or "onnxruntime"))
    require_features(job)
    engine: Engine = module.ENGINE(job)
    return engine


def requirement(runtime: str) -> Requirement:
    """What a runtime's engine needs; the runtime is not imported."""
    found: Requirement = _module(runtime).REQUIREMENT
    return found


def _module(runtime: str) -> Any:
    # Manifests are untrusted: only the name of an engine's file in this folder is imported.
    if runtime not in engine_names():
        raise EngineError(
            f"there is no engine for the runtime {runtime!r}; there are {', '.join(engine_names())}"
        )
    return importlib.import_module(f"{__name__}.{runtime}_engine")
