"""Does bench's p50 agree with another's tool? `python -m benchmarks.agreement`.

The same OpenVINO file is timed by bench/runner.py and by OpenVINO's own `benchmark_app` (synchronous, one request), each in a fresh process, in turns
of random order, with the same threads, precision and priority. Told: the ratio of the medians over all rounds with its 95 % interval (goal: within
3 %). benchmark_app tells its median to 0.01 ms, so a model of ten milliseconds or more is wanted.

    python -m benchmarks.agreement [ARTIFACT] [--rounds 12] [--threads 1] [--json FILE]

Without an artifact DeiT-T with random weights is exported for openvino (`pip install 'vitrim[openvino]'`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitrim.bench import environment
from vitrim.bench.conductor import Child
from vitrim.bench.measure import make_plan
from vitrim.bench.options import MeasureOptions
from vitrim.bench.statistics import median_interval
from vitrim.errors import InputError
from vitrim.export.artifact import Artifact

RESULTS = Path(__file__).parent / "results"
GOAL = 0.03
TURN_S = 1.0


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


def by_runner(artifact: Path, threads: int, count: int) -> list[float]:
    """`count` latencies in seconds from a fresh runner."""
    plan, _ = make_plan({"runner": artifact}, MeasureOptions(threads=threads, priority="normal"))
    child = Child("runner", plan["jobs"]["runner"], 300.0)
    try:
        found: list[float] = child.ask("run", count=count, settle=1)["latency_s"]
    finally:
        child.close()
    return found


def by_benchmark_app(program: str, model: Path, threads: int, count: int, folder: Path) -> float:
    """The median in seconds of `count` synchronous inferences, as benchmark_app tells it."""
    command = [
        *(program, "-m", str(model), "-d", "CPU", "-api", "sync", "-hint", "none", "-nthreads", str(threads), "-nstreams", "1", "-niter", str(count)),
        *("-infer_precision", "f32", "-report_type", "no_counters", "-json_stats", "-report_folder", str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"benchmark_app ended with {done.returncode}: {' '.join((done.stderr or done.stdout).split())[-300:]}")
    told = json.loads((folder / "benchmark_report.json").read_text())
    return float(told["execution_results"]["latency (ms)"]) / 1e3


def agree(artifact: Artifact, program: str, *, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """One row: both medians of each round, and the ratio runner / benchmark_app."""
    warm = statistics.median(by_runner(artifact.folder, threads, 10))
    count = max(10, math.ceil(TURN_S / warm))
    order, ours, theirs = random.Random(0), [], []
    for _ in range(rounds):
        for name in order.sample(["runner", "benchmark_app"], 2):
            if name == "runner":
                ours.append(statistics.median(by_runner(artifact.folder, threads, count)))
            else:
                theirs.append(by_benchmark_app(program, artifact.model_path, threads, count, folder))
        print(f"round {len(ours):3}: runner {ours[-1] * 1e3:8.3f} ms, benchmark_app {theirs[-1] * 1e3:8.3f} ms", flush=True)
    interval = median_interval([a / b for a, b in zip(ours, theirs, strict=True)], None, level=0.95)
    return {
        "artifact": artifact.manifest.name,
        "threads": threads,
        "inferences_a_round": count,
        "runner_p50_s": ours,
        "benchmark_app_p50_s": theirs,
        "ratio": interval.estimate,
        "low": interval.low,
        "high": interval.high,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", nargs="?", type=Path, help="an artifact for openvino, fp32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "agreement.json")
    options = parser.parse_args()
    beside = Path(sys.executable).parent / "benchmark_app"
    program = str(beside) if beside.is_file() else shutil.which("benchmark_app")
    if program is None:
        print("benchmark_app is not here; it comes with OpenVINO's wheel: pip install 'vitrim[openvino]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        try:
            artifact = Artifact.load(options.artifact or sample(Path(name)))
            row = agree(artifact, program, rounds=options.rounds, threads=options.threads, folder=Path(name))
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
    within = abs(row["ratio"] - 1) < GOAL
    print(f"runner / benchmark_app: {row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f}), goal within {100 * GOAL:.0f} %: {'yes' if within else 'no'}")
    options.json.write_text(json.dumps({"machine": environment.read_machine(), "goal": GOAL, **row}, indent=1) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
