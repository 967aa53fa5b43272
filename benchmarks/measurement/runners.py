"""The native runner held against the Python runner: the same files, both alive, turns in random
order.

    python -m benchmarks.measurement.runners runs/quickstart/artifacts/* [--time-limit 30] [--json OUT]

Prints p50 of both and the ratio of the rounds' medians with its 95 % interval. Times of one run on
one machine are compared with each other only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from vitrim.bench.local.conductor import LocalExecutor, RunnerProcess, conduct
from vitrim.bench.local.measure import make_plan
from vitrim.bench.remote.native_build import native_runner
from vitrim.bench.results.statistics import ratio_interval


class Both(LocalExecutor):
    """This machine, where some jobs are given to the C++ runner."""

    def __init__(self) -> None:
        super().__init__()
        self.native = native_runner().command()

    def start_runner(self, name: str, job: dict[str, Any], reply_limit_s: float) -> RunnerProcess:
        """A runner of the kind that the name says."""
        return RunnerProcess(
            name,
            job,
            reply_limit_s,
            self.native if name.endswith("native") else self.runner_command(job),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds for each artifact")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    print(
        "| artifact | Python p50 | native p50 | native / Python (95 %) | peak memory, Python | native |\n|---|---:|---:|---:|---:|---:|"
    )
    for path in chosen.artifacts:
        plan, _ = make_plan(
            {"python": path, "native": path},
            threads=chosen.threads,
            time_limit_s=chosen.time_limit,
            half_width=0.003,
            least_rounds=50,
        )
        runs = conduct(plan, None, Both())["runs"]
        first, second = runs["python"], runs["native"]
        ratio = ratio_interval(
            second["latency_s"],
            first["latency_s"],
            second["samples_per_turn"],
            first["samples_per_turn"],
            paired=True,
            level=0.95,
        )
        p50 = {name: float(np.median(run["latency_s"])) for name, run in runs.items()}
        peak = {name: run["memory"]["peak_rss_bytes"] for name, run in runs.items()}
        rows.append(
            {
                "artifact": path.name,
                "p50_s": p50,
                "ratio": [ratio.low, ratio.estimate, ratio.high],
                "peak_rss_bytes": peak,
            }
        )
        print(
            f"| {path.name} | {1e3 * p50['python']:.3f} ms | {1e3 * p50['native']:.3f} ms | {ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) "
            f"| {peak['python'] / 1e6:.1f} MB | {peak['native'] / 1e6:.1f} MB |",
            flush=True,
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
