"""Learned masks from a compensated cut, and from the dense network, after the same few epochs.

    python -m benchmarks.accuracy.one_shot_start [--seeds 7 13 42] [--finetune 1 4]

Each row is a run of the quickstart's images (half of them) with two epochs of mask learning for 30
% of the parameters, and some of fine-tuning, with `masks.start = "one-shot"` or `"dense"`. Top-1 is
that of the torch models. Finished rows are kept, so that an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vitrim
from vitrim.bench.local.environment import read_machine
from vitrim.compress.train.evaluate import evaluate
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import prepare, run

from ..results_file import RESULTS, markdown_head, markdown_row, save_result

STARTS = ("one-shot", "dense")
SETTINGS = (
    *('masks.method="learned"', "masks.epochs=2", "masks.lr=5e-4", 'masks.augmentation="none"'),
    *("masks.attention_overhead_macs=0", "masks.ffn_overhead_macs=0"),
    *("data.limit=5500", "train.threads=1"),
)


def run_row(start: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train once.

    Args:
        start: Value of `masks.start`.
        epochs: Value of `finetune.epochs`.
        seed: Value of `train.seed`.

    Returns:
        The row: settings, processor seconds, and test top-1 in percent of the baseline, the cut,
        and the fine-tuned model.
    """
    sets = [*SETTINGS, f'masks.start="{start}"', f"finetune.epochs={epochs}", f"train.seed={seed}"]
    recipe, started = load_recipe("quickstart", sets), time.process_time()
    with tempfile.TemporaryDirectory(prefix="vitrim-start-") as name:
        folder = Path(name, "run")
        run(recipe, folder, until="finetune", quiet=True)
        cpu_s = time.process_time() - started
        test = prepare(recipe, quiet=True).data.test
        top1 = [
            evaluate(vitrim.load(folder / each), test) for each in ("baseline", "cut", "compact")
        ]
    return {"start": start, "finetune_epochs": epochs, "seed": seed, "cpu_s": cpu_s, "top1": top1}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Points of top-1 lost, mean and standard deviation over the seeds."""
    lines = markdown_head(
        *("start", "fine-tuning epochs", "seeds"),
        *("CPU s", "lost after the masks", "lost after fine-tuning"),
        numbers=4,
    )
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["start"], row["finetune_epochs"]), []).append(row)
    for (start, epochs), found in groups.items():
        cells = [_spread([row["top1"][0] - row["top1"][step] for row in found]) for step in (1, 2)]
        cpu_s = statistics.mean(row["cpu_s"] for row in found)
        lines.append(markdown_row(start, epochs, len(found), f"{cpu_s:.0f}", *cells))
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def save(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write both result files."""
    text = (
        "`python -m benchmarks.accuracy.one_shot_start`: points of test top-1 lost at 30 % of the "
        "parameters, two epochs of mask learning on 5,500 images.\n\n"
    )
    result = {"machine": read_machine(), "rows": list(rows)}
    save_result(out, result, f"{text}{table(rows)}\n")


def main() -> None:
    """Run the missing rows and write both files after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[7, 13, 42])
    parser.add_argument("--finetune", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--out", type=Path, default=RESULTS / "one_shot_start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out.with_suffix(".json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    done = {(row["start"], row["finetune_epochs"], row["seed"]) for row in rows}
    for epochs in options.finetune:
        for start in STARTS:
            for seed in options.seeds:
                if (start, epochs, seed) not in done:
                    rows.append(run_row(start, epochs, seed))
                    print(json.dumps(rows[-1]), flush=True)
                    save(rows, options.out)
    print(table(rows))


if __name__ == "__main__":
    main()
