"""One model in one runtime, timed on request: the process that `measuring.py` starts.

    python timing.py RUNTIME MODEL THREADS [CLOCK]

RUNTIME is onnxruntime, openvino or ncnn; CLOCK is wall or processor. A line with a number of calls
on standard input is followed by their seconds on standard output. ncnn's MODEL is a .param file,
with the input's shape in a file of the same name that ends in .shape.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def open_model(runtime: str, path: str, threads: int) -> Callable[[], object]:
    """A call that runs one inference of noise."""
    openers = {"openvino": _openvino, "ncnn": _ncnn, "onnxruntime": _onnxruntime}
    return openers[runtime](path, threads)


def _noise(shape: Any) -> np.ndarray[Any, Any]:
    image: np.ndarray[Any, Any] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return image


def _openvino(path: str, threads: int) -> Callable[[], object]:
    from vitrim.runtimes.openvino_engine import openvino_contained, without_telemetry

    without_telemetry()
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    with openvino_contained():
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    image = _noise([int(size) for size in request.get_input_tensor().shape])
    return lambda: request.infer({0: image})


def _ncnn(path: str, threads: int) -> Callable[[], object]:
    from vitrim.runtimes import open_engine

    shape = json.loads(Path(path).with_suffix(".shape").read_text())
    entry = {"name": "images", "shape": shape, "type": "float32"}
    engine = open_engine({"runtime": "ncnn", "model": path, "threads": threads, "input": entry})
    engine.load()
    image = _noise(shape)
    return lambda: engine.infer(image)


def _onnxruntime(path: str, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    feed = {entry.name: _noise(entry.shape)}
    return lambda: session.run(None, feed)


def main(arguments: list[str]) -> int:
    """Time calls until the input ends."""
    call = open_model(arguments[0], arguments[1], int(arguments[2]))
    now_s = time.process_time if arguments[3:] == ["processor"] else time.perf_counter
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = now_s()
            call()
            seconds.append(now_s() - start)
        print(*seconds, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
