"""Measure several models in turns, in rounds of random order, each in a process of its own.

All processes stay alive and one runs at a time. This file needs Python 3.9 and, next to it,
runner.py, environment.py, energy.py and the folder runtimes; nothing of vitrim. Copied to a device,
it does the same work there:

    python conductor.py plan.json result.json

Plan: jobs ({name: job of runner.py}; scored_by names another job that counts its top-1), seed,
threads, turn_s, least_rounds, most_rounds, half_width, time_limit_s, warm_limit_s, dataset,
dataset_limit, profile (runs), and for emulated processors command (what runs a Python file there)
and emulator (its name). The result contains raw samples and the runners' events; progress lines go
to standard output.
"""

from __future__ import annotations

import os
import sys

# Run as a file inside its package, this folder would shadow the standard library's `statistics` and
# `warnings`.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import json
import math
import queue
import random
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Progress = Callable[[float, str], None]
HERE = os.path.dirname(os.path.abspath(__file__))
SIGNALS = {
    4: "an illegal instruction",
    6: "its own abort",
    7: "a bus error",
    9: "a kill, most often because memory ran out",
    11: "a memory fault",
}


class ConductorError(Exception):
    """Which runner failed, how, and what to do, in one line."""


class LocalExecutor:
    """Starts runners on this machine; `conduct` takes any object with these methods.

    command: The command line that runs a Python file, by default this interpreter; an emulated
        processor needs another one.
    """

    def __init__(self, command: list[str] | None = None) -> None:
        self.command = command or [sys.executable]
        self.meter: Any = None

    def runner_command(self, job: Json) -> list[str]:
        """Return the command that starts a runner, which reads the job from standard input."""
        # A runtime whose packages conflict with others has an interpreter of its own.
        start = job.get("command") or ([job["python"]] if job.get("python") else self.command)
        return [*start, os.path.join(HERE, "runner.py"), "-"]

    def start_runner(self, name: str, job: Json, reply_limit_s: float) -> RunnerProcess:
        """Start a runner and wait until its model is loaded."""
        return RunnerProcess(name, job, reply_limit_s, self.runner_command(job))

    def environment(self) -> Json:
        """Return the machine and its present state."""
        # A subprocess, as for the runners: environment.py runs unchanged here and on devices.
        done = subprocess.run(
            [*self.command, os.path.join(HERE, "environment.py")],
            stdout=subprocess.PIPE,
            check=True,
        )
        found: Json = json.loads(done.stdout.decode())
        return found

    def open_meter(self, gpu: bool) -> str | None:
        """Open the energy meter closest to what runs the models and return its title, or None."""
        self.meter = _load_neighbour("energy").open_meter(gpu=gpu)
        return None if self.meter is None else f"{self.meter.source} ({self.meter.scope})"

    def energy_j(self) -> float | None:
        """Return the meter's reading in joules; None without a meter."""
        found: float | None = None if self.meter is None else self.meter.read_j()
        return found

    def close(self) -> None:
        """Close the meter."""
        if self.meter is not None:
            self.meter.close()


class RunnerProcess:
    """A runner in a fresh process, controlled by JSON lines."""

    def __init__(
        self, name: str, job: Json, reply_limit_s: float, command: list[str] | None = None
    ) -> None:
        self.name = name
        self.reply_limit_s = reply_limit_s
        self.stderr = tempfile.TemporaryFile()
        # Threads of numpy's own would run next to the model.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = command or LocalExecutor().runner_command(job)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=environment,
            )
        except OSError as error:
            self.stderr.close()
            raise ConductorError(
                f"{name}: {command[0]} cannot be started ({error.strerror}); "
                "name another interpreter"
            ) from None
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read_lines, daemon=True).start()
        self._send(job)
        self.ready = self._wait_for("ready")

    def request(self, do: str, **options: Any) -> Json:
        """Send a command and wait for its event."""
        self._send({"do": do, **options})
        return self._wait_for({"run": "samples"}.get(do, do))

    def score(self, dataset: str, limit: int | None, progress: Callable[[Json], None]) -> Json:
        """Count top-1 over a data set; `progress` receives the progress events."""
        self._send({"do": "score", "dataset": dataset, "limit": limit})
        return self._wait_for("score", progress)

    def close(self) -> None:
        """End the process: close its input, and kill it if it is still alive two seconds later."""
        if self.process.poll() is None:
            try:
                if self.process.stdin is not None:
                    self.process.stdin.close()
                self.process.wait(timeout=2)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        self.stderr.close()

    def _wait_for(self, wanted: str, progress: Callable[[Json], None] | None = None) -> Json:
        while True:
            try:
                line = self.lines.get(timeout=self.reply_limit_s)
            except queue.Empty:
                self.close()
                raise ConductorError(
                    f"{self.name}: no event from its process for {self.reply_limit_s:.0f} s; "
                    "it was stopped; measure a smaller model, or raise the limit"
                ) from None
            if line is None:
                raise self._ended()
            event: Json = json.loads(line.decode())
            if event["event"] == "error":
                self.close()
                raise ConductorError(f"{self.name}: {event['message']}")
            if event["event"] == wanted:
                return event
            if progress is not None:
                progress(event)

    def _read_lines(self) -> None:
        stream = self.process.stdout
        if stream is not None:
            for line in stream:
                self.lines.put(line)
        self.lines.put(None)

    def _send(self, command: Json) -> None:
        stream = self.process.stdin
        if stream is None:
            return
        try:
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()
        except OSError:
            # The process is gone; _wait_for() raises its last error event, or how it ended.
            pass

    def _ended(self) -> ConductorError:
        code = self.process.wait()
        self.stderr.seek(0)
        words = " ".join(self.stderr.read().decode(errors="replace").split())[-200:]
        self.close()
        how = f"ended with exit code {code}" + (f": {words}" if words else "")
        if code < 0:
            how = f"was ended by signal {-code} ({SIGNALS.get(-code, 'from outside')})"
        return ConductorError(
            f"{self.name}: its process {how}; nothing was measured; "
            "check the memory (`dmesg`), then measure again"
        )


def conduct(plan: Json, progress: Progress | None = None, executor: Any = None) -> Json:
    """Run a plan and return raw results.

    Args:
        plan: What to measure; see the top of this file.
        progress: Called with the share done (0 to 1) and a text.
        executor: What starts the runners, by default a `LocalExecutor`.

    Returns:
        {session, started_at, machine, before, after, stopped_by, rounds, runs: {name: run}}.

    Raises:
        ConductorError: A runner could not start, failed or did not respond.
    """
    executor = executor or LocalExecutor(plan.get("command"))
    progress = progress or (lambda share, text: None)
    names = list(plan["jobs"])
    result: Json = {
        "session": uuid.uuid4().hex,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    environment = executor.environment()
    result["machine"], result["before"] = environment["machine"], environment["state"]
    if plan.get("emulator"):
        # From inside, an emulated processor may look like the real one.
        result["machine"]["emulator"] = plan["emulator"]
    runners: dict[str, RunnerProcess] = {}
    runs: dict[str, Json] = {}
    if isinstance(executor, LocalExecutor):
        gpu = any(_on_gpu(job) for job in plan["jobs"].values())
        result["energy_source"] = executor.open_meter(gpu)
    try:
        for name in names:
            _start(name, plan, executor, progress, runners, runs)
        result["rounds"], result["stopped_by"] = _rounds(plan, runners, runs, progress, executor)
        result["after"] = executor.environment()["state"]
        for name in names:
            runs[name]["memory"] = runners[name].request("memory")
        for name in names if plan.get("dataset") else []:
            # Buckets of one artifact are counted together, in one pass over the data.
            scorer = plan["jobs"][name].get("scored_by", name)
            if "score" not in runs[scorer]:
                runs[scorer]["score"] = _score(scorer, plan, runners[scorer], progress)
            runs[name]["score"] = runs[scorer]["score"]
        for name in names if plan.get("profile") else []:
            progress(0.9, f"profiling {name}")
            try:
                runs[name]["profile"] = runners[name].request("profile", count=plan["profile"])
            except ConductorError as error:
                # Some runtimes have no profiler; the samples remain valid.
                runs[name]["profile_error"] = str(error)
    finally:
        for runner in runners.values():
            runner.close()
        if isinstance(executor, LocalExecutor):
            executor.close()
    result["runs"] = runs
    return result


def _start(
    name: str,
    plan: Json,
    executor: Any,
    progress: Progress,
    runners: dict[str, RunnerProcess],
    runs: dict[str, Json],
) -> None:
    progress(0.0, f"loading {name}")
    runner = executor.start_runner(name, plan["jobs"][name], plan.get("reply_limit_s", 300.0))
    runners[name] = runner
    progress(0.0, f"warming {name}")
    runs[name] = {
        "ready": runner.ready,
        "warm": runner.request("warm", limit_s=plan.get("warm_limit_s", 10.0)),
        "latency_s": [],
        "samples_per_turn": [],
        "cpu_s": 0.0,
        "wall_s": 0.0,
        "energy_j": None,
    }


def _score(name: str, plan: Json, runner: RunnerProcess, progress: Progress) -> Json:
    def report(event: Json) -> None:
        progress(event["done"] / event["total"], f"top-1 of {name}")

    return runner.score(plan["dataset"], plan.get("dataset_limit"), report)


def _rounds(
    plan: Json,
    runners: dict[str, RunnerProcess],
    runs: dict[str, Json],
    progress: Progress,
    executor: Any,
) -> tuple[int, str]:
    """Measure in rounds; return their number and what ended them: precise, time or rounds."""
    least, most = plan.get("least_rounds", 20), plan.get("most_rounds", 1000)
    limit_s, wanted = plan.get("time_limit_s", 60.0), plan.get("half_width", 0.01)
    names, shuffler = list(runners), random.Random(plan.get("seed", 0))
    counts = {
        name: samples_in_a_turn(runs[name]["warm"]["p50_s"], plan.get("turn_s", 0.1))
        for name in names
    }
    medians: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    done = 0
    while True:
        order = names[:]
        shuffler.shuffle(order)
        for name in order:
            _take_turn(runs[name], runners[name], counts[name], executor)
            medians[name].append(_median(runs[name]["latency_s"][-counts[name] :]))
        done += 1
        elapsed = time.perf_counter() - start
        width = widest(medians)
        share = max(min(1.0, done / least) * (0.5 if width > wanted else 1.0), elapsed / limit_s)
        known = f", ratio known to ±{100 * width:.1f} %" if math.isfinite(width) else ""
        progress(min(1.0, share), f"round {done}{known}")
        if done >= least and width <= wanted:
            return done, "precise"
        if elapsed >= limit_s:
            return done, "time"
        if done >= most:
            return done, "rounds"


def _take_turn(run: Json, runner: RunnerProcess, count: int, executor: Any) -> None:
    p50_s = run["warm"]["p50_s"]
    settle = 2 if p50_s < 0.05 else 1 if p50_s < 1 else 0
    before_j = executor.energy_j()
    samples = runner.request("run", count=count, settle=settle)
    after_j = executor.energy_j()
    run["latency_s"] += samples["latency_s"]
    run["samples_per_turn"].append(count)
    run["cpu_s"] += samples["cpu_s"]
    run["wall_s"] += samples["wall_s"]
    # A turn in which the counter wrapped around is left out.
    if before_j is not None and after_j is not None and after_j >= before_j:
        total_j, inferences = run["energy_j"] or [0.0, 0]
        run["energy_j"] = [total_j + after_j - before_j, inferences + count + settle]


def samples_in_a_turn(p50_s: float, turn_s: float) -> int:
    """Return how many calls fill a turn: 5 to 64 of a fast model, at least 1 of a slow one."""
    wanted = math.ceil(turn_s / max(p50_s, 1e-9))
    return max(5 if p50_s < 0.2 else 1, min(64, wanted))


def widest(medians: dict[str, list[float]]) -> float:
    """Return the widest relative half width (95 %) among the models' ratios to the first one.

    With a single model it is the half width of its own median. `medians` holds each model's median
    latency in every round.
    """
    names = list(medians)
    if len(names) == 1:
        return _half_width(medians[names[0]])
    return max(
        _half_width([a / b for a, b in zip(medians[name], medians[names[0]])]) for name in names[1:]
    )


def _half_width(values: list[float]) -> float:
    # The distribution-free interval of the median by binomial order statistics: a few disturbed
    # rounds have little weight.
    n = len(values)
    reach = math.floor(n / 2 - 0.98 * math.sqrt(n))
    if reach < 1:
        return math.inf
    values = sorted(values)
    return (values[n - reach] - values[reach - 1]) / 2 / _median(values)


def _median(values: list[float]) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def _on_gpu(job: Json) -> bool:
    first = (job.get("providers") or [""])[0]
    return first.startswith(("CUDA", "Tensorrt", "NvTensorRT")) or job.get("device") == "cuda"


def _load_neighbour(name: str) -> Any:
    # Loaded by file name: on a device these files are no package.
    from importlib import util

    spec = util.spec_from_file_location(f"vitrim_{name}", os.path.join(HERE, f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ConductorError(f"{name}.py is missing next to conductor.py; copy the whole folder")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_result(path: str, content: Json) -> None:
    with open(path + ".part", "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path + ".part", path)


def main(arguments: list[str]) -> int:
    """Run the plan of the command line; return the exit code."""
    if len(arguments) != 2:
        sys.stderr.write("expected two arguments: the plan to read and the result to write\n")
        return 2
    with open(arguments[0]) as stream:
        plan = json.load(stream)

    def progress(share: float, text: str) -> None:
        sys.stdout.write(json.dumps({"share": round(share, 3), "text": text}) + "\n")
        sys.stdout.flush()

    try:
        content: Json = {"result": conduct(plan, progress)}
    except ConductorError as error:
        content = {"error": str(error)}
    except Exception as error:
        content = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    _write_result(arguments[1], content)
    return 3 if "error" in content else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
