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

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vitrim
from vitrim.bench.local.environment import read_machine
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.select import SelectMethod, select_tokens
from vitrim.core.storage import replace_file
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export

from ..models import computed_macs, lifted
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from ..turns import Turn, in_turns, until
from .tokens import MODELS, RUNTIMES, macs_file, row_of

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


def models_of(name: str, methods: list[SelectMethod]) -> dict[str, CompactModel]:
    """The dense model of a name, and one with selections for each method.

    Networks of fewer than ten blocks get the selections after quarters of their depth.
    """
    dense = lifted(name)
    stages = STAGES if len(dense.architecture.block_names) > max(STAGES) else None
    found = {"dense": dense}
    for method in methods:
        found[method] = select_tokens(dense, method, ratio=RATIO, stages=stages).eval()
    return found


def written(
    name: str,
    models: dict[str, CompactModel],
    runtime: str,
    batch: int,
    options: argparse.Namespace,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Export the models, unless the folder has them.

    Args:
        name: The name of the dense model.
        models: As of `models_of`.
        runtime: The runtime.
        batch: Batch size.
        options: Of the command.

    Returns:
        The folder of each model; and for the others why the export refused it.
    """
    folders, absent = {}, {}
    for cut, model in models.items():
        folder = options.work / f"{name}-{cut}-{runtime}-batch-{batch}"
        if options.again or not (folder / "manifest.json").is_file():
            print(f"exporting {folder.name}", file=sys.stderr, flush=True)
            try:
                export(model, folder, runtime=runtime, batch=batch, overwrite=True)
            except vitrim.InputError as error:
                absent[f"{name}, {cut}, {RUNTIMES[runtime]}, batch {batch}"] = str(error)
                continue
            replace_file(macs_file(folder), f"{computed_macs(model)}\n")
        folders[cut] = folder
    return folders, absent


def opened(folder: Path) -> Callable[[], object]:
    """A call that runs an artifact on the next of several images."""
    artifact = Artifact.load(folder)
    engine = artifact.engine()
    shape = [size for size in artifact.manifest.inputs[0].shape if isinstance(size, int)]
    random = np.random.default_rng(0)
    images = [random.standard_normal(shape, dtype=np.float32) for _ in range(IMAGES)]
    turn = itertools.cycle(images)
    return lambda: engine.infer(next(turn))


def selected_row(
    folders: dict[str, Path], passes: list[dict[str, list[Turn]]], cut: str, **where: Any
) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units.

    Args:
        folders: The artifacts, "dense" and the cut among them.
        passes: The turns of each pass.
        cut: The method.
        where: The model, runtime and batch.
    """
    row = row_of(folders, passes, cut, **where)
    row["method"] = row.pop("cut")
    row["ms"] = {"dense": row["dense_s"] * 1e3, "cut": row["cut_s"] * 1e3}
    choices = Artifact.load(folders[cut]).manifest.parity[-1].choices or ()
    row["kept"] = [choice.kept for choice in choices]
    row["equal_choices"] = [choice.equal for choice in choices]
    row["goal"] = GOALS.get((cut, where["runtime"])) if where["batch"] == 1 else None
    return row


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
        low, high = row["quotient_of_passes"]
        lines.append(
            markdown_row(
                row["model"],
                row["method"],
                RUNTIMES[row["runtime"]],
                row["batch"],
                f"{row['dense_macs'] / 1e9:.3f} to {row['macs'] / 1e9:.3f}",
                f"{row['ms']['dense']:.2f}",
                f"{row['ms']['cut']:.2f}",
                f"{row['speed_up']:.3f}x",
                f"{row['mac_reduction']:.3f}x",
                f"{row['quotient']:.3f}",
                f"{low:.3f} to {high:.3f}",
                "" if row["goal"] is None else f"{row['goal']:.2f}",
            )
        )
    judged = [row for row in rows if row["goal"] is not None]
    reached = sum(row["quotient"] >= row["goal"] for row in judged)
    if judged:
        lines += ["", f"Goals reached: {reached} of {len(judged)}."]
    if result["absent"]:
        lines += ["", *(f"- {name}: {reason}" for name, reason in result["absent"].items())]
    return "\n".join(lines) + "\n"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Export and time every row.

    Args:
        options: Of the command.

    Returns:
        The result, to be saved.
    """
    folders: dict[Any, dict[str, Path]] = {}
    absent: dict[str, str] = {}
    for name in options.model:
        models = models_of(name, options.method)
        for runtime, batch in itertools.product(options.runtime, options.batch):
            found, missing = written(name, models, runtime, batch, options)
            folders[name, runtime, batch] = found
            absent |= missing
    measured = [key for key, found in folders.items() if "dense" in found and len(found) > 1]
    calls = {key: {cut: opened(folder) for cut, folder in folders[key].items()} for key in measured}
    passes: dict[Any, list[dict[str, list[Turn]]]] = {key: [] for key in measured}
    for number in range(options.passes):
        for key in measured:
            title = f"{key[0]}, {RUNTIMES[key[1]]}, batch {key[2]}"
            print(f"pass {number + 1} of {options.passes}: {title}", file=sys.stderr, flush=True)
            rounds = until(options.limit_s, at_least=3)
            passes[key].append(in_turns(calls[key], rounds, clock=time.thread_time))
    return {
        "schema": SCHEMA,
        "machine": read_machine(),
        "passes": options.passes,
        "ratio": RATIO,
        "rows": [
            selected_row(folders[key], passes[key], cut, model=key[0], runtime=key[1], batch=key[2])
            for key in measured
            for cut in folders[key]
            if cut != "dense"
        ],
        "absent": absent,
    }


def main() -> int:
    """Export, measure, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="timm names, or demo")
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--runtime", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--passes", type=int, default=3, help="how often each row is measured")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds of a row in a pass")
    parser.add_argument("--again", action="store_true", help="export again what is in the folder")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-dynamic-tokens"))
    parser.add_argument("--out", type=Path, default=RESULTS / "dynamic_tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options)
    text = markdown(result)
    save_result(options.out, result, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
