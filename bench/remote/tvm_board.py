"""One board of a TVM tracker: a process that asks for it, and measures TVM artifacts on it as a
conductor does.

    python -m vitrim.bench.remote.tvm_board < question.json

Question: {"tracker": [host, port], "key": name, "plan": the conductor's}.
Answers, one JSON line each: {"share", "text"}, {"result"}, {"error": one line}.
Latencies are taken on the board by TVM's own time evaluator, so the link has no part in them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..local.conductor import ConductorError, conduct
from ..local.runner import json_lines

Json = dict[str, Any]
# What is called: of the virtual machine, and of a straight program.
FUNCTION, PROGRAM = "main", "vitrim_run"
WINDOW = 5


class Board:
    """The place of a conductor's runners: one session with one board."""

    def __init__(self, session: Any, key: str) -> None:
        self.session, self.key = session, key

    def start_runner(self, name: str, job: Json, reply_limit_s: float) -> BoardModel:
        """A model that the board has loaded."""
        del reply_limit_s
        try:
            return BoardModel(self.session, name, job)
        except ConductorError:
            raise
        except Exception as error:
            raise ConductorError(f"{name}: the board cannot load it: {one_line(error)}") from None

    def environment(self) -> Json:
        """TVM's protocol carries nothing of the machine."""
        state = dict.fromkeys(
            (
                "frequency_hz",
                "load",
                "busy_cores",
                "temperature_c",
                "throttled",
                "throttle_count",
                "memory_available_bytes",
            )
        )
        return {"machine": {}, "state": state}

    def energy_j(self) -> float | None:
        """Not told over TVM's protocol."""
        return None


class Straight:
    """A straight program of a board: one function of images and logits, which lie there."""

    def __init__(self, module: Any, device: Any, logits: Any) -> None:
        self.module, self.device, self.logits = module, device, logits
        self.images: Any = None

    def take(self, images: Any) -> None:
        self.images = images

    def run(self) -> None:
        self.module[PROGRAM](self.images, self.logits)

    def answers(self) -> Any:
        return self.logits.numpy()

    def timed(self, count: int) -> Any:
        return self.module.time_evaluator(PROGRAM, self.device, number=1, repeat=count)(
            self.images, self.logits
        ).results


class Virtual:
    """A model that TVM's virtual machine calls on a board."""

    def __init__(self, module: Any, device: Any, weights: Callable[[int], list[Any]]) -> None:
        from tvm.relax import VirtualMachine  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.machine, self.device = VirtualMachine(module, device), device
        count = int(self.machine["get_function_arity"](FUNCTION)) - 1
        self.weights = weights(count) if count else []

    def take(self, images: Any) -> None:
        self.machine.set_input(FUNCTION, images, *self.weights)

    def run(self) -> None:
        self.machine.invoke_stateful(FUNCTION)

    def answers(self) -> Any:
        found = self.machine.get_outputs(FUNCTION)
        return (found[0] if isinstance(found, tuple) else found).numpy()

    def timed(self, count: int) -> Any:
        return self.machine.time_evaluator("invoke_stateful", self.device, number=1, repeat=count)(
            FUNCTION
        ).results


class BoardModel:
    """A compiled model on a board; answers as a runner does."""

    def __init__(self, session: Any, name: str, job: Json) -> None:
        import numpy
        import tvm  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.name, self.job, self.numpy, self.tvm = name, job, numpy, tvm
        kind = str((job.get("session") or {}).get("device", "cpu"))
        self.device = session.device(kind)
        path = Path(job["model"])
        there = f"{job['upload']}.so"
        session.upload(str(path), target=there)
        start = time.perf_counter()
        module = session.load_module(there)
        self.load_s = time.perf_counter() - start
        self.shape = [int(size) for size in job["input"]["shape"]]
        self.shape[0] = self.shape[0] if self.shape[0] > 0 else int(job.get("batch") or 1)
        if job.get("batch") and self.shape[0] != int(job["batch"]):
            raise ConductorError(
                f"{name}: is compiled for batch {self.shape[0]}, and batch {job['batch']} was asked for; export it so"
            )
        images = numpy.random.default_rng(int(job.get("seed", 0))).standard_normal(
            self.shape, dtype=numpy.float32
        )
        settings = job.get("session") or {}
        if settings.get("entry") == "program":
            logits = self._there(
                numpy.zeros([self.shape[0], int(job["classes"])], dtype=numpy.float32)
            )
            self.model: Straight | Virtual = Straight(module, self.device, logits)
        else:
            self.model = Virtual(
                module,
                self.device,
                lambda count: [self._there(array) for array in weights_of(path, count)],
            )
        self.take(images)
        # The evaluator makes a call of its own before those that it times; the first of all is
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
            "load_s": self.load_s,
            "first_inference_s": time.perf_counter() - start,
            "floor_rss_bytes": None,
            "peak_rss_exact": True,
            "niceness": None,
        }

    def request(self, do: str, **options: Any) -> Json:
        """warm, run, memory or profile, as of runner.py."""
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
            f"{self.name}: TVM's protocol tells no operators; profile on the device itself (--on ssh://user@host)"
        )

    def score(self, dataset: str, limit: int | None, progress: Callable[[Json], None]) -> Json:
        """Top-1 over a data set, sent batch by batch."""
        from ..local.runner import RunnerError, open_dataset, prepare_images

        numpy, batch, correct = self.numpy, self.shape[0], 0
        try:
            images, labels = open_dataset(numpy, dataset)
            total = len(labels) if limit is None else min(limit, len(labels))
            told = time.perf_counter()
            for first in range(0, total, batch):
                last = min(first + batch, total)
                chunk = prepare_images(
                    numpy, images[first:last], self.shape, "float32", self.job.get("preprocessing")
                )
                chunk = (
                    numpy.concatenate([chunk, numpy.repeat(chunk[-1:], batch - len(chunk), axis=0)])
                    if len(chunk) < batch
                    else chunk
                )
                self.take(numpy.ascontiguousarray(chunk))
                self.model.run()
                answers = self.model.answers().reshape(batch, -1)[: last - first]
                correct += int((answers.argmax(axis=1) == labels[first:last]).sum())
                if time.perf_counter() - told > 1:
                    told = time.perf_counter()
                    progress({"done": last, "total": total})
        except RunnerError as error:
            raise ConductorError(f"{self.name}: {error}") from None
        except Exception as error:
            raise self._lost(error) from None
        return {"correct": correct, "total": total}

    def close(self) -> None:
        """The session ends with this process."""

    def take(self, images: Any) -> None:
        """Send images to the board; they stay for the calls that follow."""
        self.model.take(self._there(images))

    def timed(self, count: int) -> list[float]:
        """Seconds of each of `count` calls, taken on the board."""
        return [float(value) for value in self.model.timed(count)]

    def _there(self, array: Any) -> Any:
        return self.tvm.runtime.tensor(self.numpy.asarray(array), self.device)

    def _warm(self, limit_s: float) -> Json:
        start, before, count, stable = time.perf_counter(), 0.0, 0, False
        while True:
            middle = sorted(self.timed(WINDOW))[WINDOW // 2]
            count += WINDOW + 1
            elapsed = time.perf_counter() - start
            stable = elapsed >= 0.2 and abs(middle - before) <= 0.03 * before
            if stable or elapsed >= limit_s:
                return {"count": count, "stable": stable, "p50_s": middle}
            before = middle

    def _lost(self, error: Exception) -> ConductorError:
        return ConductorError(
            f"{self.name}: the board stopped answering: {one_line(error)}; look whether it was restarted, then measure again"
        )


def weights_of(model: Path, count: int) -> list[Any]:
    """Large weights that lie beside the compiled code."""
    from ...runtimes.tvm_virtual_machine import WEIGHTS, map_weights

    return map_weights(str(model.parent / WEIGHTS), count)


def one_line(error: BaseException) -> str:
    """The last words of an error, which in TVM ends a long trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def answer(question: Json, tell: Callable[[Json], None]) -> None:
    """Answer one question. Errors: ConductorError."""
    host, port = question["tracker"]
    where, key = f"{host}:{port}", question["key"]
    try:
        from tvm import rpc  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ConductorError(
            f"TVM's client is missing here: {one_line(error)}; install it: pip install 'vitrim[tvm]' cloudpickle psutil tornado"
        ) from None
    tell({"share": 0.0, "text": f"waiting for a board {key}"})
    try:
        session = rpc.connect_tracker(host, int(port)).request(key, session_timeout=0)
    except Exception as error:
        raise ConductorError(
            f"{where}: the board {key} cannot be reached ({one_line(error)}); look at its rpc_server"
        ) from None
    tell({"share": 0.0, "text": f"on a board {key}"})
    result = conduct(
        question["plan"],
        lambda share, text: tell({"share": share, "text": text}),
        Board(session, key),
    )
    tell({"result": result})


def main() -> int:
    # TVM prints.
    tell = json_lines()
    try:
        answer(json.loads(sys.stdin.read()), tell)
    except ConductorError as error:
        tell({"error": str(error)})
        return 3
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {one_line(error)}"})
        return 3
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # TVM's session may wait for its board for ever when Python tidies up.
    os._exit(code)
