"""Ask a model in a process of its own, which may be another interpreter or an emulated one, and
keep its answers.

    python answer.py '{"runtime": "openvino", "model": "model.xml", ...}' images.npy logits.npy

images.npy: (count, ...) in the model's own type; a last incomplete batch is filled up and cut off.
"time_limit_s" in the job: no further batch is begun after so many seconds. Writes logits.npy
(count, classes), and one JSON line on standard output: {"runtime", "version", "provider",
"provider_nodes"}, or {"error"} with exit code 3.
"""

from __future__ import annotations

import os
import sys

# Run as a file, this folder would shadow modules of the same names.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import importlib
import json
import time
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


def load_package() -> Any:
    """This folder as the package `runtimes`, wherever it lies and whether or not vitrim is
    installed.
    """
    sys.path.insert(0, os.path.dirname(HERE))
    try:
        return importlib.import_module("runtimes")
    finally:
        del sys.path[0]


def answer(engine: Any, images: Any, time_limit_s: float | None = None) -> Any:
    """Logits (count, classes) float32 of a loaded engine for all images, at its own batch size; of
    fewer once the time is used up.
    """
    import numpy

    size, start = engine.input_shape[0], time.monotonic()
    found: list[Any] = []
    for first in range(0, len(images), size):
        if found and time_limit_s is not None and time.monotonic() - start > time_limit_s:
            break
        chunk = images[first : first + size]
        there = len(chunk)
        if there < size:
            chunk = numpy.concatenate([chunk, numpy.repeat(chunk[-1:], size - there, axis=0)])
        found.append(
            numpy.asarray(
                engine.infer(numpy.ascontiguousarray(chunk)), dtype=numpy.float32
            ).reshape(size, -1)[:there]
        )
    return numpy.concatenate(found)


def main(arguments: list[str]) -> int:
    """Carry out one job; libraries that print get standard error."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if len(arguments) != 3:
        sys.stderr.write(
            "three arguments are wanted: the job as JSON, the images to read and the logits to write\n"
        )
        return 2
    runtimes = load_package()
    try:
        import numpy

        job = json.loads(arguments[0])
        engine = runtimes.open_engine(job)
        engine.load()
        images = numpy.load(arguments[1], allow_pickle=False).astype(engine.input_type, copy=False)
        numpy.save(arguments[2], answer(engine, images, job.get("time_limit_s")))
        told = {
            "runtime": engine.runtime,
            "version": engine.version,
            "provider": engine.provider,
            "provider_nodes": engine.provider_nodes,
        }
    except runtimes.EngineError as error:
        told = {"error": str(error)}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {runtimes.one_line(error)}"}
    events.write(json.dumps(told) + "\n")
    events.close()
    return 3 if "error" in told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
