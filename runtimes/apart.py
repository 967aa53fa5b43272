"""Ask an artifact's model in a process of its own: the very engine that is timed, and a crash of
the runtime ends nothing but the question.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from .engine import EngineError, Json
from .interpreter import interpreter

ANSWER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "answer.py")
LIMIT_S = 1800.0


def ask_apart(
    job: Json, images: Any, *, command: Sequence[str] | None = None, limit_s: float = LIMIT_S
) -> tuple[Any, Json]:
    """Logits (count, classes) float32 of all images, and {"runtime", "version", "provider",
    "provider_nodes"}.

    command: what runs a Python file, for another interpreter or an emulated one; by default what
    VITRIM_PYTHON_<RUNTIME> names, else this Python. Errors: EngineError, one line.
    """
    import numpy

    runtime = str(job.get("runtime") or "onnxruntime")
    start = list(command) if command is not None else [interpreter(runtime) or sys.executable]
    with tempfile.TemporaryDirectory(prefix="vitrim-answer-") as folder:
        asked, told = os.path.join(folder, "images.npy"), os.path.join(folder, "logits.npy")
        numpy.save(asked, images)
        try:
            done = subprocess.run(
                [*start, ANSWER, json.dumps(job), asked, told],
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"{runtime}: no answer within {limit_s:.0f} s; ask fewer images"
            ) from None
        except OSError as error:
            raise EngineError(
                f"{start[0]}: cannot be started ({error.strerror}); name another interpreter"
            ) from None
        try:
            facts: Json = json.loads(done.stdout.decode(errors="replace").strip().splitlines()[-1])
        except (ValueError, IndexError):
            said = " ".join(done.stderr.decode(errors="replace").split())[-200:]
            raise EngineError(
                f"{runtime}: its process ended with {done.returncode} and no answer ({said or 'it said nothing'})"
            ) from None
        if "error" in facts:
            raise EngineError(str(facts["error"]))
        return numpy.load(told, allow_pickle=False), facts
