"""vitrim's runner and another program, timing the same model in turns of random order."""

from __future__ import annotations

import contextlib
import math
import os
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from vitrim.bench.local.conductor import RunnerProcess
from vitrim.bench.local.measure import make_plan
from vitrim.bench.results.statistics import Interval, ratio_interval

# The first calls of a turn bring the data back into the caches.
UNTIMED = 2


class TimingProgram:
    """A program that times as many inferences as a line on its input requests.

    It prints their seconds in one line. Lines before that have other contents.
    """

    def __init__(self, command: Sequence[str], niceness: int) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        # The same priority as the runner has.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, niceness)

    def request(self, count: int) -> list[float]:
        """Seconds of `count` inferences."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline().split()) or "%" in line:
            # The labels of the image come first.
            pass
        return [float(value) for value in line]

    def close(self) -> None:
        """End its input, and wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Comparison:
    """Latencies of both, in seconds.

    Attributes:
        samples_per_turn: Inferences of each turn of either.
        peak_rss_bytes: Peak memory of the runner.
    """

    runner_s: list[float]
    program_s: list[float]
    samples_per_turn: int
    rounds: int
    peak_rss_bytes: int

    def program_over_runner(self) -> Interval:
        """Ratio of the program's time to the runner's, with its 95 % interval."""
        turns = [self.samples_per_turn] * self.rounds
        return ratio_interval(self.program_s, self.runner_s, turns, turns, paired=True, level=0.95)

    def runner_over_program(self) -> Interval:
        """Ratio of the runner's time to the program's, with its 95 % interval."""
        turns = [self.samples_per_turn] * self.rounds
        return ratio_interval(self.runner_s, self.program_s, turns, turns, paired=True, level=0.95)


def compare_with_runner(
    model: Path, command: Sequence[str], *, threads: int, rounds: int, turn_s: float
) -> Comparison:
    """Time a model by the runner and by a program, both alive, in turns of random order.

    Args:
        model: An artifact folder, or an .onnx file.
        command: The program; `SHAPE` in it is replaced by the sizes of the model's input.
        threads: Threads of the runner.
        rounds: Turns of each.
        turn_s: About how long a turn lasts.
    """
    plan, _ = make_plan({"runner": model}, threads=threads)
    runner = RunnerProcess("runner", plan["jobs"]["runner"], 300.0)
    shape = [str(size) for size in runner.ready["input_shape"]]
    words = [word for part in command for word in (shape if part == "SHAPE" else [part])]
    program = TimingProgram(words, runner.ready["niceness"])
    order = random.Random(0)
    runner_s: list[float] = []
    program_s: list[float] = []
    try:
        p50_s = runner.request("warm")["p50_s"]
        count = max(5, min(200, math.ceil(turn_s / p50_s)))
        program.request(count)
        for _ in range(rounds):
            for name in order.sample(["runner", "program"], 2):
                if name == "runner":
                    options: dict[str, Any] = {"count": count, "settle": UNTIMED}
                    runner_s += runner.request("run", **options)["latency_s"]
                else:
                    program_s += program.request(count + UNTIMED)[UNTIMED:]
        memory = runner.request("memory")
    finally:
        runner.close()
        program.close()
    return Comparison(runner_s, program_s, count, rounds, memory["peak_rss_bytes"])


def runtime_library() -> Path:
    """The shared library of the installed onnxruntime."""
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
