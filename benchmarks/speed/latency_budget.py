"""Do files that were cut to a budget in milliseconds meet it?

For each precision a cost table is measured (or read), one network is cut to many budgets, and every
file is exported and measured; its budget is corrected at most twice. Reported are the share of the
budgets that the first file meets, the share that is met after the correction, and how much of the
budget is used.

    python -m benchmarks.speed.latency_budget --tables runs/tables
    python -m benchmarks.speed.latency_budget --model deit_tiny_patch16_224 --images 128
    python -m benchmarks.speed.latency_budget --budgets 4 --points 24 --checks 4   # a trial

The model is one of random weights, or a saved one; latency depends on its sizes only. The machine
must be quiet: a table of a busy machine predicts a busy machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import vitrim
from torch import Tensor
from torch.nn import functional as F
from vitrim.bench.local.environment import read_machine
from vitrim.compress.latency.cut import LatencyCuts, LatencyOptions
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.prediction import TrimOptions
from vitrim.core.errors import InputError
from vitrim.core.progress import progress_bar
from vitrim.pipeline.latency_loop import cut_to_latency
from vitrim.targets.cost_table import CostTable

from ..cost_tables import files_of, table_of
from ..models import lifted
from ..results_file import RESULTS, markdown_head, markdown_row, save_result

LARGEST, SMALLEST = 0.9, 0.3
# The goals: of first files, of files after the correction, and of the budget that is used.
FIRST_MET, ALL_MET, USED = 0.95, 1.0, 0.92


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, a timm name, or a saved model")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budgets", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="files that are measured at most")
    parser.add_argument("--images", type=int, default=96, help="images of the cuts (noise)")
    parser.add_argument("--points", type=int, default=72, help="networks of a cost table")
    parser.add_argument("--checks", type=int, default=20, help="compact networks that check it")
    parser.add_argument("--limit-s", type=float, default=240.0, help="seconds of a table")
    parser.add_argument("--file-limit-s", type=float, default=3.0, help="seconds of a file")
    parser.add_argument("--tables", type=Path, default=Path("runs/benchmark-tables"))
    parser.add_argument("--out", type=Path, default=RESULTS / "latency_budget")
    options = parser.parse_args()
    model = _model(options.model)
    rows: list[dict[str, Any]] = []
    for precision in options.precision:
        table = _table(options, model, precision)
        rows += budget_rows(options, model, table)
    result = {
        "model": options.model,
        "runtime": options.runtime,
        "threads": options.threads,
        "machine": read_machine(),
        "rows": rows,
        "summary": {name: summary(rows, name) for name in options.precision},
    }
    text = report_text(result)
    print(text)
    save_result(options.out, result, text)
    return 0


def _model(name: str) -> CompactModel:
    return vitrim.load(name).eval() if Path(name).is_dir() else lifted(name)


def _table(options: argparse.Namespace, model: CompactModel, precision: str) -> CostTable:
    """The table of a precision, read or measured."""
    name = f"{Path(options.model).name}-{options.runtime}-{precision}-{options.threads}.json"
    path = options.tables / name
    return table_of(
        model,
        path,
        limit_s=options.limit_s,
        runtime=options.runtime,
        precision=precision,
        threads=options.threads,
        most_points=options.points,
        checks=options.checks,
    )


def budget_rows(
    options: argparse.Namespace, model: CompactModel, table: CostTable
) -> list[dict[str, Any]]:
    """Cut to every budget, and measure the files.

    Args:
        options: The command line's.
        model: The dense network.
        table: The cost table of the precision.
    """
    images = _noise(model, options.images)
    cuts = LatencyCuts(
        model, images, table, options=TrimOptions(round_to=8), latency=LatencyOptions()
    )

    file_ms = files_of(table, images[:8], options.file_limit_s)
    dense_ms = file_ms(model)
    predicted_ms = table.latency_ms(network_shape(model.architecture))
    rows: list[dict[str, Any]] = []
    with progress_bar() as report:
        for number, share in enumerate(np.linspace(LARGEST, SMALLEST, options.budgets)):
            report(number / options.budgets, f"{table.precision}, {number} budgets")
            row = {"precision": table.precision, "share": float(share), "dense_ms": dense_ms}
            budget_ms = float(share) * predicted_ms
            try:
                _, found = cut_to_latency(cuts, budget_ms, file_ms, options.rounds)
            except InputError as error:
                rows.append({**row, "budget_ms": budget_ms, "error": str(error)})
                continue
            rounds = [asdict(each) for each in found.rounds]
            met = found.met is True
            rows.append(
                {**row, "budget_ms": budget_ms, "met": met, "rounds": rounds}
                | {"measured_ms": found.measured_ms, "predicted_ms": found.predicted_ms}
            )
    return rows


def _noise(model: CompactModel, count: int) -> Tensor:
    """Smooth noise images, (count, channels, height, width)."""
    channels, height, width = model.architecture.image
    small = torch.randn(count, channels, 7, 7, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, size=(height, width), mode="bilinear")


def summary(rows: Sequence[dict[str, Any]], precision: str) -> dict[str, float]:
    """The shares of budgets that are met, first and after the correction, and what is used.

    Args:
        rows: The rows of all precisions.
        precision: The one to summarise.
    """
    found = [row for row in rows if row["precision"] == precision and "rounds" in row]
    first = [row["rounds"][0]["measured_ms"] <= row["budget_ms"] for row in found]
    used = [row["measured_ms"] / row["budget_ms"] for row in found if row["met"]]
    errors = [
        abs(each["measured_ms"] / each["predicted_ms"] - 1)
        for row in found
        for each in row["rounds"]
    ]
    return {
        "budgets": len(found),
        "first_met": sum(first) / max(1, len(first)),
        "met": sum(row["met"] for row in found) / max(1, len(found)),
        "used": median(used) if used else 0.0,
        "table_error": median(errors) if errors else 0.0,
    }


def report_text(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    titles = ("precision", "budgets", "first file", "after correction", "used", "table's error")
    lines = [
        f"`python -m benchmarks.speed.latency_budget --model {result['model']}`, "
        f"{result['runtime']}, threads: {result['threads']}, on {result['machine']['cpu_model']}. "
        f"Goals: {FIRST_MET:.0%} of first "
        f"files and {ALL_MET:.0%} after the correction within the budget, {USED:.0%} of it used "
        "(median of the budgets that are met).",
        "",
        *markdown_head(*titles, numbers=5),
    ]
    for name, row in result["summary"].items():
        shares = [f"{row[key]:.0%}" for key in ("first_met", "met", "used")]
        cells = (row["budgets"], *shares, f"{100 * row['table_error']:.1f} %")
        lines.append(markdown_row(name, *cells))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
