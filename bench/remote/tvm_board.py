"""A subprocess that requests one board of a TVM tracker and measures TVM artifacts on it.

    python -m vitrim.bench.remote.tvm_board < request.json

Request: {"tracker": [host, port], "key": name, "plan": the conductor's}.
Output, one JSON line each: {"share", "text"}, {"result"}, {"error": one line}.
TVM's time evaluator takes the latencies on the board, so they do not include the link.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtimes import DatasetError, open_dataset, prepare_images
from ...runtimes.compiled_program import buffer_numbers
from ..local.conductor import ConductorError, conduct
from ..local.runner import json_lines

Json = dict[str, Any]
# The functions that are called: of a model in TVM's virtual machine, and of a compiled program.
FUNCTION, PROGRAM = "main", "vitrim_run"
# Whether the board's processor cannot run a compiled program.
REFUSED = "vitrim_refused"
WINDOW = 5
# TVM's protocol reports none of these.
STATE = (
    *("frequency_hz", "load", "busy_cores", "temperature_c", "throttled", "throttle_count"),
    "memory_available_bytes",
)


class BoardExecutor:
    """Loads models on a board through one session, for `conduct`."""

    def __init__(self, session: Any, key: str) -> None:
        self.session, self.key = session, key

    def start_runner(self, name: str, job: Json, reply_limit_s: float) -> BoardModel:
        """Load a model on the board."""
        del reply_limit_s
        try:
            return BoardModel(self.session, name, job)
        except ConductorError:
            raise
        except Exception as error:
            raise ConductorError(f"{name}: the board cannot load it: {one_line(error)}") from None

    def environment(self) -> Json:
        """Return an empty environment: TVM's protocol reports nothing about the machine."""
        return {"machine": {}, "state": dict.fromkeys(STATE)}

    def energy_j(self) -> float | None:
        """Return None: TVM's protocol reports no energy."""
        return None


class ProgramModel:
    """A compiled program on a board: one function of images and logits, which stay there."""

    def __init__(self, module: Any, device: Any, logits: Any) -> None:
        self.module, self.device, self.logits = module, device, logits
        self.images: Any = None

    def set_input(self, images: Any) -> None:
        """Set the images, a tensor on the board."""
        self.images = images

    def run(self) -> None:
        """Run one inference."""
        self.module[PROGRAM](self.images, self.logits)

    def outputs(self) -> Any:
        """Return the logits of the last inference as an array."""
        return self.logits.numpy()

    def timed(self, count: int) -> Any:
        """Return the seconds of each of `count` inferences."""
        evaluator = self.module.time_evaluator(PROGRAM, self.device, number=1, repeat=count)
        return evaluator(self.images, self.logits).results


class VirtualMachineModel:
    """A model on a board that TVM's virtual machine runs."""

    def __init__(self, module: Any, device: Any, weights: Callable[[int], list[Any]]) -> None:
        from tvm.relax import VirtualMachine  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.machine, self.device = VirtualMachine(module, device), device
        count = int(self.machine["get_function_arity"](FUNCTION)) - 1
        self.weights = weights(count) if count else []

    def set_input(self, images: Any) -> None:
        """Set the images, a tensor on the board."""
        self.machine.set_input(FUNCTION, images, *self.weights)

    def run(self) -> None:
        """Run one inference."""
        self.machine.invoke_stateful(FUNCTION)

    def outputs(self) -> Any:
        """Return the logits of the last inference as an array."""
        found = self.machine.get_outputs(FUNCTION)
        return (found[0] if isinstance(found, tuple) else found).numpy()

    def timed(self, count: int) -> Any:
        """Return the seconds of each of `count` inferences."""
        evaluator = self.machine.time_evaluator(
            "invoke_stateful", self.device, number=1, repeat=count
        )
        return evaluator(FUNCTION).results


class BoardModel:
    """A model on a board, with the methods of a `RunnerProcess`."""

    def __init__(self, session: Any, name: str, job: Json) -> None:
        import numpy
        import tvm  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.name, self.job, self.numpy, self.tvm = name, job, numpy, tvm
        kind = str((job.get("session") or {}).get("device", "cpu"))
        self.device = session.device(kind)
        uploaded = f"{job['upload']}.so"
        session.upload(str(job["model"]), target=uploaded)
        start = time.perf_counter()
        module = session.load_module(uploaded)
        load_s = time.perf_counter() - start
        self._require_processor(module)
        self.shape = self._input_shape()
        images = numpy.random.default_rng(int(job.get("seed", 0))).standard_normal(
            self.shape, dtype=numpy.float32
        )
        self.model = self._model(module)
        self._send(images)
        # The evaluator makes an untimed call before those that it times, so the first inference is
        # timed from here, over the link.
        start = time.perf_counter()
        self.model.run()
        self.ready: Json = {
            "runtime": "tvm",
            "runtime_version": tvm.__version__,
            "provider": kind.upper(),
            "provider_nodes": None,
            "input_shape": self.shape,
            "input_type": "float32",
            "load_s": load_s,
            "first_inference_s": time.perf_counter() - start,
            "floor_rss_bytes": None,
            "peak_rss_exact": True,
            "niceness": None,
        }

    def _require_processor(self, module: Any) -> None:
        try:
            refused = int(module[REFUSED]())
        except Exception:  # a model of an earlier version, or one for TVM's virtual machine
            return
        if refused:
            cpu = self.job.get("cpu") or {}
            raise ConductorError(
                f"{self.name}: the board's processor lacks an instruction set of "
                f"{cpu.get('target') or 'its target'} ({', '.join(cpu.get('needs') or ())}); "
                "export it for the board's processor"
            )

    def _input_shape(self) -> list[int]:
        shape, batch = [int(size) for size in self.job["input"]["shape"]], self.job.get("batch")
        shape[0] = shape[0] if shape[0] > 0 else int(batch or 1)
        if batch and shape[0] != int(batch):
            raise ConductorError(
                f"{self.name}: is compiled for batch {shape[0]}, and batch {batch} was requested; "
                "export it with that batch"
            )
        return shape

    def _model(self, module: Any) -> ProgramModel | VirtualMachineModel:
        if (self.job.get("session") or {}).get("entry") == "program":
            outputs = self.job.get("outputs")
            sizes = [self.shape[0], int(self.job["classes"])]
            if outputs:
                sizes = [buffer_numbers(outputs)]
            logits = self._on_board(self.numpy.zeros(sizes, dtype=self.numpy.float32))
            return ProgramModel(module, self.device, logits)
        path = Path(self.job["model"])
        return VirtualMachineModel(
            module,
            self.device,
            lambda count: [self._on_board(array) for array in external_weights(path, count)],
        )

    def request(self, do: str, **options: Any) -> Json:
        """Run one of the commands warm, run, memory and profile of runner.py."""
        try:
            if do == "warm":
                return self._warm(float(options["limit_s"]))
            if do == "run":
                latency_s = self.timed(int(options["count"]))
                return {"latency_s": latency_s, "cpu_s": 0.0, "wall_s": 0.0}
        except Exception as error:
            raise self._lost(error) from None
        if do == "memory":
            return {"peak_rss_bytes": None, "steady_rss_bytes": None}
        raise ConductorError(
            f"{self.name}: TVM's protocol has no profile by operator; "
            "profile on the device itself (--on ssh://user@host)"
        )

    def score(self, dataset: str, limit: int | None, progress: Callable[[Json], None]) -> Json:
        """Count top-1 over a data set, which is sent batch by batch."""
        batch, correct = self.shape[0], 0
        try:
            images, labels = open_dataset(self.numpy, dataset)
            total = len(labels) if limit is None else min(limit, len(labels))
            last_report_s = time.perf_counter()
            for first in range(0, total, batch):
                last = min(first + batch, total)
                logits = self._logits(images[first:last])
                correct += int((logits.argmax(axis=1) == labels[first:last]).sum())
                if time.perf_counter() - last_report_s > 1:
                    last_report_s = time.perf_counter()
                    progress({"done": last, "total": total})
        except DatasetError as error:
            raise ConductorError(f"{self.name}: {error}") from None
        except Exception as error:
            raise self._lost(error) from None
        return {"correct": correct, "total": total}

    def close(self) -> None:
        """Do nothing: the session ends with this process."""

    def timed(self, count: int) -> list[float]:
        """Return the seconds of each of `count` inferences, taken on the board."""
        return [float(value) for value in self.model.timed(count)]

    def _logits(self, images: Any) -> Any:
        numpy, batch, count = self.numpy, self.shape[0], len(images)
        chunk = prepare_images(numpy, images, self.shape, "float32", self.job.get("preprocessing"))
        if count < batch:
            chunk = numpy.concatenate([chunk, numpy.repeat(chunk[-1:], batch - count, axis=0)])
        self._send(numpy.ascontiguousarray(chunk))
        self.model.run()
        # The logits are the first output.
        logits = self.model.outputs().ravel()[: batch * int(self.job["classes"])]
        return logits.reshape(batch, -1)[:count]

    def _send(self, images: Any) -> None:
        self.model.set_input(self._on_board(images))

    def _on_board(self, array: Any) -> Any:
        return self.tvm.runtime.tensor(self.numpy.asarray(array), self.device)

    def _warm(self, limit_s: float) -> Json:
        start, before, count = time.perf_counter(), 0.0, 0
        while True:
            median = sorted(self.timed(WINDOW))[WINDOW // 2]
            count += WINDOW + 1
            elapsed = time.perf_counter() - start
            stable = elapsed >= 0.2 and abs(median - before) <= 0.03 * before
            if stable or elapsed >= limit_s:
                return {"count": count, "stable": stable, "p50_s": median}
            before = median

    def _lost(self, error: Exception) -> ConductorError:
        return ConductorError(
            f"{self.name}: the board does not respond any more: {one_line(error)}; "
            "check whether it was restarted, then measure again"
        )


def external_weights(model: Path, count: int) -> list[Any]:
    """Map the large weights that are stored next to the compiled code."""
    from ...runtimes.tvm_virtual_machine import WEIGHTS, map_weights

    return map_weights(str(model.parent / WEIGHTS), count)


def one_line(error: BaseException) -> str:
    """Return the last line of an error, since TVM's begin with a long stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def measure_on_board(request: Json, write: Callable[[Json], None]) -> None:
    """Run a request and write its events; raises ConductorError."""
    host, port = request["tracker"]
    where, key = f"{host}:{port}", request["key"]
    try:
        from tvm import rpc  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ConductorError(
            f"TVM's client is missing here: {one_line(error)}; "
            "install it: pip install 'vitrim[tvm]' cloudpickle psutil tornado"
        ) from None
    write({"share": 0.0, "text": f"waiting for a board {key}"})
    try:
        session = rpc.connect_tracker(host, int(port)).request(key, session_timeout=0)
    except Exception as error:
        raise ConductorError(
            f"{where}: the board {key} cannot be reached ({one_line(error)}); check its rpc_server"
        ) from None
    write({"share": 0.0, "text": f"on a board {key}"})
    result = conduct(
        request["plan"],
        lambda share, text: write({"share": share, "text": text}),
        BoardExecutor(session, key),
    )
    write({"result": result})


def main() -> int:
    """Run the request on standard input; return the exit code."""
    # TVM prints to standard output.
    write = json_lines()
    try:
        measure_on_board(json.loads(sys.stdin.read()), write)
    except ConductorError as error:
        write({"error": str(error)})
        return 3
    except Exception as error:
        write({"error": f"{type(error).__name__}: {one_line(error)}"})
        return 3
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At a normal exit TVM's session may wait for its board forever.
    os._exit(code)
