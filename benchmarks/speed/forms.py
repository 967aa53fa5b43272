"""Graph forms on ONNX Runtime, one thread: `python -m benchmarks.speed.forms`.

DeiT-Tiny, DeiT-Small and two cuts of each to half of its multiply-adds (random shared masks, widths
rounded): the best form, forms with one choice reverted, torch's own graph, and torch's graph after
the exact passes. All graphs of a model and of its halves run in turns in one process. The processor
time of the one computing thread is measured: unlike wall time it is not lengthened by other
programs, which still take the caches, so a second run shows how reliable the third digit is.
Figures are medians; ratios are of medians of one run. Writes `results/forms.json` and `forms.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import vitrim
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery.rounding import macs_cost, snap
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.graphs.model_proto import open_graph
from vitrim.export.graphs.torch_graph import simplify, torch_to_onnx
from vitrim.export.passes import steps

from ..models import computed_macs, lifted, noise
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from ..turns import in_turns, least
from .graph_sessions import call_of

MODELS = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224"}
BEST = FORMS[0]
# The best form with one choice reverted, or one added.
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
# Keep ratios before rounding; the budget does the rest.
HALVES = {
    "half by widths": {"embed": 0.75, "ffn": 0.7, "qk": 0.75, "v": 0.75},
    "half by heads": {"embed": 0.84, "head": 0.67, "ffn": 0.55},
}
ROUND_TO = 16


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="turns of each graph")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--forms",
        nargs="*",
        default=list(CHOICES),
        choices=list(CHOICES),
        help="of these, `best` among them",
    )
    parser.add_argument(
        "--plain", action="store_true", help="torch's own graph too, and the same after the passes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "forms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure(name, arguments.rounds, arguments.plain, arguments.forms)
    data = {
        "schema": "vitrim.forms/1",
        "machine": machine(),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    text = table(data)
    save_result(arguments.out, data, text)
    print(text)


def measure(name: str, rounds: int, plain: bool, forms: list[str]) -> list[dict[str, Any]]:
    """Time all forms of a model and of its halves, in turns.

    Args:
        name: A key of `MODELS`.
        rounds: Turns of each graph.
        plain: Time torch's own graph too, and the same after the exact passes.
        forms: Keys of `CHOICES`.

    Returns:
        One row for each form of each model.
    """
    dense = lifted(MODELS[name])
    models = {
        name: dense,
        **{f"{name}, {kind}": halved(dense, keep) for kind, keep in HALVES.items()},
    }
    graphs = {
        (label, form): write_network(model, CHOICES[form])
        for label, model in models.items()
        for form in forms
    }
    if plain:
        for label, model in models.items():
            graph = simplify(torch_to_onnx(model, model.architecture.image, batch=1, opset=20))[0]
            graphs[label, "torch's graph"] = graph
            graphs[label, "torch's graph after the passes"] = rewritten(graph)
    calls = {key: call_of(open_graph(graph), noise(dense)) for key, graph in graphs.items()}
    # The first round is warm-up.
    samples = least(in_turns(calls, range(rounds + 1), repeats=2, clock=time.thread_time))
    processor_s = {key: statistics.median(seconds[1:]) for key, seconds in samples.items()}
    macs = {label: computed_macs(model) for label, model in models.items()}
    found = []
    for (label, form), median_s in processor_s.items():
        row: dict[str, Any] = {
            "model": label,
            "form": form,
            "name": CHOICES[form].name if form in CHOICES else "plain",
            "macs": macs[label],
            "processor_s": median_s,
            "ratio_to_best": median_s / processor_s[label, "best"],
        }
        if label != name:
            reduction = macs[name] / macs[label]
            row["proportionality"] = processor_s[name, form] / median_s / reduction
        found.append(row)
    return found


def halved(dense: CompactModel, keep: dict[str, float]) -> CompactModel:
    """A cut to at most half of the multiply-adds, less 1 %.

    All blocks share the random masks; what is kept is rounded to multiples of `ROUND_TO`.
    """
    architecture = dense.architecture
    mask = vitrim.StructuredMask.random(dense, keep, "full", seed=0)
    budget = count_macs(architecture) // 2
    rounded = snap(mask, architecture, ROUND_TO, cost=macs_cost(architecture), budget=budget)
    return vitrim.compact(dense, rounded).eval()


def rewritten(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph after all passes."""
    for step in steps(graph):
        graph = step.after
    return graph


def machine() -> dict[str, str]:
    """The processor and the runtime."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.processor()),
        "onnxruntime": onnxruntime.__version__,
        "threads": "1",
        "cores": str(os.cpu_count()),
    }


def table(data: dict[str, Any]) -> str:
    """Markdown: one row a form, one column a model."""
    rows, machine = data["rows"], data["machine"]
    labels = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["form"]): row for row in rows}
    lines = [
        f"One thread of {machine['processor']}, ONNX Runtime {machine['onnxruntime']}, batch 1, "
        f"medians of {data['rounds']} interleaved rounds: processor time in milliseconds, and its "
        "ratio to the best form's of the same model. `python -m benchmarks.speed.forms`",
        "",
        *markdown_head("form", *labels),
    ]
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = [
            f"{row['processor_s'] * 1e3:.2f} ({row['ratio_to_best']:.3f})"
            if (row := found.get((label, form)))
            else ""
            for label in labels
        ]
        lines.append(markdown_row(form, *cells))
    lines += [
        "",
        *markdown_head(
            "half model", "multiply-adds kept", "speed-up", "(speed-up) / (multiply-add reduction)"
        ),
    ]
    for label in labels:
        row = found[label, "best"]
        if "proportionality" in row:
            dense = found[label.split(", ")[0], "best"]
            kept, speedup = row["macs"] / dense["macs"], dense["processor_s"] / row["processor_s"]
            ratio = f"{row['proportionality']:.3f}"
            lines.append(markdown_row(label, f"{100 * kept:.1f} %", f"{speedup:.2f}", ratio))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
