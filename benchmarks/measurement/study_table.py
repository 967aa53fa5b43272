"""`vitrim study show` and `report` on many runs: `python -m benchmarks.measurement.study_table`.

Tables of finished runs with planted figures, two axes and three seeds are written by the program's
own functions; then the commands of a user are timed, each in a fresh process, which includes the
start of Python. The goal is 5 s of processor time for 1,000 runs, and memory that grows by less
than the tables. Writes `results/study_table.json` and `study_table.md`. Linux only, since
the peak is read from /proc.

    python -m benchmarks.measurement.study_table [--runs 100 1000 5000] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitrim.bench.local.environment import read_machine
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.studies.expansion import StudyRun
from vitrim.pipeline.studies.table import Column, StudyTable

from ..results_file import RESULTS, markdown_head, markdown_row, publish

SCHEMA = "vitrim.benchmark-study-table/1"
GOAL_S, GOAL_RUNS = 5.0, 1000
# Runs a command and prints what it cost since the start of the process.
CHILD = """
import json, os, resource, sys, time
from vitrim.cli import call
if call(sys.argv[1:]):
    raise SystemExit("the command failed")
used = resource.getrusage(resource.RUSAGE_SELF)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
ticks = float(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
wall_s = float(open("/proc/uptime").read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
print(json.dumps({
    "cpu_s": used.ru_utime + used.ru_stime,
    "wall_s": wall_s,
    "peak_rss_bytes": 1024 * int(peak.split()[1]),
}), file=sys.stderr)
"""
COMMANDS: dict[str, tuple[str, ...]] = {
    "show, sorted and filtered": ("show", "--sort", "top1", "--where", "params < 5e5"),
    "show, means": ("show", "--means", "--sort", "top1"),
    "report": ("report",),
}


def write_table(
    folder: Path, count: int, planted: Callable[[int, int], dict[str, Any]] | None = None
) -> StudyTable:
    """Write a table of finished runs of two axes and three seeds.

    Args:
        folder: An empty folder.
        count: The number of runs.
        planted: Takes the number of a run, from 0, and `count`, and returns its values of
            `masks.params` and `masks.sharing` (default: each setting has three seeds).

    Returns:
        The table.
    """
    recipe = load_recipe()
    facts = {"name": "many runs", "toml": "", "base": recipe.toml()}
    table = StudyTable.create(folder, facts)
    runs = [
        StudyRun(
            f"{number:010x}",
            number + 1,
            (7, 13, 42)[number % 3],
            1,
            (planted or _settings)(number, count),
            recipe,
        )
        for number in range(count)
    ]
    table.add_runs(runs)
    # While a connection is open, closing the others writes no checkpoint.
    link = sqlite3.connect(table.path)
    link.execute("SELECT count(*) FROM runs").fetchone()
    latency = Column("compact_fp32_ms", "figure", "REAL", "median latency in milliseconds")
    for number, run in enumerate(runs):
        share = run.values["masks.params"]
        figures: dict[str, Any] = {
            "top1": 0.5 + 0.4 * share + 0.01 * (number % 7),
            "top1_dense": 0.95,
            "params": round(1e6 * share),
            "params_dense": 1_000_000,
            "macs": round(4e7 * share),
            "macs_dense": 40_000_000,
            "compact_fp32_ms": 3.0 * share + 0.1,
        }
        table.change(run.id, "done", figures=figures, columns=[latency])
    link.close()
    return table


def _settings(number: int, count: int) -> dict[str, Any]:
    return {
        "masks.params": round(0.1 + 0.9 * (number // 3) / count, 6),
        "masks.sharing": ("full", "residual")[number // 3 % 2],
    }


def timed(folder: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Seconds and peak memory of one command on a study folder, in a process of its own.

    The process reports them itself: the peak that a parent reads may be the parent's.
    """
    verb, *rest = arguments
    command = [sys.executable, "-c", CHILD, "study", verb, str(folder), *rest]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stderr.splitlines()[-1])
    return found


def measure(counts: Sequence[int]) -> dict[str, Any]:
    """Every command on a table of each size."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            print(f"writing {count} runs", file=sys.stderr, flush=True)
            table = write_table(folder, count)
            file_bytes = table.path.stat().st_size
            for name, arguments in COMMANDS.items():
                found = timed(folder, arguments)
                rows.append({"runs": count, "command": name, "table_bytes": file_bytes, **found})
    return {"schema": SCHEMA, "machine": read_machine(), "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"`python -m benchmarks.measurement.study_table` on {result['machine']['cpu_model']}: each "
        "command in a fresh process, the start of Python included.",
        "",
        *markdown_head(
            *("command", "runs", "table (MB)", "processor time (s)", "wall time (s)"),
            "peak memory (MB)",
            numbers=5,
        ),
    ]
    for row in result["rows"]:
        lines.append(
            markdown_row(
                row["command"],
                f"{row['runs']:,}",
                f"{row['table_bytes'] / 1e6:.2f}",
                f"{row['cpu_s']:.2f}",
                f"{row['wall_s']:.2f}",
                f"{row['peak_rss_bytes'] / 1e6:.0f}",
            )
        )
    slowest = max(
        (row["cpu_s"] for row in result["rows"] if row["runs"] == GOAL_RUNS), default=None
    )
    if slowest is not None:
        met = "met" if slowest <= GOAL_S else "missed"
        lines += [
            "",
            f"Slowest of {GOAL_RUNS:,} runs: {slowest:.2f} s, goal {GOAL_S:.0f} s: {met}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the tables, time the commands, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", type=int, default=[100, 1000, 5000])
    parser.add_argument("--out", type=Path, default=RESULTS / "study_table")
    options = parser.parse_args()
    result = measure(options.runs)
    publish(options.out, result, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
