"""What each graph form is worth on ONNX Runtime, one thread: `python -m benchmarks.speed.forms` ->
benchmarks/results/forms.{json,md}

DeiT-Tiny, DeiT-Small and both cut in two ways to half of their multiply-adds (random shared masks,
`round_to` in force); the best form, forms that take one of its choices back, torch's own graph, and
that graph after the exact passes. All graphs of a model and of its halves run in turns in one
process. What is timed is the processor time of the one thread that computes, which other programs
on the machine do not lengthen as they do wall time (they still take the caches, so a second run
says how far to trust the third digit); figures are medians, ratios are of medians of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import vitrim
from vitrim.compress.surgery.rounding import macs_cost, snap
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.graphs.model_proto import open_graph
from vitrim.export.graphs.torch_graph import simplify, torch_to_onnx
from vitrim.export.passes import steps

RESULTS = Path(__file__).parent / "results"
MODELS = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224"}
BEST = FORMS[0]
# One choice of the best form taken back at a time, or one added.
CHOICES: dict[str, Form] = {
    "best": BEST,
    "split attention": replace(BEST, attention="split"),
    "fused qkv": replace(BEST, attention="fused-qkv"),
    "LayerNorm kept": replace(BEST, norm="layer"),
    "convolution stem": replace(BEST, stem="conv"),
    "last block with keys": replace(BEST, last_keys=False),
    "last block whole": replace(BEST, last_keys=False, last_queries=False),
    "rows filled up to 12": replace(BEST, tile=12),
    "rows filled up to 16": replace(BEST, tile=16),
    "batch rows": replace(BEST, rows="batch"),
    "runtime attention, skip norms": Form(
        rows="batch",
        attention="runtime",
        residual="skip-norm",
        norm="layer",
        activation="bias-gelu",
    ),
}
# What to keep of each dimension before rounding; the budget does the rest.
HALVES = {
    "half by widths": {"embed": 0.75, "ffn": 0.7, "qk": 0.75, "v": 0.75},
    "half by heads": {"embed": 0.84, "head": 0.67, "ffn": 0.55},
}
ROUND_TO = 16


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=25, help="rounds in which each graph runs once"
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--forms",
        nargs="*",
        default=list(CHOICES),
        choices=list(CHOICES),
        help="of these, `best` among them",
    )
    parser.add_argument(
        "--plain", action="store_true", help="with torch's own graph and the same after the passes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "forms.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure(name, arguments.rounds, arguments.plain, arguments.forms)
    arguments.out.parent.mkdir(exist_ok=True)
    data = {
        "schema": "vitrim.forms/1",
        "machine": machine(),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    text = table(data)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def measure(name: str, rounds: int, plain: bool, forms: list[str]) -> list[dict[str, Any]]:
    """All forms of a model and of its half, in turns."""
    torch.manual_seed(0)
    source = timm.create_model(MODELS[name]).eval()
    dense = vitrim.lift(source)
    models = {
        name: dense,
        **{f"{name}, {kind}": halved(dense, keep) for kind, keep in HALVES.items()},
    }
    graphs = {
        (label, form): write_network(model, choice)
        for label, model in models.items()
        for form, choice in CHOICES.items()
        if form in forms
    }
    if plain:
        for label, model in models.items():
            graphs[label, "torch's graph"] = own = simplify(
                torch_to_onnx(model, model.architecture.image, batch=1, opset=20)
            )[0]
            graphs[label, "torch's graph after the passes"] = rewritten(own)
    processor_s = interleaved(graphs, model_input(dense), rounds)
    # As the forms compute them: the last block's queries only for the tokens that the head reads.
    macs = {
        label: count_macs(model.architecture.model_copy(update={"last_queries": True}))
        for label, model in models.items()
    }
    found = []
    for (label, form), median_s in processor_s.items():
        row: dict[str, Any] = {
            "model": label,
            "form": form,
            "name": CHOICES[form].name if form in CHOICES else "plain",
            "macs": macs[label],
        }
        row |= {"processor_s": median_s, "ratio_to_best": median_s / processor_s[label, "best"]}
        if label != name:
            row["proportionality"] = (processor_s[name, form] / median_s) / (
                macs[name] / macs[label]
            )
        found.append(row)
    return found


def halved(dense: CompactModel, keep: dict[str, float]) -> CompactModel:
    """At most half of the multiply-adds and not 1 % less: random masks that all blocks share, their
    counts snapped to multiples of ROUND_TO.
    """
    architecture = dense.architecture
    mask = vitrim.StructuredMask.random(dense, keep, "full", seed=0)
    return vitrim.compact(
        dense,
        snap(
            mask,
            architecture,
            ROUND_TO,
            cost=macs_cost(architecture),
            budget=count_macs(architecture) // 2,
        ),
    ).eval()


def rewritten(graph: onnx.ModelProto) -> onnx.ModelProto:
    """After all passes."""
    for step in steps(graph):
        graph = step.after
    return graph


def model_input(model: CompactModel) -> np.ndarray:
    """One image of noise."""
    return np.random.default_rng(0).standard_normal(
        (1, *model.architecture.image), dtype=np.float32
    )


def interleaved(
    graphs: dict[tuple[str, str], onnx.ModelProto], image: np.ndarray, rounds: int
) -> dict[tuple[str, str], float]:
    """Median processor time in seconds of each graph over rounds in which each runs three times,
    the least of the last two counted; the order turns.
    """
    sessions = {key: open_graph(graph) for key, graph in graphs.items()}
    feeds = {key: {session.get_inputs()[0].name: image} for key, session in sessions.items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
    keys = list(sessions)
    for number in range(rounds + 1):
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            sessions[key].run(None, feeds[key])
            timed = []
            for _ in range(2):
                start = time.thread_time()
                sessions[key].run(None, feeds[key])
                timed.append(time.thread_time() - start)
            if number:
                samples[key].append(min(timed))
    return {key: statistics.median(values) for key, values in samples.items()}


def machine() -> dict[str, str]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": model,
        "onnxruntime": onnxruntime.__version__,
        "threads": "1",
        "cores": str(os.cpu_count()),
    }


def table(data: dict[str, Any]) -> str:
    """Markdown: a row a form, a column a model."""
    rows = data["rows"]
    labels = list(dict.fromkeys(row["model"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    found = {(row["model"], row["form"]): row for row in rows}
    head = "| form | " + " | ".join(labels) + " |"
    lines = [
        f"One thread of {data['machine']['processor']}, ONNX Runtime {data['machine']['onnxruntime']}, batch 1, medians of {data['rounds']} interleaved "
        "rounds: processor time in milliseconds, and its ratio to the best form's of the same model. `python -m benchmarks.speed.forms`",
        "",
        head,
        "|---" * (len(labels) + 1) + "|",
    ]
    for form in forms:
        cells = []
        for label in labels:
            row = found.get((label, form))
            cells.append(
                ""
                if row is None
                else f"{row['processor_s'] * 1e3:.2f} ({row['ratio_to_best']:.3f})"
            )
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| half model | multiply-adds kept | speed-up | (speed-up) / (multiply-add reduction) |",
        "|---|---|---|---|",
    ]
    for label in labels:
        row = found[label, "best"]
        if "proportionality" in row:
            dense = found[label.split(", ")[0], "best"]
            kept, speedup = row["macs"] / dense["macs"], dense["processor_s"] / row["processor_s"]
            lines.append(
                f"| {label} | {100 * kept:.1f} % | {speedup:.2f} | {row['proportionality']:.3f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
