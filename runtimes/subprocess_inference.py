"""Run an artifact's model in another Python process, with the engine that benchmarks time.

A crash of the runtime then ends that process only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from .engine import EngineError, Json

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "infer.py")
LIMIT_S = 1800.0


def interpreter_variable(runtime: str) -> str:
    """The environment variable with a runtime's interpreter, such as VITRIM_PYTHON_EXECUTORCH."""
    return f"VITRIM_PYTHON_{runtime.upper()}"


def interpreter(runtime: str) -> str | None:
    """The interpreter that the environment names for a runtime, or None for the running one.

    Some runtimes need packages that conflict with vitrim's, and are installed in a separate Python.

    Raises:
        EngineError: The named interpreter does not exist.
    """
    variable = interpreter_variable(runtime)
    named = os.environ.get(variable)
    if not named:
        return None
    found = shutil.which(named)
    if found is None:
        raise EngineError(
            f"{variable}={named}: no such interpreter; "
            f"name the path of a Python with {runtime} and numpy"
        )
    return found


def infer_in_subprocess(
    job: Json, images: Any, *, command: Sequence[str] | None = None, limit_s: float = LIMIT_S
) -> tuple[Any, Json]:
    """Run a model over images in another process.

    Args:
        job: The engine's job, see `runtimes.engine`; with "time_limit_s" the process starts no
            further batch after that many seconds, and returns fewer logits.
        images: Shape (count, channels, height, width), in the type of the model's input.
        command: What runs a Python file: another interpreter or an emulator. By default the
            interpreter of VITRIM_PYTHON_<RUNTIME>, else the running one.
        limit_s: Stop the process after this many seconds.

    Returns:
        Logits (count, classes) float32, and {"runtime", "version", "provider", "provider_nodes"}.

    Raises:
        EngineError: The process failed; the message is one line.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-infer-") as folder:
        return _infer_in(folder, job, images, command, limit_s)


def infer_with_choices(
    job: Json, images: Any, *, command: Sequence[str] | None = None, limit_s: float = LIMIT_S
) -> tuple[Any, list[list[Any]], Json]:
    """Run a model with selections over images in another process.

    Args:
        job: As for `infer_in_subprocess`.
        images: Shape (count, channels, height, width), in the type of the model's input.
        command: As for `infer_in_subprocess`.
        limit_s: Stop the process after this many seconds.

    Returns:
        Logits; for each batch the chosen places (images, kept) of each selection, see
        `Engine.infer_choices`; and the facts.

    Raises:
        EngineError: The process failed, or the runtime does not show the choices.
    """
    import numpy

    with tempfile.TemporaryDirectory(prefix="vitrim-infer-") as folder:
        path = os.path.join(folder, "choices.npz")
        logits, facts = _infer_in(folder, {**job, "choices": path}, images, command, limit_s)
        batches = -(-len(logits) // int(job["input"]["shape"][0]))
        chosen: list[list[Any]] = [[] for _ in range(batches)]
        with numpy.load(path, allow_pickle=False) as file:
            # In the order in which they were written.
            for name in file.files:
                chosen[int(name.split(".")[0])].append(file[name])
        return logits, chosen, facts


def _infer_in(
    folder: str, job: Json, images: Any, command: Sequence[str] | None, limit_s: float
) -> tuple[Any, Json]:
    """Run the job with its files in a folder; see `infer_in_subprocess`."""
    import numpy

    runtime = str(job.get("runtime") or "onnxruntime")
    start = list(command) if command is not None else [interpreter(runtime) or sys.executable]
    images_path, logits_path = (os.path.join(folder, name) for name in ("images.npy", "logits.npy"))
    numpy.save(images_path, images)
    try:
        done = subprocess.run(
            [*start, SCRIPT, json.dumps(job), images_path, logits_path],
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{runtime}: no result within {limit_s:.0f} s; use fewer images"
        ) from None
    except OSError as error:
        raise EngineError(
            f"{start[0]}: cannot be started ({error.strerror}); name another interpreter"
        ) from None
    facts = _facts(runtime, done)
    return numpy.load(logits_path, allow_pickle=False), facts


def _facts(runtime: str, done: subprocess.CompletedProcess[bytes]) -> Json:
    """The JSON line that infer.py printed last. Raises EngineError for a failure."""
    try:
        facts: Json = json.loads(done.stdout.decode(errors="replace").strip().splitlines()[-1])
    except (ValueError, IndexError):
        output = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        raise EngineError(
            f"{runtime}: its process ended with {done.returncode} and no result "
            f"({output or 'no error output'})"
        ) from None
    if "error" in facts:
        raise EngineError(str(facts["error"]))
    return facts
