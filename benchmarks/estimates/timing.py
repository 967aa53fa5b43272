"""One model in one runtime, timed on request: a line with a number of calls on standard input, that
many seconds back. For benchmarks/estimates.py.

    python -m benchmarks.estimates.timing RUNTIME MODEL THREADS [CLOCK]       (RUNTIME: onnxruntime,
    openvino or ncnn; CLOCK: wall, or processor)

ncnn's MODEL is a .param file, with the input's shape in a file of the same name that ends in
.shape.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def open_model(runtime: str, path: str, threads: int) -> Callable[[], None]:
    """A call that answers one fixed batch."""
    if runtime == "openvino":
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
        shape = [int(size) for size in request.get_input_tensor().shape]
        image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return lambda: request.infer({0: image}) and None
    if runtime == "ncnn":
        from vitrim.runtimes import open_engine

        shape = json.loads(Path(path).with_suffix(".shape").read_text())
        engine = open_engine(
            {
                "runtime": runtime,
                "model": path,
                "threads": threads,
                "input": {"name": "images", "shape": shape, "type": "float32"},
            }
        )
        engine.load()
        picture = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return lambda: engine.infer(picture) is None and None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    feed = {entry.name: np.random.default_rng(0).standard_normal(entry.shape, dtype=np.float32)}
    return lambda: session.run(None, feed) and None


def main(arguments: list[str]) -> int:
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
