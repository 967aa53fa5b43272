"""A fixed weight of the size penalty beside budgets, on the same axes.

    python -m benchmarks.accuracy.trade_off --data parquet:FOLDER \\
        --model benchmarks/checkpoints/cifar10_small --out runs/trade_off [--jobs 2]

A study of learned masks on CIFAR-10 with four values of λ, those of Tredese 2023 scaled by the
inverse ratio of the parameters of the dense models (5.5 M / 2.69 M), and with three budgets of
parameters; all other settings are equal. Finished runs are kept, and an interrupted benchmark
continues. Writes `results/trade_off.json` and `.md`, and the picture `docs/trade-off.svg`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrim.bench.local.environment import read_machine
from vitrim.pipeline.recipe import toml_value

from ..results_file import RESULTS, markdown_head, markdown_row, publish, spread

LAMBDAS = (1e-6, 2e-7, 1e-7, 2e-8)
BUDGETS = (0.75, 0.5, 0.3)
PICTURE = RESULTS.parents[1] / "docs" / "trade-off.svg"
STUDY = """\
name = "A fixed weight of the penalty, and budgets"
recipe = "cifar10_small"
seeds = {seeds}

[set]
"data.name" = {data}
"data.limit" = {images}
"data.validation" = 0.02
"model.checkpoint" = {model}
"masks.method" = "learned"
"masks.epochs" = {epochs}
"masks.lr" = 1e-3
"masks.augmentation" = "none"
"finetune.epochs" = {finetune_epochs}
"train.batch_size" = 32
"train.precision" = {precision}
"export.precisions" = ["fp32"]
"bench.time_limit_s" = 2.0
"bench.top1_images" = {test_images}
"report.estimate_for" = []

[[grid]]
axes = {{ "masks.lambda" = {lambdas} }}

[[grid]]
axes = {{ "masks.params" = {budgets} }}
"""


def run_study(file: Path, out: Path, jobs: int) -> list[dict[str, Any]]:
    """Run what is missing of a study, and return its rows.

    Raises:
        subprocess.CalledProcessError: A run failed.
    """
    command = [sys.executable, "-m", "vitrim", "study"]
    subprocess.run(
        [*command, str(file), "--out", str(out), "--resume", "--jobs", str(jobs)], check=True
    )
    shown = subprocess.run(
        [*command, "show", str(out), "--format", "json"], check=True, capture_output=True, text=True
    )
    rows: list[dict[str, Any]] = json.loads(shown.stdout)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each λ and each budget, from the largest network."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        key = "masks.lambda" if row.get("masks.lambda") is not None else "masks.params"
        groups.setdefault((key, row[key]), []).append(row)
    lines = markdown_head(
        *("masks", "parameters kept (%)", "MACs kept (%)", "top-1 (%)", "points lost"), numbers=4
    )
    for (key, value), found in sorted(
        groups.items(), key=lambda item: -sum(row["params"] for row in item[1]) / len(item[1])
    ):
        name = f"λ = {value:g}" if key == "masks.lambda" else f"budget {100 * value:g} %"
        cells = [
            spread([100 * row["params"] / row["params_dense"] for row in found], 1),
            spread([100 * row["macs"] / row["macs_dense"] for row in found], 1),
            spread([100 * row["top1"] for row in found]),
            spread([100 * (row["top1_dense"] - row["top1"]) for row in found]),
        ]
        lines.append(markdown_row(name, *cells))
    return "\n".join(lines)


def main() -> None:
    """Run the study, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10, as `data.name` of a recipe")
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--out", type=Path, required=True, help="study folder")
    parser.add_argument("--images", type=int, default=3000, help="training images")
    parser.add_argument("--test-images", type=int, default=5000, help="of the top-1")
    parser.add_argument("--epochs", type=int, default=3, help="of mask learning")
    parser.add_argument("--finetune-epochs", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    settings = {
        "data": toml_value(options.data),
        "model": toml_value(str(Path(options.model).resolve())),
        "images": options.images,
        "test_images": options.test_images,
        "epochs": options.epochs,
        "finetune_epochs": options.finetune_epochs,
        "precision": toml_value(options.precision),
        "seeds": options.seeds,
        "lambdas": list(LAMBDAS),
        "budgets": list(BUDGETS),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    file = options.out.with_suffix(".toml")
    file.write_text(STUDY.format(**settings), encoding="utf-8")
    rows = run_study(file, options.out, options.jobs)
    PICTURE.write_bytes((options.out / "study-params.svg").read_bytes())
    cpu, seeds = read_machine()["cpu_model"], ", ".join(map(str, options.seeds))
    text = (
        f"`python -m benchmarks.accuracy.trade_off` on {cpu}: {options.images:,} training images, "
        f"{options.epochs} epochs of masks and {options.finetune_epochs} of fine-tuning, top-1 on "
        f"{options.test_images:,} test images, seeds {seeds}.\n\n{table(rows)}\n"
    )
    shown = ("masks.lambda", "masks.params", "seed", "params", "params_dense", "macs")
    kept = [
        {key: row.get(key) for key in (*shown, "macs_dense", "top1", "top1_dense")} for row in rows
    ]
    publish(RESULTS / "trade_off", {"cpu": cpu, "rows": kept}, text)


if __name__ == "__main__":
    main()
