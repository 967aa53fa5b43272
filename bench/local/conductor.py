"""Measure several models against each other: a process each, all alive together, one running at a
time, turns in random order.

This file needs Python 3.9 and, beside it, runner.py, environment.py, energy.py and the folder
runtimes; nothing of vitrim. So it does the same work on a device:

    python conductor.py plan.json result.json

Plan: jobs ({name: job of runner.py}), seed, threads, turn_s, least_rounds, most_rounds, half_width,
time_limit_s, warm_limit_s, dataset, dataset_limit, profile (runs), and for emulated processors
command (what runs a Python file there) and emulator (its name). The result holds raw samples and
what the runners told; progress lines go to standard output.
"""

from __future__ import annotations

import os
import sys

# Run as a file inside its package, this folder would shadow the standard library's `statistics` and
# `warnings`.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import datetime
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
    9: "a kill, most often for want of memory",
    11: "a memory fault",
}


class ConductorError(Exception):
    """One line: which runner failed, how, and the way out."""


class Here:
    """This machine, where the runners are; another place is given to `conduct` as an object with
    the same methods.

    command: what runs a Python file here, this very interpreter by default; an emulated processor
    is led to by another command line.
    """

    def __init__(self, command: "list[str] | None" = None) -> None:  # noqa: UP037 - Python 3.9 reads it
        self.command = command or [sys.executable]
        self.meter: Any = None

    def runner(self, job: Json) -> "list[str]":  # noqa: UP037 - Python 3.9 reads it
        """The command that starts a runner for a job, which it will read from standard input."""
        # A runtime whose packages suit no other lives in an interpreter of its own.
        start = job.get("command") or ([job["python"]] if job.get("python") else self.command)
        return [*start, os.path.join(HERE, "runner.py"), "-"]

    def child(self, name: str, job: Json, reply_limit_s: float) -> Child:
        """A runner that has loaded its model."""
        return Child(name, job, reply_limit_s, self.runner(job))

    def environment(self) -> Json:
        """The machine and its state."""
        # In a process of its own, like the runners, so that the file travels as it is.
        done = subprocess.run(
            [*self.command, os.path.join(HERE, "environment.py")],
            stdout=subprocess.PIPE,
            check=True,
        )
        found: Json = json.loads(done.stdout.decode())
        return found

    def watch_energy(self, gpu: bool) -> str | None:
        """Open the meter nearest to what runs the models, and say which it is; None where nothing
        tells.
        """
        self.meter = _beside("energy").open_meter(gpu=gpu)
        return None if self.meter is None else f"{self.meter.source} ({self.meter.scope})"

    def energy_j(self) -> float | None:
        """Joules that the meter shows."""
        found: float | None = None if self.meter is None else self.meter.read_j()
        return found

    def close(self) -> None:
        """Let the meter go."""
        if self.meter is not None:
            self.meter.close()


class Child:
    """One runner in a fresh process, spoken to by JSON lines."""

    def __init__(
        self, name: str, job: Json, reply_limit_s: float, command: list[str] | None = None
    ) -> None:
        self.name = name
        self.reply_limit_s = reply_limit_s
        self.noise = tempfile.TemporaryFile()
        # Threads of numpy's own would run beside the model.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = command or Here().runner(job)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.noise,
                env=environment,
            )
        except OSError as error:
            self.noise.close()
            raise ConductorError(
                f"{name}: {command[0]} cannot be started ({error.strerror}); name another interpreter"
            ) from None
        self.lines: "queue.Queue[bytes | None]" = queue.Queue()  # noqa: UP037 - Python 3.9 reads it
        threading.Thread(target=self._listen, daemon=True).start()
        self._send(job)
        self.ready = self.hear("ready")

    def ask(self, do: str, **options: Any) -> Json:
        """Send a command and wait for its event."""
        self._send({"do": do, **options})
        return self.hear({"run": "samples"}.get(do, do))

    def score(self, dataset: str, limit: "int | None", progress: Callable[[Json], None]) -> Json:  # noqa: UP037 - Python 3.9 reads it
        """Top-1 over a data set; `progress` hears how far it is."""
        self._send({"do": "score", "dataset": dataset, "limit": limit})
        return self.hear("score", progress)

    def hear(self, wanted: str, progress: Callable[[Json], None] | None = None) -> Json:
        while True:
            try:
                line = self.lines.get(timeout=self.reply_limit_s)
            except queue.Empty:
                self.close()
                raise ConductorError(
                    f"{self.name}: no answer from its process for {self.reply_limit_s:.0f} s; it was stopped; measure a smaller model, or raise the limit"
                ) from None
            if line is None:
                raise self._died()
            event: Json = json.loads(line.decode())
            if event["event"] == "error":
                self.close()
                raise ConductorError(f"{self.name}: {event['message']}")
            if event["event"] == wanted:
                return event
            if progress is not None:
                progress(event)

    def close(self) -> None:
        """End the process, politely first."""
        if self.process.poll() is None:
            try:
                if self.process.stdin is not None:
                    self.process.stdin.close()
                self.process.wait(timeout=2)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        self.noise.close()

    def _listen(self) -> None:
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
            # The process is gone; hear() says how it ended, or passes on the error that it told
            # before.
            pass

    def _died(self) -> ConductorError:
        code = self.process.wait()
        self.noise.seek(0)
        said = " ".join(self.noise.read().decode(errors="replace").split())[-200:]
        self.close()
        how = f"ended with exit code {code}" + (f": {said}" if said else "")
        if code < 0:
            how = f"was ended by signal {-code} ({SIGNALS.get(-code, 'from outside')})"
        return ConductorError(
            f"{self.name}: its process {how}; nothing was measured; look for memory (`dmesg`), then measure again"
        )


def conduct(plan: Json, progress: Progress | None = None, place: Any = None) -> Json:
    """Carry out a plan and return raw results: {session, started_at, machine, before, after,
    stopped_by, rounds, runs: {name: run}}.

    place: where the runners are, like `Here`, which it is by default.
    """
    place = place or Here(plan.get("command"))
    tell = progress or (lambda share, text: None)
    order = random.Random(plan.get("seed", 0))
    names = list(plan["jobs"])
    result: Json = {
        "session": uuid.uuid4().hex,
        "started_at": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    environment = place.environment()
    result["machine"], result["before"] = environment["machine"], environment["state"]
    if plan.get("emulator"):
        # An emulated processor may look like the real one from inside; whoever starts it knows.
        result["machine"]["emulator"] = plan["emulator"]
    children: dict[str, Child] = {}
    runs: dict[str, Json] = {}
    if isinstance(place, Here):
        result["energy_source"] = place.watch_energy(
            any(_on_gpu(job) for job in plan["jobs"].values())
        )
    try:
        for name in names:
            tell(0.0, f"loading {name}")
            child = place.child(name, plan["jobs"][name], plan.get("reply_limit_s", 300.0))
            children[name] = child
            tell(0.0, f"warming {name}")
            warm = child.ask("warm", limit_s=plan.get("warm_limit_s", 10.0))
            runs[name] = {
                "ready": child.ready,
                "warm": warm,
                "latency_s": [],
                "samples_per_turn": [],
                "cpu_s": 0.0,
                "wall_s": 0.0,
                "energy_j": None,
            }
        result["rounds"], result["stopped_by"] = _rounds(
            plan, names, children, runs, order, tell, place
        )
        result["after"] = place.environment()["state"]
        for name in names:
            runs[name]["memory"] = children[name].ask("memory")
        for name in names:
            if plan.get("dataset"):
                runs[name]["score"] = children[name].score(
                    plan["dataset"],
                    plan.get("dataset_limit"),
                    lambda event, name=name: tell(
                        event["done"] / event["total"], f"top-1 of {name}"
                    ),  # type: ignore[misc]
                )
        for name in names if plan.get("profile") else []:
            tell(0.9, f"profiling {name}")
            try:
                runs[name]["profile"] = children[name].ask("profile", count=plan["profile"])
            except ConductorError as error:
                # Not every runtime tells; what was measured stands.
                runs[name]["profile_error"] = str(error)
    finally:
        for child in children.values():
            child.close()
        if isinstance(place, Here):
            place.close()
    result["runs"] = runs
    return result


def _rounds(
    plan: Json,
    names: list[str],
    children: dict[str, Child],
    runs: dict[str, Json],
    order: random.Random,
    tell: Progress,
    place: Any,
) -> tuple[int, str]:
    least, most = plan.get("least_rounds", 20), plan.get("most_rounds", 1000)
    limit_s, wanted = plan.get("time_limit_s", 60.0), plan.get("half_width", 0.01)
    counts = {
        name: samples_in_a_turn(runs[name]["warm"]["p50_s"], plan.get("turn_s", 0.1))
        for name in names
    }
    medians: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    done = 0
    while True:
        turn = names[:]
        order.shuffle(turn)
        for name in turn:
            _take_turn(runs[name], children[name], counts[name], place)
            medians[name].append(_median(runs[name]["latency_s"][-counts[name] :]))
        done += 1
        elapsed = time.perf_counter() - start
        width = widest(medians)
        share = max(min(1.0, done / least) * (0.5 if width > wanted else 1.0), elapsed / limit_s)
        tell(
            min(1.0, share),
            f"round {done}, ratio known to ±{100 * width:.1f} %"
            if math.isfinite(width)
            else f"round {done}",
        )
        if done >= least and width <= wanted:
            return done, "precise"
        if elapsed >= limit_s:
            return done, "time"
        if done >= most:
            return done, "rounds"


def _take_turn(run: Json, child: Child, count: int, place: Any) -> None:
    p50_s = run["warm"]["p50_s"]
    settle = 2 if p50_s < 0.05 else 1 if p50_s < 1 else 0
    before_j = place.energy_j()
    samples = child.ask("run", count=count, settle=settle)
    after_j = place.energy_j()
    run["latency_s"] += samples["latency_s"]
    run["samples_per_turn"].append(count)
    run["cpu_s"] += samples["cpu_s"]
    run["wall_s"] += samples["wall_s"]
    if before_j is not None and after_j is not None and after_j >= before_j:
        # A counter that wrapped around is left out, not guessed.
        spent = run["energy_j"] or [0.0, 0]
        run["energy_j"] = [spent[0] + after_j - before_j, spent[1] + count + settle]


def samples_in_a_turn(p50_s: float, turn_s: float) -> int:
    """Enough calls to fill a turn, at least 5 of a quick model, at most 64, at least one of a slow
    one.
    """
    wanted = math.ceil(turn_s / max(p50_s, 1e-9))
    return max(5 if p50_s < 0.2 else 1, min(64, wanted))


def widest(medians: dict[str, list[float]]) -> float:
    """The relative half width, 95 %, of what is least known: each model's ratio to the first, or
    one model's own median.
    """
    names = list(medians)
    if len(names) == 1:
        return _half_width(medians[names[0]])
    return max(
        _half_width([a / b for a, b in zip(medians[name], medians[names[0]])]) for name in names[1:]
    )


def _half_width(values: list[float]) -> float:
    # Order statistics of a binomial: a distribution-free interval of the median, in which a few
    # disturbed rounds weigh little.
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


def _beside(name: str) -> Any:
    # By file: on a device these files are no package.
    from importlib import util

    spec = util.spec_from_file_location(f"vitrim_{name}", os.path.join(HERE, f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ConductorError(f"{name}.py is not beside conductor.py; copy the folder whole")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_aside(path: str, content: Json) -> None:
    with open(path + ".part", "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path + ".part", path)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        sys.stderr.write(
            "two arguments are wanted: the plan to read and the result to write, both JSON\n"
        )
        return 2
    with open(arguments[0]) as stream:
        plan = json.load(stream)

    def progress(share: float, text: str) -> None:
        sys.stdout.write(json.dumps({"share": round(share, 3), "text": text}) + "\n")
        sys.stdout.flush()

    try:
        _write_aside(arguments[1], {"result": conduct(plan, progress)})
    except ConductorError as error:
        _write_aside(arguments[1], {"error": str(error)})
        return 3
    except Exception as error:
        _write_aside(
            arguments[1], {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        )
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
