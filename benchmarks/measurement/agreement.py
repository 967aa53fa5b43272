"""p50 compared with OpenVINO's `benchmark_app`: `python -m benchmarks.measurement.agreement`.

The same OpenVINO file is timed by bench/local/runner.py and by `benchmark_app` (synchronous, one
request), with the same threads, precision and priority. Both processes are alive and take turns of
half a second: benchmark_app is stopped (SIGSTOP) while the runner measures. The place of its memory
makes a process some per cent faster or slower for all of its life, so several pairs of processes
are measured. Reported are the ratio of the p50s of each pair, their median (goal: within 3 %) and
extremes. benchmark_app reports its median to 0.01 ms, so the model should take at least ten
milliseconds.

    python -m benchmarks.measurement.agreement [ARTIFACT] [--pairs 7] [--turns 12] [--threads 1]
        [--json FILE]

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

import torch
from vitrim.bench.local.conductor import RunnerProcess
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.measure import make_plan
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export

from ..models import lifted
from ..results_file import RESULTS, save_result

GOAL = 0.03
TURN_S = 0.5
FLAGS = (
    *("-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"),
    *("-infer_precision", "f32", "-report_type", "no_counters", "-json_stats"),
)


def sample(folder: Path) -> Path:
    """Export DeiT-T for OpenVINO."""
    torch.set_num_threads(1)
    model = lifted("vit_tiny_patch16_224")
    return export(model, folder / "deit-t", runtime="openvino", name="DeiT-T fp32").folder


class BenchmarkApp:
    """OpenVINO's tool in a stopped process, which measures only while `resume` runs.

    Args:
        program: Path of `benchmark_app`.
        model: The model's .xml file.
        threads: Threads of an inference.
        count: Inferences until it ends.
        folder: Where it writes its report.
    """

    def __init__(self, program: str, model: Path, threads: int, count: int, folder: Path) -> None:
        self.report = folder / "benchmark_report.json"
        self.process = subprocess.Popen(
            [
                *(program, "-m", str(model), "-nthreads", str(threads), "-niter", str(count)),
                *(*FLAGS, "-report_folder", str(folder)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        output = []
        for line in self.process.stdout:
            output.append(line)
            if "Measuring performance" in line:
                self.process.send_signal(signal.SIGSTOP)
                return
        end = " ".join("".join(output).split())[-300:]
        raise InputError(f"benchmark_app ended with {self.process.wait()}: {end}")

    def resume(self, seconds: float) -> bool:
        """Let it measure for a while; False once all of its inferences are done."""
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGSTOP)
            return True
        return False

    def p50_s(self) -> float:
        """The median that it reported at its end, in steps of 0.01 ms.

        Every stop lengthens one inference of many, which does not change a median.
        """
        results = json.loads(self.report.read_text())["execution_results"]
        return float(results["latency (ms)"]) / 1e3


def pair(artifact: Artifact, program: str, folder: Path, turns: int, threads: int) -> list[float]:
    """Measure one pair of processes, which take turns.

    Args:
        artifact: An artifact for openvino.
        program: Path of `benchmark_app`.
        folder: Where benchmark_app writes its report.
        turns: Turns of each.
        threads: Threads of both.

    Returns:
        p50 in seconds by the runner and by benchmark_app.
    """
    plan, _ = make_plan({"runner": artifact.folder}, threads=threads, priority="normal")
    runner = RunnerProcess("runner", plan["jobs"]["runner"], 300.0)
    try:
        count = max(5, math.ceil(TURN_S / runner.request("warm", limit_s=3.0)["p50_s"]))
        app = BenchmarkApp(program, artifact.model_path, threads, turns * count, folder)
        latency_s: list[float] = []
        while app.resume(TURN_S):
            latency_s += runner.request("run", count=count, settle=1)["latency_s"]
    finally:
        runner.close()
    return [statistics.median(latency_s), app.p50_s()]


def main() -> int:
    """Measure the pairs, and write the file."""
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
            "benchmark_app is missing; OpenVINO's wheel contains it: "
            "pip install 'vitrim[openvino]'",
            file=sys.stderr,
        )
        return 2
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            artifact = Artifact.load(options.artifact or sample(folder))
            for number in range(options.pairs):
                pairs.append(pair(artifact, program, folder, options.turns, options.threads))
                ours, theirs = pairs[-1]
                print(
                    f"pair {number + 1}: runner {ours * 1e3:8.3f} ms, "
                    f"benchmark_app {theirs * 1e3:8.3f} ms, ratio {ours / theirs:.4f}",
                    flush=True,
                )
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
    ratios = [ours / theirs for ours, theirs in pairs]
    result: dict[str, Any] = {
        "machine": read_machine(),
        "goal": GOAL,
        "artifact": artifact.manifest.name,
        "threads": options.threads,
        "turns": options.turns,
        "runner_p50_s": [ours for ours, _ in pairs],
        "benchmark_app_p50_s": [theirs for _, theirs in pairs],
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }
    within = abs(result["ratio"] - 1) < GOAL
    print(
        f"runner / benchmark_app: {result['ratio']:.4f} ({result['low']:.4f} to "
        f"{result['high']:.4f}), goal within {100 * GOAL:.0f} %: {'yes' if within else 'no'}"
    )
    save_result(options.json, result)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
