"""The C++ runner compared with the Python runner: the same files, in turns of random order.

    python -m benchmarks.measurement.runners ARTIFACT... [--time-limit 30] [--json FILE]

Prints the p50 of both, and the ratio of the rounds' medians with its 95 % interval. Times are
comparable only within one run on one machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from vitrim.bench.local.conductor import LocalExecutor, RunnerProcess, conduct
from vitrim.bench.local.measure import make_plan
from vitrim.bench.remote.native_build import native_runner
from vitrim.bench.results.statistics import ratio_interval

from ..results_file import markdown_head, markdown_row, save_result


class BothRunners(LocalExecutor):
    """This machine, where jobs whose name ends in `native` run in the C++ runner."""

    def __init__(self) -> None:
        super().__init__()
        self.native = native_runner().command()

    def start_runner(self, name: str, job: dict[str, Any], reply_limit_s: float) -> RunnerProcess:
        """Start the runner that the name implies."""
        command = self.native if name.endswith("native") else self.runner_command(job)
        return RunnerProcess(name, job, reply_limit_s, command)


def compare(path: Path, threads: int, time_limit_s: float) -> dict[str, Any]:
    """Measure one artifact by both runners."""
    plan, _ = make_plan(
        {"python": path, "native": path},
        threads=threads,
        time_limit_s=time_limit_s,
        half_width=0.003,
        least_rounds=50,
    )
    runs = conduct(plan, None, BothRunners())["runs"]
    python, native = runs["python"], runs["native"]
    ratio = ratio_interval(
        native["latency_s"],
        python["latency_s"],
        native["samples_per_turn"],
        python["samples_per_turn"],
        paired=True,
        level=0.95,
    )
    return {
        "artifact": path.name,
        "p50_s": {name: float(np.median(run["latency_s"])) for name, run in runs.items()},
        "ratio": [ratio.low, ratio.estimate, ratio.high],
        "peak_rss_bytes": {name: run["memory"]["peak_rss_bytes"] for name, run in runs.items()},
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    p50_s, peak, (low, estimate, high) = row["p50_s"], row["peak_rss_bytes"], row["ratio"]
    return markdown_row(
        row["artifact"],
        f"{1e3 * p50_s['python']:.3f} ms",
        f"{1e3 * p50_s['native']:.3f} ms",
        f"{estimate:.3f} ({low:.3f} to {high:.3f})",
        f"{peak['python'] / 1e6:.1f} MB",
        f"{peak['native'] / 1e6:.1f} MB",
    )


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds for each artifact")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    titles = ("artifact", "Python p50", "native p50", "native / Python (95 %)")
    print(*markdown_head(*titles, "peak memory, Python", "native", numbers=5), sep="\n")
    rows = []
    for path in options.artifacts:
        rows.append(compare(path, options.threads, options.time_limit))
        print(line(rows[-1]), flush=True)
    if options.json:
        save_result(options.json, rows)


if __name__ == "__main__":
    main()
