"""Run one model in this process and tell what happened: one JSON line an event on standard output.

This file needs Python 3.9 with numpy and the model's runtime, and nothing of vitrim: copied to a
device beside the folder `runtimes` it does the same work there.

    python runner.py '{"model": "model.onnx", "commands": [{"do": "warm"}, {"do": "run", "count":
    100}, {"do": "memory"}]}' python runner.py - < job.json            (the job alone, on the first
    line; further commands one JSON object a line)

Job: model (path), runtime (onnxruntime if absent), threads, pinning (list of CPU numbers), priority
(high or normal), spinning, arena, providers, batch (for a free batch dimension), seed, session
(settings of the runtime), preprocessing ({"mean", "std"} for data sets of bytes), input and output
(what the manifest says of them), commands (else they are read from standard input). Commands: warm
{limit_s}, run {count, settle}, memory, score {dataset, limit}, profile {count}, stop. Events:
ready, warm, samples, memory, progress, score, profile, error (with a one-line message; the process
then exits with 3).
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
    """The package `runtimes`: beside this file on a device, beside this folder in the package."""
    place = (
        HERE
        if os.path.isdir(os.path.join(HERE, "runtimes"))
        else os.path.dirname(os.path.dirname(HERE))
    )
    sys.path.insert(0, place)
    try:
        return importlib.import_module("runtimes")
    finally:
        del sys.path[0]


runtimes = load_runtimes()


class RunnerError(Exception):
    """One line that says why the job cannot be done."""


# ---- memory ----------------------------------------------------------------------------------------------------------------------------


def read_memory_bytes() -> tuple[int | None, int | None]:
    """(resident now, highest since the last reset) in bytes; None where the system does not
    tell.
    """
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
    """Start the high-water mark anew (Linux: 5 into clear_refs); False where that is not
    permitted.
    """
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


# ---- the processor ---------------------------------------------------------------------------------------------------------------------


def current_niceness() -> int | None:
    """The scheduler's niceness of this process, -20 (first) to 19 (last); None where there is no
    such thing.
    """
    try:
        return os.getpriority(os.PRIO_PROCESS, 0)
    except (OSError, AttributeError):
        return None


def take_priority() -> int | None:
    """Go before other work where that is permitted (root, as a rule): a sample should be the
    model's time, not a neighbour's.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    return current_niceness()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# ---- what can be asked -----------------------------------------------------------------------------------------------------------------


class Runner:
    """A loaded model with one fixed input."""

    def __init__(self, job: Json) -> None:
        self.job = job
        if job.get("pinning"):
            try:
                os.sched_setaffinity(0, set(job["pinning"]))
            except (OSError, AttributeError) as error:
                raise RunnerError(
                    f"cannot pin to the CPUs {job['pinning']}: {one_line(error)}; name CPUs that this machine has"
                ) from None
        self.niceness = (
            take_priority() if job.get("priority", "high") == "high" else current_niceness()
        )
        self.engine = runtimes.open_engine(job)
        try:
            import numpy
        except ImportError as error:
            raise RunnerError(
                f"numpy is missing here: {one_line(error)}; install it with `python3 -m pip install numpy`"
            ) from None
        self.numpy = numpy
        gc.collect()
        self.floor_bytes, _ = read_memory_bytes()
        was_reset = reset_peak()
        _, after_reset = read_memory_bytes()
        # Where the mark cannot be reset it may still show the import of the runtime instead of the
        # model.
        self.peak_exact = was_reset or after_reset == self.floor_bytes

        start = time.perf_counter()
        self.engine.load()
        self.load_s = time.perf_counter() - start

        self.shape, self.type = self.engine.input_shape, self.engine.input_type
        images = numpy.random.default_rng(int(job.get("seed", 0))).standard_normal(
            self.shape, dtype=numpy.float32
        )
        self.images = (
            (images * 64 + 128).clip(0, 255).astype("uint8")
            if self.type == "uint8"
            else images.astype(self.type)
        )
        self.infer = self.engine.infer
        start = time.perf_counter()
        self.infer(self.images)
        self.first_s = time.perf_counter() - start
        self.call = self.engine.timed_call(self.images)

    def ready(self) -> Json:
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
        """Run until the medians of two windows in a row agree within `tolerance`, or the limit is
        reached.
        """
        start = time.perf_counter()
        window = 5 if self.first_s < 0.5 else 1
        count, stable = 0, False
        before: float | None = None
        while True:
            middle = sorted(self.timed(window))[window // 2]
            count += window
            elapsed = time.perf_counter() - start
            if (
                before is not None
                and elapsed >= least_s
                and abs(middle - before) <= tolerance * before
            ):
                stable = True
                break
            if elapsed >= limit_s:
                break
            before = middle
        return {"event": "warm", "count": count, "stable": stable, "p50_s": middle}

    def timed(self, count: int) -> list[float]:
        call, clock = self.call, time.perf_counter
        latency_s = []
        for _ in range(count):
            start = clock()
            call()
            latency_s.append(clock() - start)
        return latency_s

    def run(self, count: int, settle: int = 2) -> Json:
        """`count` timed calls after `settle` calls that bring the caches back after another
        process's turn.
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
        now, peak = read_memory_bytes()
        # In this order: what the engine does to tell its arena takes memory itself.
        device = self.engine.device_memory_peak_bytes()
        told = {
            "peak_rss_bytes": peak,
            "steady_rss_bytes": now,
            "device_memory_peak_bytes": device,
            "arena_bytes": self.engine.arena_bytes(),
        }
        return {"event": "memory", **told}

    def score(self, dataset: str, limit: int | None = None) -> Iterator[Json]:
        """Top-1 over a data set, at the batch that is timed."""
        numpy = self.numpy
        images, labels = open_dataset(numpy, dataset)
        total = len(labels) if limit is None else min(limit, len(labels))
        batch, correct, told = self.shape[0], 0, time.perf_counter()
        for first in range(0, total, batch):
            last = min(first + batch, total)
            chunk = prepare_images(
                numpy, images[first:last], self.shape, self.type, self.job.get("preprocessing")
            )
            if len(chunk) < batch:
                # A fixed batch is filled up with copies of the last image, whose answers are not
                # counted.
                chunk = numpy.concatenate(
                    [chunk, numpy.repeat(chunk[-1:], batch - len(chunk), axis=0)]
                )
            answers = self.infer(numpy.ascontiguousarray(chunk)).reshape(batch, -1)[: last - first]
            if not numpy.isfinite(answers).all():
                raise RunnerError(
                    f"the model answers with infinite or missing numbers for image {first} of {os.path.basename(dataset)}"
                )
            classes = answers.shape[1]
            if int(labels[first:last].max()) >= classes or int(labels[first:last].min()) < 0:
                raise RunnerError(
                    f"{os.path.basename(dataset)}: has labels outside of the model's {classes} classes; give the set it was trained on"
                )
            correct += int((answers.argmax(axis=1) == labels[first:last]).sum())
            if time.perf_counter() - told > 1:
                told = time.perf_counter()
                yield {"event": "progress", "done": last, "total": total}
        yield {"event": "score", "correct": correct, "total": total}

    def profile(self, count: int = 10) -> Json:
        """One row an operator, from the runtime's own profiler."""
        return {"event": "profile", "runs": count, "rows": self.engine.profile(self.images, count)}


# ---- the data set ----------------------------------------------------------------------------------------------------------------------


def open_dataset(numpy: Any, path: str) -> tuple[Any, Any]:
    """`images` and `labels` of an .npz file, or of a folder with images.npy (read as it is needed)
    and labels.npy.
    """
    name = os.path.basename(path.rstrip("/"))
    try:
        if os.path.isdir(path):
            images = numpy.load(os.path.join(path, "images.npy"), mmap_mode="r", allow_pickle=False)
            labels = numpy.load(os.path.join(path, "labels.npy"), allow_pickle=False)
        else:
            with numpy.load(path, allow_pickle=False) as archive:
                images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError) as error:
        raise RunnerError(
            f"{name}: not a data set ({one_line(error)}); give an .npz with the arrays `images` and `labels`"
        ) from None
    if (
        labels.ndim != 1
        or labels.dtype.kind not in "iu"
        or len(labels) != len(images)
        or len(labels) == 0
    ):
        raise RunnerError(
            f"{name}: {len(images)} images and labels of shape {labels.shape} {labels.dtype}; give one whole number for each image"
        )
    return images, labels


def prepare_images(
    numpy: Any, images: Any, shape: list[int], kind: str, preprocessing: Json | None
) -> Any:
    """Images as the model wants them: floats pass unchanged, bytes are put in channel order and
    normalised as the manifest says.
    """
    channels, height, width = shape[1:4]
    if images.ndim == 3 and channels == 1:
        images = images[:, None]
    elif (
        images.dtype == numpy.uint8
        and images.ndim == 4
        and images.shape[1] != channels
        and images.shape[3] == channels
    ):
        images = images.transpose(0, 3, 1, 2)
    if list(images.shape[1:]) != shape[1:]:
        raise RunnerError(
            f"the data set's images are {list(images.shape[1:])}, the model takes {[channels, height, width]}; prepare them at that size"
        )
    if images.dtype == numpy.uint8 and kind != "uint8":
        if not preprocessing:
            raise RunnerError(
                "the data set holds bytes, and no mean and std are known to normalise them; give prepared float32 images, or an artifact"
            )
        mean = numpy.asarray(preprocessing["mean"], dtype=numpy.float32).reshape(1, -1, 1, 1)
        std = numpy.asarray(preprocessing["std"], dtype=numpy.float32).reshape(1, -1, 1, 1)
        images = (images.astype(numpy.float32) / 255 - mean) / std
    return images.astype(kind, copy=False)


# ---- the conversation ------------------------------------------------------------------------------------------------------------------


def json_lines() -> Callable[[Json], None]:
    """What writes a line of JSON to standard output, which it has to itself from now on: whatever a
    library prints goes to standard error.
    """
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(line: Json) -> None:
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    return tell


def main(arguments: list[str]) -> int:
    tell = json_lines()
    try:
        if len(arguments) != 1:
            raise RunnerError(
                "one argument is wanted: the job as JSON, or - to read it from standard input"
            )
        try:
            job = json.loads(sys.stdin.readline() if arguments[0] == "-" else arguments[0])
            commands = (
                iter(job["commands"])
                if "commands" in job
                else (json.loads(line) for line in sys.stdin if line.strip())
            )
            job["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunnerError(
                f"the job is no JSON object with a model: {one_line(error)}"
            ) from None
        runner = Runner(job)
        tell(runner.ready())
        for command in commands:
            options = {key: value for key, value in command.items() if key != "do"}
            action = command.get("do")
            if action == "stop":
                break
            if action == "score":
                for event in runner.score(**options):
                    tell(event)
            elif action in ("warm", "run", "memory", "profile"):
                tell(getattr(runner, action)(**options))
            else:
                raise RunnerError(
                    f"unknown command {action!r}; it can be warm, run, memory, score, profile or stop"
                )
    except (RunnerError, runtimes.EngineError) as error:
        tell({"event": "error", "message": str(error)})
        return 3
    except MemoryError:
        tell(
            {
                "event": "error",
                "message": "the memory of this device is used up; measure a smaller model or batch",
            }
        )
        return 3
    except Exception as error:
        tell({"event": "error", "message": f"{type(error).__name__}: {one_line(error)}"})
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
