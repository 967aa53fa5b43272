"""A recipe over several seeds, as a table of means and spreads: `python -m benchmarks.accuracy.seeds
fashion_mnist fashion_mnist_90`.

Each seed is a whole `vitrim run` in a process of its own, with its own folder; finished runs are
kept, broken ones continue. Top-1 is that of the exported artifacts on the test images. Latency
belongs to quiet machines and is left to the runs' own reports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vitrim.bench.local.environment import read_machine
from vitrim.core.storage import replace_file

RESULTS = Path(__file__).parent / "results"
SEEDS = (7, 13, 42)


def run_seed(recipe: str, seed: int, out: Path, sets: Sequence[str]) -> dict[str, Any]:
    """report.json of one finished run. Errors: RuntimeError with the run's last lines."""
    folder = out / f"{Path(recipe).stem}-seed{seed}"
    command = [
        sys.executable,
        "-m",
        "vitrim.cli",
        "run",
        recipe,
        "--out",
        str(folder),
        "--seed",
        str(seed),
        "--resume",
    ]
    command += [part for item in sets for part in ("--set", item)]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{folder.name}.log", "ab") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status:
        raise RuntimeError(
            f"{folder}: exit status {status}\n"
            + (out / f"{folder.name}.log").read_text(errors="replace")[-800:]
        )
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def row(recipe: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one recipe came to: percentages and points, one value a seed."""
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
    """mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| recipe | parameters kept (%) | MACs kept (%) | baseline top-1 (%) | compact top-1 (%) | points lost (seeds {', '.join(map(str, seeds))}) |",
        "|---|---|---|---|---|---|",
    ]
    for found in rows:
        each = ", ".join(f"{value:.2f}" for value in found["drop_points"])
        cells = [
            spread(found[key])
            for key in ("params_percent", "macs_percent", "baseline_top1_percent", "top1_percent")
        ]
        lines.append(
            f"| `{found['recipe']}` | "
            + " | ".join(cells)
            + f" | {spread(found['drop_points'])} ({each}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table, keep it under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to `vitrim run`"
    )
    parser.add_argument(
        "--name", default="seeds", help="name of the files under benchmarks/results/"
    )
    options = parser.parse_args()
    # Seed by seed, so that a run that is stopped early has whole seeds to show.
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
    command = "python -m benchmarks.accuracy.seeds " + " ".join(sys.argv[1:])
    machine = read_machine()
    replace_file(
        RESULTS / f"{options.name}.json",
        json.dumps(
            {"command": command, "machine": machine, "seeds": options.seeds, "rows": rows}, indent=1
        )
        + "\n",
    )
    replace_file(RESULTS / f"{options.name}.md", f"`{command}`\n\n{printed}\n")


if __name__ == "__main__":
    main()
