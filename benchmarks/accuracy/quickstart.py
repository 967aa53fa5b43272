"""Processor seconds, wall time and accuracy of the quickstart, on two kinds of code and two loads.

    python -m benchmarks.accuracy.quickstart

Every row is a whole `vitrim run quickstart` in a process of its own, without the installation. The
code is either everything that the processor has, or AVX2 only (environment variables of torch,
oneDNN and MKL). A busy machine runs one more process that never sleeps. The budget that the
project keeps: at most 500 processor seconds of training on AVX2 code, and at most 0.7 points of
top-1 lost on average over three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrim.bench.local.environment import read_machine

from ..results_file import RESULTS, markdown_head, markdown_row, save_result

SEEDS = (7, 13, 42)
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
CODES = {"AVX2": AVX2, "everything": {}}
TRAINING = ("baseline", "masks", "finetune")
BUDGET_CPU_S, BUDGET_POINTS = 500.0, 0.7


@contextmanager
def load(busy: bool) -> Iterator[None]:
    """Keep one core busy while the context is open."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_quickstart(code: str, threads: int, busy: bool, seed: int) -> dict[str, Any]:
    """Run the quickstart once.

    Args:
        code: A key of `CODES`.
        threads: torch threads of the training.
        busy: Whether another process takes a core.
        seed: Value of `train.seed`.

    Returns:
        The row: settings, processor seconds of the process and its children, wall seconds of the
        whole and of the training, top-1 of baseline and compact model in percent.

    Raises:
        RuntimeError: The run failed; the message contains its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-quickstart-") as folder, load(busy):
        command = [sys.executable, "-m", "vitrim", "run", "quickstart", "--out", f"{folder}/run"]
        command += ["--seed", str(seed), "--set", f"train.threads={threads}", "--quiet"]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, **CODES[code]}, capture_output=True, text=True, check=False
        )
        wall_s = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}\n{done.stderr[-800:]}")
        report = json.loads(Path(folder, "run", "report.json").read_text(encoding="utf-8"))
    models = report["models"]
    return {
        "code": code,
        "threads": threads,
        "busy": busy,
        "seed": seed,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_s": wall_s,
        "training_wall_s": sum(report["seconds"].get(step, 0.0) for step in TRAINING),
        "baseline_top1_percent": 100 * models["baseline"]["top1"],
        "compact_top1_percent": 100 * models["compact"]["top1"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and the mean loss of each code."""
    lines = markdown_head(
        *("code", "threads", "machine", "seed"),
        *("CPU s", "wall s", "training, wall s", "top-1 (%)", "points lost"),
        numbers=5,
    )
    for row in rows:
        lines.append(
            markdown_row(
                row["code"],
                row["threads"],
                "busy" if row["busy"] else "quiet",
                row["seed"],
                f"{row['cpu_s']:.0f}",
                f"{row['wall_s']:.0f}",
                f"{row['training_wall_s']:.0f}",
                f"{row['baseline_top1_percent']:.2f} -> {row['compact_top1_percent']:.2f}",
                f"{points(row):.2f}",
            )
        )
    lines.append("")
    for code in sorted({row["code"] for row in rows}):
        lost = [points(row) for row in rows if row["code"] == code]
        cpu_s = max(row["cpu_s"] for row in rows if row["code"] == code)
        lines.append(
            f"- {code}: {statistics.mean(lost):.2f} points lost on average (budget "
            f"{BUDGET_POINTS}), at most {cpu_s:.0f} CPU s (budget {BUDGET_CPU_S:.0f})"
        )
    return "\n".join(lines)


def points(row: dict[str, Any]) -> float:
    """Top-1 lost, in percentage points."""
    return float(row["baseline_top1_percent"] - row["compact_top1_percent"])


def main() -> None:
    """Run all rows, print the table and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", nargs="+", choices=sorted(CODES), default=sorted(CODES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--quiet-only", action="store_true", help="leave the busy machine out")
    options = parser.parse_args()
    settings = [
        (code, threads, busy, seed)
        for code in options.codes
        for threads in options.threads
        for busy in ((False,) if options.quiet_only else (False, True))
        # Accuracy does not depend on the load, so one row with it is enough.
        for seed in (options.seeds if threads == options.threads[0] and not busy else SEEDS[:1])
    ]
    rows = []
    for setting in settings:
        rows.append(run_quickstart(*setting))
        print(table(rows[-1:]).splitlines()[2], flush=True)
    command = "python -m benchmarks.accuracy.quickstart " + " ".join(sys.argv[1:])
    result = {"command": command.strip(), "machine": read_machine(), "rows": rows}
    text = f"`{command.strip()}`\n\n{table(rows)}\n"
    save_result(RESULTS / "quickstart", result, text)
    print(table(rows))


if __name__ == "__main__":
    main()
