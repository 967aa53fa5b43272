"""Latency saved by selections of tokens: `python -m benchmarks.speed.dynamic_tokens`.

(latency speed-up) / (MAC reduction) of Vision Transformers that choose patches for each image
against the dense one, in ONNX Runtime fp32 (the form that `vitrim.export` chooses) and in our TVM
kernels fp32, one thread, batch 1 and 8: 1.0 where time fell exactly as the multiply-adds did. Three
methods keep 0.7, 0.49 and 0.34 of the patches at blocks 3, 6 and 9: a predictor before the block
(`dynamicvit`), and class attention in it, without and with a token that fuses the dropped ones
(`class-attention`, `evit`). Multiply-adds count predictors, scores and fused tokens, and in every
model only those queries of the last attention that the head reads.

The models of a row take turns in one process; the processor time of the computing thread is
measured, which other programs do not lengthen. Each row is measured several times, at different
moments: a ratio is the median over turns, each of which divides two neighbours in time, and in
brackets the smallest and largest of the passes. Weights are random, and each timed call gets
another image, so that no branch of a choice is learned by the processor.

    python -m benchmarks.speed.dynamic_tokens [--model deit_small_patch16_224 ...] [--batch 1 8]
        [--method dynamicvit class-attention evit] [--runtime onnxruntime tvm] [--passes 3]
        [--limit-s 20] [--work FOLDER] [--out FILE]

Artifacts stay in the work folder, and a later run uses them again. Writes
`results/dynamic_tokens.json` and `dynamic_tokens.md`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from vitrim.bench.local.environment import read_machine
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.select import SelectMethod, select_tokens
from vitrim.export.artifact import Artifact

from ..models import lifted
from ..results_file import RESULTS, markdown_head, markdown_row, publish
from .quotients import RUNTIMES, command_line, measured_rows, quotient_cells

METHODS: tuple[SelectMethod, ...] = ("dynamicvit", "class-attention", "evit")
RATIO, STAGES = 0.7, (3, 6, 9)
# What a row at batch 1 is expected to reach, by method and runtime.
GOALS = {
    ("dynamicvit", "onnxruntime"): 0.92,
    ("dynamicvit", "tvm"): 0.95,
    ("class-attention", "onnxruntime"): 0.97,
    ("class-attention", "tvm"): 0.97,
}
IMAGES = 8
SCHEMA = "vitrim.benchmark-dynamic-tokens/1"


def models_of(
    name: str, methods: Sequence[SelectMethod]
) -> tuple[Sequence[str], Callable[[str], CompactModel]]:
    """The names "dense" and those of the methods, and the model of each.

    Networks of fewer than ten blocks get the selections after quarters of their depth.
    """
    dense = lifted(name)
    stages = STAGES if len(dense.architecture.block_names) > max(STAGES) else None

    def model_of(cut: str) -> CompactModel:
        if cut == "dense":
            return dense
        return select_tokens(dense, cast("SelectMethod", cut), ratio=RATIO, stages=stages).eval()

    return ("dense", *methods), model_of


def opened(folder: Path) -> Callable[[], object]:
    """A call that runs an artifact on the next of several images."""
    artifact = Artifact.load(folder)
    engine = artifact.engine()
    shape = [size for size in artifact.manifest.inputs[0].shape if isinstance(size, int)]
    random = np.random.default_rng(0)
    images = [random.standard_normal(shape, dtype=np.float32) for _ in range(IMAGES)]
    turn = itertools.cycle(images)
    return lambda: engine.infer(next(turn))


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = result["rows"]
    lines = [
        f"`python -m benchmarks.speed.dynamic_tokens` on {result['machine']['cpu_model']}, one "
        "thread, the models of a row in turns: processor time, median; the quotient is speed-up "
        f"over MAC reduction, with the smallest and largest of {result['passes']} passes. "
        "Predictors and scores count as MACs.",
        "",
        *markdown_head(
            *("model", "method", "runtime", "batch", "G MACs", "dense (ms)", "cut (ms)"),
            *("speed-up", "MAC reduction", "quotient", "passes", "goal"),
            numbers=9,
        ),
    ]
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        runtime = RUNTIMES[row["runtime"]]
        cells = (row["model"], row["cut"], runtime, row["batch"], *quotient_cells(row), goal)
        lines.append(markdown_row(*cells))
    judged = [row for row in rows if row["goal"] is not None]
    reached = sum(row["quotient"] >= row["goal"] for row in judged)
    if judged:
        lines += ["", f"Goals reached: {reached} of {len(judged)}."]
    if result["absent"]:
        lines += ["", *(f"- {name}: {reason}" for name, reason in result["absent"].items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Export, measure, and write both files."""
    work = Path("runs/benchmark-dynamic-tokens")
    parser = command_line(__doc__, work, RESULTS / "dynamic_tokens")
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, absent = measured_rows(options, lambda name: models_of(name, options.method), opened)
    for row in rows:
        row["goal"] = GOALS.get((row["cut"], row["runtime"])) if row["batch"] == 1 else None
    result = {
        "schema": SCHEMA,
        "machine": read_machine(),
        "passes": options.passes,
        "ratio": RATIO,
        "rows": rows,
        "absent": absent,
    }
    publish(options.out, result, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
