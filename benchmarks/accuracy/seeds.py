"""A recipe over several seeds, as a table of means and standard deviations.

    python -m benchmarks.accuracy.seeds fashion_mnist fashion_mnist_90
    python -m benchmarks.accuracy.seeds cifar10_small_50 cifar10_small cifar10_small_90 \\
        --name seeds_cifar10 --set data.name=parquet:FOLDER --set train.precision=bf16 \\
        --set model.checkpoint=benchmarks/checkpoints/cifar10_small

Each seed is a whole `vitrim run` in a process of its own, with its own folder; finished runs are
kept, interrupted ones continue. Top-1 is that of the exported artifacts on the test images. Latency
is left to the reports of runs on quiet machines.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vitrim.bench.local.environment import read_machine

from ..results_file import RESULTS, markdown_head, markdown_row, save_result

SEEDS = (7, 13, 42)
SPREAD_KEYS = ("params_percent", "macs_percent", "baseline_top1_percent", "top1_percent")


def run_seed(recipe: str, seed: int, out: Path, sets: Sequence[str]) -> dict[str, Any]:
    """Run a recipe with one seed, unless that run is finished.

    Args:
        recipe: Name or path of the recipe.
        seed: Value of `train.seed`.
        out: Where the run folders are.
        sets: `KEY=VALUE` pairs that replace values of the recipe.

    Returns:
        The content of the run's report.json.

    Raises:
        RuntimeError: The run failed; the message contains its last lines.
    """
    folder = out / f"{Path(recipe).stem}-seed{seed}"
    command = [sys.executable, "-m", "vitrim", "run", recipe, "--out", str(folder)]
    command += ["--seed", str(seed), "--resume"]
    command += [part for item in sets for part in ("--set", item)]
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{folder.name}.log"
    with log.open("ab") as file:
        status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if status:
        end = log.read_text(errors="replace")[-800:]
        raise RuntimeError(f"{folder}: exit status {status}\n{end}")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def row(recipe: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of one recipe: percentages and points, one value a seed."""
    compact = [report["models"]["compact"] for report in reports]
    baseline = [report["models"]["baseline"] for report in reports]
    pairs = list(zip(compact, baseline, strict=True))
    return {
        "recipe": recipe,
        "params_percent": [100 * small["params"] / dense["params"] for small, dense in pairs],
        "macs_percent": [100 * small["macs"] / dense["macs"] for small, dense in pairs],
        "baseline_top1_percent": [100 * dense["top1"] for dense in baseline],
        "top1_percent": [100 * small["top1"] for small in compact],
        "drop_points": [100 * (dense["top1"] - small["top1"]) for small, dense in pairs],
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The rows as Markdown."""
    lines = markdown_head(
        *("recipe", "parameters kept (%)", "MACs kept (%)", "baseline top-1 (%)"),
        *("compact top-1 (%)", f"points lost (seeds {', '.join(map(str, seeds))})"),
    )
    for found in rows:
        each = ", ".join(f"{value:.2f}" for value in found["drop_points"])
        cells = [spread(found[key]) for key in SPREAD_KEYS]
        lost = f"{spread(found['drop_points'])} ({each})"
        lines.append(markdown_row(f"`{found['recipe']}`", *cells, lost))
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="simultaneous runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed to `vitrim run`"
    )
    parser.add_argument("--name", default="seeds", help="name of the files in benchmarks/results/")
    options = parser.parse_args()
    # Seed by seed, so that an interrupted benchmark has whole seeds.
    work = [(recipe, seed) for seed in options.seeds for recipe in options.recipes]
    with ThreadPoolExecutor(options.jobs) as pool:
        reports = list(
            pool.map(lambda item: run_seed(item[0], item[1], options.out, options.set), work)
        )
    by_recipe = {
        recipe: [report for (name, _), report in zip(work, reports, strict=True) if name == recipe]
        for recipe in options.recipes
    }
    rows = [row(Path(recipe).stem, found) for recipe, found in by_recipe.items()]
    printed = table(rows, options.seeds)
    print(printed)
    # Where the data and the runs are on this machine is left out.
    arguments = [re.sub(r"(?<![\w.])/.*", "FOLDER", argument) for argument in sys.argv[1:]]
    command = "python -m benchmarks.accuracy.seeds " + " ".join(arguments)
    result = {
        "command": command,
        "machine": read_machine(),
        "seeds": options.seeds,
        "rows": rows,
    }
    save_result(RESULTS / options.name, result, f"`{command}`\n\n{printed}\n")


if __name__ == "__main__":
    main()
