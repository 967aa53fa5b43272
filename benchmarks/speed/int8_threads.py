"""int8 on two threads of ONNX Runtime: `python -m benchmarks.speed.int8_threads`.

Which operators scale, and how threads should wait for the next operator: asleep, busily for a
bounded time, or busily for the whole call. Each graph has two forms of attention. Graphs run in
turns of random order; the processor time of all threads for an image shows what waiting costs. A
round begins only when the machine has been idle for a moment. Writes `results/int8_threads.json`
and `int8_threads.md`.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from vitrim.bench.local.environment import read_machine
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.quantization.quantize import int8_static
from vitrim.export.quantization.static_kernels import eight_bit_products
from vitrim.export.sessions import SPIN_US, THREADS_CONFIG

from ..models import calibration_noise, lifted
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from ..turns import in_turns, on_an_idle_machine
from .graph_sessions import call_of, opened, profiled

PROFILED_RUNS = 40
SHOWN_OPERATORS = 9
ATTENTIONS: dict[Literal["opset23", "runtime"], str] = {
    "opset23": "the standard's attention",
    "runtime": "the runtime's attention",
}
WAITS: dict[str, dict[str, str]] = {
    "asleep": {},
    f"busily for {SPIN_US} us": THREADS_CONFIG,
    "busily, whole call": {
        key: value for key, value in THREADS_CONFIG.items() if "duration" not in key
    },
}


def graphs(model: Any, images: np.ndarray) -> dict[str, onnx.ModelProto]:
    """{precision and form of attention: graph}."""
    tokens = model.architecture.tokens
    found = {}
    for attention, label in ATTENTIONS.items():
        float_form = replace(best_form("x86-64-v4-vnni", 1, tokens)[0], attention=attention)
        if attention == "runtime":
            float_form = replace(float_form, rows="batch")
        form = replace(
            best_form("x86-64-v4-vnni", 1, tokens, precision="int8")[0], attention=attention
        )
        found[f"fp32, {label}"] = write_network(model, float_form)
        found[f"int8, {label}"] = write_network(model, form, linears="int8")
        calibrated = int8_static(
            write_network(model, form, linears="product"), images, also=("patch",)
        )
        found[f"int8-static, {label}"] = eight_bit_products(calibrated)[0]
    return found


def measure(
    graphs: dict[str, onnx.ModelProto], image: np.ndarray, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Latency and processor time of every graph and way of waiting.

    The latency of a turn is the fastest of five calls.
    """
    sessions, threads = {}, {}
    for name, graph in graphs.items():
        sessions[name, "-"], threads[name, "-"] = opened(graph), 1
        for waiting, config in WAITS.items():
            key = (name, waiting)
            sessions[key] = opened(graph, threads=options.threads, config=config)
            threads[key] = options.threads
    calls = {key: call_of(session, image) for key, session in sessions.items()}
    rounds = on_an_idle_machine(options.rounds, options.patience_s)
    rows = []
    for (name, waiting), turns in in_turns(calls, rounds, repeats=5, shuffle=True).items():
        latency_s = sorted(turn.least_s for turn in turns)
        fastest_quarter = latency_s[: max(1, len(latency_s) // 4)]
        rows.append(
            {
                "graph": name,
                "waiting": waiting,
                "threads": threads[name, waiting],
                "latency_s": statistics.median(latency_s),
                "quickest_quarter_s": statistics.median(fastest_quarter),
                "processor_s": statistics.median(turn.processor_s for turn in turns),
                "rounds": len(latency_s),
            }
        )
    return rows


def operators(
    graph: onnx.ModelProto, threads: int, config: dict[str, str], image: np.ndarray
) -> dict[str, float]:
    """{operator: seconds of one inference} by the runtime's own profile."""
    found: dict[str, float] = {}
    for row in profiled(graph, image, PROFILED_RUNS, threads=threads, config=config):
        found[row["operator"]] = found.get(row["operator"], 0.0) + row["seconds"]
    return found


def profiles(
    graphs: dict[str, onnx.ModelProto], image: np.ndarray, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Operators of the int8 graphs: on one thread, on several asleep, on several spinning."""
    settings: list[tuple[int, dict[str, str]]] = [(1, {}), (threads, {}), (threads, THREADS_CONFIG)]
    return {
        name: [operators(graph, count, config, image) for count, config in settings]
        for name, graph in graphs.items()
        if name.startswith("int8,")
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    machine, threads = result["machine"], result["threads"]
    lines = [
        "# int8 on more than one thread, ONNX Runtime",
        "",
        f"`python -m benchmarks.speed.int8_threads` on {machine['cpu_model']}, "
        f"ONNX Runtime {result['onnxruntime']}, {result['model']}, batch 1, "
        f"{result['rows'][0]['rounds']} rounds in turns of random order, each begun on an idle "
        "machine: the median over rounds of the quickest of five calls (and of the quickest "
        "quarter of rounds), and the processor time of all threads for an image."
        f"{' ' + result['note'] if result['note'] else ''}",
        "",
        *markdown_head("graph", "threads", "waiting", "ms", "quickest quarter ms", "processor ms"),
    ]
    for row in result["rows"]:
        times = (row["latency_s"], row["quickest_quarter_s"], row["processor_s"])
        cells = [f"{1e3 * seconds:.2f}" for seconds in times]
        lines.append(markdown_row(row["graph"], row["threads"], row["waiting"], *cells))
    for name, columns in result["operators"].items():
        lines += ["", f"{name}, microseconds of one inference by the runtime's own profile:", ""]
        lines += markdown_head(
            "operator",
            "1 thread",
            f"{threads}, asleep",
            f"{threads}, busily for {SPIN_US} us",
            "gain",
            numbers=4,
        )
        one, _, busily = columns
        for kind in sorted(one, key=lambda kind: -one[kind])[:SHOWN_OPERATORS]:
            cells = [f"{1e6 * column[kind]:.0f}" for column in columns]
            lines.append(markdown_row(kind, *cells, f"{one[kind] / busily[kind]:.2f}x"))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--patience-s",
        type=float,
        default=600.0,
        help="how long to wait for an idle machine, all rounds together",
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "int8_threads")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = lifted(options.model)
    images = calibration_noise(model, 8)
    written = graphs(model, images)
    result = {
        "schema": "vitrim.benchmark-int8-threads/1",
        "machine": read_machine(),
        "onnxruntime": onnxruntime.__version__,
        "model": options.model,
        "threads": options.threads,
        "note": options.note,
        "rows": measure(written, images[:1], options),
        "operators": profiles(written, images[:1], options.threads),
    }
    save_result(options.out, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
