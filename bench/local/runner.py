"""Run one model in this process and report events, one JSON line each, on standard output.

This file needs Python 3.9 with numpy and the model's runtime, and nothing of vitrim: copied to a
device next to the folder `runtimes`, it does the same work there.

    python runner.py '{"model": "model.onnx",
                       "commands": [{"do": "warm"}, {"do": "run", "count": 100}, {"do": "memory"}]}'
    python runner.py - < job.json

With `-` the job is the first line of standard input, and each further line is a command.

Job: model (path), runtime (default onnxruntime), threads, pinning (list of CPU numbers), priority
(high or normal), spinning, arena, providers, batch (for a free batch dimension), seed, session
(settings of the runtime), preprocessing ({"mean", "std"} for uint8 data sets), input and output
(from the manifest), inputs (values of optional inputs, by name, while timing), buckets (numbers of
patches of which each image gets one: score counts each), commands (default: read from standard
input).
Commands: warm {limit_s}, run {count, settle}, memory, score {dataset, limit}, profile {count},
stop. Events: ready, warm, samples, memory, progress, score, profile, error (with a one-line
message; the process then exits with code 3).
"""

from __future__ import annotations

import os
import sys

# Run as a file inside its package, this folder would shadow the standard library's `statistics` and
# `warnings`.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import contextlib
import gc
import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

Json = dict[str, Any]
HERE = os.path.dirname(os.path.abspath(__file__))


def load_runtimes() -> Any:
    """Import the package `runtimes`: next to this file on a device, two folders up in vitrim."""
    on_device = os.path.isdir(os.path.join(HERE, "runtimes"))
    sys.path.insert(0, HERE if on_device else os.path.dirname(os.path.dirname(HERE)))
    try:
        return importlib.import_module("runtimes")
    finally:
        del sys.path[0]


runtimes = load_runtimes()


class RunnerError(Exception):
    """Why the job failed, in one line."""


# ---- this process --------------------------------------------------------------------------------


def read_memory_bytes() -> tuple[int | None, int | None]:
    """Return (resident memory now, its peak since the last reset) in bytes, None where unknown."""
    now = peak = None
    try:
        with open("/proc/self/status") as stream:
            for line in stream:
                if line.startswith("VmRSS:"):
                    now = int(line.split()[1]) * 1024
                elif line.startswith("VmHWM:"):
                    peak = int(line.split()[1]) * 1024
    except OSError:
        pass
    if peak is None:
        try:
            import resource

            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak = highest if sys.platform == "darwin" else highest * 1024
        except ImportError:
            pass
    return now, peak


def reset_peak() -> bool:
    """Reset the peak of resident memory (Linux); return False where that is not permitted."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


def current_niceness() -> int | None:
    """Return this process's niceness, -20 (first) to 19 (last); None where there is none."""
    try:
        return os.getpriority(os.PRIO_PROCESS, 0)
    except (OSError, AttributeError):
        return None


def raise_priority() -> int | None:
    """Run before other processes where that is permitted (as root), and return the niceness.

    Other processes' work would otherwise be part of the samples.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    return current_niceness()


def one_line(error: BaseException) -> str:
    """Return an error's text in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# ---- commands ------------------------------------------------------------------------------------


class Runner:
    """A loaded model with one fixed input; each command is a method that returns its event."""

    def __init__(self, job: Json) -> None:
        self.job = job
        if job.get("pinning"):
            _pin(job["pinning"])
        high = job.get("priority", "high") == "high"
        self.niceness = raise_priority() if high else current_niceness()
        self.engine = runtimes.open_engine(job)
        self.numpy = _import_numpy()
        gc.collect()
        self.floor_bytes, _ = read_memory_bytes()
        was_reset = reset_peak()
        _, after_reset = read_memory_bytes()
        # Without a reset the peak may be that of the runtime's import and not the model's.
        self.peak_exact = was_reset or after_reset == self.floor_bytes

        start = time.perf_counter()
        self.engine.load()
        self.load_s = time.perf_counter() - start

        self.shape, self.type = self.engine.input_shape, self.engine.input_type
        self.images = self._random_images(int(job.get("seed", 0)))
        self.infer = self.engine.infer
        start = time.perf_counter()
        self.infer(self.images)
        self.first_s = time.perf_counter() - start
        self.call = self.engine.timed_call(self.images)

    def _random_images(self, seed: int) -> Any:
        source = self.numpy.random.default_rng(seed)
        images = source.standard_normal(self.shape, dtype=self.numpy.float32)
        if self.type == "uint8":
            return (images * 64 + 128).clip(0, 255).astype("uint8")
        return images.astype(self.type)

    def ready(self) -> Json:
        """Return the event that describes the loaded model."""
        return {
            "event": "ready",
            "runtime": self.engine.runtime,
            "runtime_version": self.engine.version,
            "provider": self.engine.provider,
            "provider_nodes": self.engine.provider_nodes,
            "copies_timed": self.engine.copies_timed,
            "input_shape": self.shape,
            "input_type": self.type,
            "load_s": self.load_s,
            "first_inference_s": self.first_s,
            "floor_rss_bytes": self.floor_bytes,
            "peak_rss_exact": self.peak_exact,
            "niceness": self.niceness,
        }

    def warm(self, limit_s: float = 10.0, tolerance: float = 0.03, least_s: float = 0.2) -> Json:
        """Run until two successive windows agree in their medians, or the time limit is reached.

        Args:
            limit_s: Time limit in seconds.
            tolerance: Largest relative difference of two medians that agree.
            least_s: Shortest warm-up in seconds.
        """
        start = time.perf_counter()
        window = 5 if self.first_s < 0.5 else 1
        count, stable = 0, False
        before: float | None = None
        while True:
            median = sorted(self.timed(window))[window // 2]
            count += window
            elapsed = time.perf_counter() - start
            agree = before is not None and abs(median - before) <= tolerance * before
            if agree and elapsed >= least_s:
                stable = True
                break
            if elapsed >= limit_s:
                break
            before = median
        return {"event": "warm", "count": count, "stable": stable, "p50_s": median}

    def timed(self, count: int) -> list[float]:
        """Return the seconds of each of `count` inferences."""
        call, clock = self.call, time.perf_counter
        latency_s = []
        for _ in range(count):
            start = clock()
            call()
            latency_s.append(clock() - start)
        return latency_s

    def run(self, count: int, settle: int = 2) -> Json:
        """Time `count` inferences.

        `settle` untimed inferences come first: they refill the caches after another process ran.
        """
        gc.collect()
        gc.disable()
        try:
            self.timed(settle)
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            latency_s = self.timed(count)
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        finally:
            gc.enable()
        return {"event": "samples", "latency_s": latency_s, "cpu_s": cpu_s, "wall_s": wall_s}

    def memory(self) -> Json:
        """Return resident memory, and the engine's own counts where it has any."""
        now, peak = read_memory_bytes()
        # The process's memory is read first: reading the arena's size allocates memory itself.
        device = self.engine.device_memory_peak_bytes()
        return {
            "event": "memory",
            "peak_rss_bytes": peak,
            "steady_rss_bytes": now,
            "device_memory_peak_bytes": device,
            "arena_bytes": self.engine.arena_bytes(),
        }

    def score(self, dataset: str, limit: int | None = None) -> Iterator[Json]:
        """Yield progress events, then the top-1 count over a data set, at the timed batch size.

        With buckets each image has its own, and the counts of each are part of the event.
        """
        name = os.path.basename(dataset)
        images, labels = runtimes.open_dataset(self.numpy, dataset)
        total = len(labels) if limit is None else min(limit, len(labels))
        batch, correct, last_report_s = self.shape[0], 0, time.perf_counter()
        buckets = {int(count): [0, 0] for count in self.job.get("buckets") or ()}
        for first in range(0, total, batch):
            last = min(first + batch, total)
            logits, kept = self._logits(images[first:last], chosen=bool(buckets))
            wanted = labels[first:last]
            if not self.numpy.isfinite(logits).all():
                raise RunnerError(
                    f"the model returns NaN or infinite values for image {first} of {name}"
                )
            classes = logits.shape[1]
            if int(wanted.max()) >= classes or int(wanted.min()) < 0:
                raise RunnerError(
                    f"{name}: has labels outside of the model's {classes} classes; "
                    "give the set it was trained on"
                )
            found = int((logits.argmax(axis=1) == wanted).sum())
            correct += found
            if kept is not None:
                if kept not in buckets:
                    raise RunnerError(f"image {first} of {name} kept {kept} patches, no bucket's")
                buckets[kept][0] += found
                buckets[kept][1] += last - first
            if time.perf_counter() - last_report_s > 1:
                last_report_s = time.perf_counter()
                yield {"event": "progress", "done": last, "total": total}
        event: Json = {"event": "score", "correct": correct, "total": total}
        if buckets:
            event["buckets"] = [[count, *counted] for count, counted in buckets.items()]
        yield event

    def _logits(self, images: Any, *, chosen: bool) -> tuple[Any, int | None]:
        """Logits, and with `chosen` the number of patches that the image kept by its scores."""
        numpy, batch, count = self.numpy, self.shape[0], len(images)
        layout = (self.job.get("input") or {}).get("layout")
        given = self.job.get("preprocessing")
        chunk = runtimes.prepare_images(numpy, images, self.shape, self.type, given, layout)
        if count < batch:
            # A fixed batch is padded with copies of the last image; their outputs are dropped.
            chunk = numpy.concatenate([chunk, numpy.repeat(chunk[-1:], batch - count, axis=0)])
        chunk = numpy.ascontiguousarray(chunk)
        logits, kept = self.engine.infer_chosen(chunk) if chosen else (self.infer(chunk), None)
        return logits.reshape(batch, -1)[:count], kept

    def profile(self, count: int = 10) -> Json:
        """Return one row for each operator, from the runtime's own profiler."""
        return {"event": "profile", "runs": count, "rows": self.engine.profile(self.images, count)}


def _pin(cpus: list[int]) -> None:
    try:
        os.sched_setaffinity(0, set(cpus))
    except (OSError, AttributeError) as error:
        raise RunnerError(
            f"cannot pin to the CPUs {cpus}: {one_line(error)}; name CPUs that this machine has"
        ) from None


def _import_numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise RunnerError(
            f"numpy is missing here: {one_line(error)}; "
            "install it with `python3 -m pip install numpy`"
        ) from None
    return numpy


# ---- the line protocol ---------------------------------------------------------------------------


def json_lines() -> Callable[[Json], None]:
    """Reserve standard output for JSON lines and return the function that writes one.

    What libraries print goes to standard error from now on.
    """
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(event: Json) -> None:
        lines.write(json.dumps(event) + "\n")
        lines.flush()

    return write


def _read_job(argument: str) -> tuple[Json, Iterator[Json]]:
    try:
        job = json.loads(sys.stdin.readline() if argument == "-" else argument)
        commands = (
            iter(job["commands"])
            if "commands" in job
            else (json.loads(line) for line in sys.stdin if line.strip())
        )
        job["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunnerError(f"the job is no JSON object with a model: {one_line(error)}") from None
    return job, commands


def _run_commands(arguments: list[str], write: Callable[[Json], None]) -> None:
    if len(arguments) != 1:
        raise RunnerError("expected one argument: the job as JSON, or - to read standard input")
    job, commands = _read_job(arguments[0])
    runner = Runner(job)
    write(runner.ready())
    for command in commands:
        options = {key: value for key, value in command.items() if key != "do"}
        action = command.get("do")
        if action == "stop":
            return
        if action == "score":
            for event in runner.score(**options):
                write(event)
        elif action in ("warm", "run", "memory", "profile"):
            write(getattr(runner, action)(**options))
        else:
            raise RunnerError(
                f"unknown command {action!r}; it can be warm, run, memory, score, profile or stop"
            )


def main(arguments: list[str]) -> int:
    """Run the job of the command line; return the exit code."""
    write = json_lines()
    try:
        _run_commands(arguments, write)
    except (RunnerError, runtimes.EngineError) as error:
        message = str(error)
    except MemoryError:
        message = "this device is out of memory; measure a smaller model or batch"
    except Exception as error:
        message = f"{type(error).__name__}: {one_line(error)}"
    else:
        return 0
    write({"event": "error", "message": message})
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
