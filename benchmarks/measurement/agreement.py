"""Does bench's p50 agree with another's tool? `python -m benchmarks.measurement.agreement`.

The same OpenVINO file is timed by bench/local/runner.py and by OpenVINO's own `benchmark_app`
(synchronous, one request), with the same threads, precision and priority. Both processes are alive
and take turns of half a second: benchmark_app is stopped (SIGSTOP) while the runner measures. Where
its memory lies makes a process some per cent faster or slower for all of its life, so several pairs
of processes are taken. Told: the ratio of the p50s of each pair, their median (goal: within 3 %)
and extremes. benchmark_app tells its median to 0.01 ms, so a model of ten milliseconds or more is
wanted.

    python -m benchmarks.measurement.agreement [ARTIFACT] [--pairs 7] [--turns 12] [--threads 1] [--json FILE]

Without an artifact DeiT-T with random weights is exported for openvino (`pip install
'vitrim[openvino]'`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitrim.bench.local import environment
from vitrim.bench.local.conductor import RunnerProcess
from vitrim.bench.local.measure import make_plan
from vitrim.bench.local.options import MeasureOptions
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact

RESULTS = Path(__file__).parent / "results"
GOAL = 0.03
TURN_S = 0.5


def sample(folder: Path) -> Path:
    """DeiT-T for OpenVINO."""
    import timm
    import torch
    import vitrim
    from vitrim.export.exporter import export

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = vitrim.lift(timm.create_model("vit_tiny_patch16_224").eval())
    return export(model, folder / "deit-t", runtime="openvino", name="DeiT-T fp32").folder


class BenchmarkApp:
    """OpenVINO's tool in a process of its own, that measures only while it is let; synchronous, one
    request, `count` inferences.
    """

    def __init__(self, program: str, model: Path, threads: int, count: int, folder: Path) -> None:
        self.report = folder / "benchmark_report.json"
        command = [
            *(
                program,
                "-m",
                str(model),
                "-d",
                "CPU",
                "-api",
                "sync",
                "-hint",
                "none",
                "-nthreads",
                str(threads),
                "-nstreams",
                "1",
            ),
            *(
                "-niter",
                str(count),
                "-infer_precision",
                "f32",
                "-report_type",
                "no_counters",
                "-json_stats",
                "-report_folder",
                str(folder),
            ),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Measuring performance" in line:
                self.process.send_signal(signal.SIGSTOP)
                return
        raise InputError(
            f"benchmark_app ended with {self.process.wait()}: {' '.join(''.join(said).split())[-300:]}"
        )

    def go_on(self, seconds: float) -> bool:
        """Let it measure for a while; False once it has done all of its inferences."""
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGSTOP)
            return True
        return False

    def p50_s(self) -> float:
        """What it told at its end, in steps of 0.01 ms. Every turn spoils one inference of many,
        which a median does not see.
        """
        return float(json.loads(self.report.read_text())["execution_results"]["latency (ms)"]) / 1e3


def pair(
    artifact: Artifact, program: str, threads: int, turns: int, folder: Path
) -> tuple[float, float]:
    """p50 in seconds by the runner and by benchmark_app, both processes alive, taking turns."""
    plan, _ = make_plan(
        {"runner": artifact.folder}, MeasureOptions(threads=threads, priority="normal")
    )
    runner = RunnerProcess("runner", plan["jobs"]["runner"], 300.0)
    try:
        count = max(5, math.ceil(TURN_S / runner.request("warm", limit_s=3.0)["p50_s"]))
        app = BenchmarkApp(program, artifact.model_path, threads, turns * count, folder)
        latency_s: list[float] = []
        while app.go_on(TURN_S):
            latency_s += runner.request("run", count=count, settle=1)["latency_s"]
    finally:
        runner.close()
    return statistics.median(latency_s), app.p50_s()


def agree(
    artifact: Artifact, program: str, *, pairs: int, turns: int, threads: int, folder: Path
) -> dict[str, Any]:
    """Both medians of each pair of processes, and the ratio runner / benchmark_app."""
    found = []
    for number in range(pairs):
        found.append(pair(artifact, program, threads, turns, folder))
        ours, theirs = found[-1]
        print(
            f"pair {number + 1}: runner {ours * 1e3:8.3f} ms, benchmark_app {theirs * 1e3:8.3f} ms, ratio {ours / theirs:.4f}",
            flush=True,
        )
    ratios = [ours / theirs for ours, theirs in found]
    return {
        "artifact": artifact.manifest.name,
        "threads": threads,
        "turns": turns,
        "runner_p50_s": [ours for ours, _ in found],
        "benchmark_app_p50_s": [theirs for _, theirs in found],
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", nargs="?", type=Path, help="an artifact for openvino, fp32")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "agreement.json")
    options = parser.parse_args()
    beside = Path(sys.executable).parent / "benchmark_app"
    program = str(beside) if beside.is_file() else shutil.which("benchmark_app")
    if program is None:
        print(
            "benchmark_app is not here; it comes with OpenVINO's wheel: pip install 'vitrim[openvino]'",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as name:
        try:
            artifact = Artifact.load(options.artifact or sample(Path(name)))
            row = agree(
                artifact,
                program,
                pairs=options.pairs,
                turns=options.turns,
                threads=options.threads,
                folder=Path(name),
            )
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
    within = abs(row["ratio"] - 1) < GOAL
    print(
        f"runner / benchmark_app: {row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f}), goal within {100 * GOAL:.0f} %: {'yes' if within else 'no'}"
    )
    options.json.write_text(
        json.dumps({"machine": environment.read_machine(), "goal": GOAL, **row}, indent=1) + "\n"
    )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
