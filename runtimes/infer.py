"""Run a model over a file of images and write its logits, or all outputs, to another file.

    python infer.py '{"runtime": "openvino", "model": "model.xml", ...}' images.npy logits.npy

The Python may be another interpreter than vitrim's, or an emulated one.

images.npy has shape (count, ...) in the type of the model's input; a last incomplete batch is
padded, and the padding's logits are dropped. With "time_limit_s" in the job no further batch is
started after that many seconds. The script writes logits.npy (count, classes), or with "outputs" in
the job all outputs of each image side by side, (count, numbers). With "choices" in the job, the
path of an .npz file, it writes there which patches the selections choose: an array (images, kept)
for each batch and selection, named as in "3.0". It prints one line of JSON:
{"runtime", "version", "provider", "provider_nodes"}, or {"error"} with exit code 3.
"""

from __future__ import annotations

import os
import sys

# Python puts a script's folder on its path, where this one's modules would shadow others.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import importlib
import json
import time
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
USAGE = "usage: infer.py JOB IMAGES LOGITS (the job as JSON, two paths of .npy files)\n"


def load_package() -> Any:
    """This folder as the package `runtimes`, whether or not vitrim is installed."""
    sys.path.insert(0, os.path.dirname(HERE))
    try:
        return importlib.import_module("runtimes")
    finally:
        del sys.path[0]


def infer(
    engine: Any,
    images: Any,
    time_limit_s: float | None = None,
    chosen: dict[str, Any] | None = None,
) -> Any:
    """Logits of images, computed in batches of the model's own size.

    Args:
        engine: A loaded engine.
        images: Shape (count, ...), in the engine's input type.
        time_limit_s: Start no batch after this many seconds, except the first.
        chosen: Gets which patches the selections choose, see above; None: they are not read.

    Returns:
        Logits (count, classes) float32, or all outputs of an image side by side; fewer rows if the
        time limit was reached.
    """
    import numpy

    size, start = engine.input_shape[0], time.monotonic()
    logits: list[Any] = []
    for first in range(0, len(images), size):
        if logits and time_limit_s is not None and time.monotonic() - start > time_limit_s:
            break
        batch = images[first : first + size]
        count = len(batch)
        if count < size:
            batch = numpy.concatenate([batch, numpy.repeat(batch[-1:], size - count, axis=0)])
        batch = numpy.ascontiguousarray(batch)
        outputs = engine.infer_outputs(batch).values()
        if chosen is not None:
            # A second inference: the outputs are those of the call that programs make.
            for number, places in enumerate(engine.infer_choices(batch)):
                chosen[f"{first // size}.{number}"] = places[:count]
        flat = [numpy.asarray(found, dtype=numpy.float32).reshape(size, -1) for found in outputs]
        logits.append(numpy.concatenate(flat, axis=1)[:count])
    return numpy.concatenate(logits)


def main(arguments: list[str]) -> int:
    """Run the job of the command line. What libraries print goes to standard error."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if len(arguments) != 3:
        sys.stderr.write(USAGE)
        return 2
    runtimes = load_package()
    try:
        import numpy

        job = json.loads(arguments[0])
        engine = runtimes.open_engine(job)
        engine.load()
        images = numpy.load(arguments[1], allow_pickle=False).astype(engine.input_type, copy=False)
        chosen: dict[str, Any] | None = {} if "choices" in job else None
        numpy.save(arguments[2], infer(engine, images, job.get("time_limit_s"), chosen))
        if chosen is not None:
            numpy.savez(job["choices"], **chosen)
        result = {
            "runtime": engine.runtime,
            "version": engine.version,
            "provider": engine.provider,
            "provider_nodes": engine.provider_nodes,
        }
    except runtimes.EngineError as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {runtimes.one_line(error)}"}
    events.write(json.dumps(result) + "\n")
    events.close()
    return 3 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
