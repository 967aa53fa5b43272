"""What two threads are worth on ONNX Runtime in eight bits: `python -m benchmarks.speed.int8_threads` ->
benchmarks/results/int8_threads.{json,md}

Which operators scale, and how threads should wait for the next one: asleep, busily for a bounded
time, or busily for the whole call. Each graph comes in two forms of attention. Rows run in turns of
random order; the processor time of all threads for an image says what waiting costs.

Other work on a core that a thread waits for costs more than the waiting, so a round begins only
when the machine has been idle for a moment.

    python -m benchmarks.speed.int8_threads [--model deit_tiny_patch16_224] [--rounds 40] [--threads 2]
    [--patience-s 600]
"""

from __future__ import annotations

import argparse
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
from vitrim.bench.local.environment import read_machine
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.quantization.quantize import int8_static
from vitrim.export.quantization.static_kernels import eight_bit_products
from vitrim.export.sessions import SPIN_US, THREADS_CONFIG

from ..graph_sessions import opened, profiled
from ..result_files import save_result

RESULTS = Path(__file__).parent / "results" / "int8_threads"
PROFILED_RUNS = 40
IDLE = 0.9
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
    for attention, label in (
        ("opset23", "the standard's attention"),
        ("runtime", "the runtime's attention"),
    ):
        float_form = replace(best_form("x86-64", 1, tokens)[0], attention=attention)
        form = replace(best_form("x86-64", 1, tokens, precision="int8")[0], attention=attention)
        found[f"fp32, {label}"] = write_network(
            model, replace(float_form, rows="batch") if attention == "runtime" else float_form
        )
        found[f"int8, {label}"] = write_network(model, form, linears="int8")
        whole = write_network(model, form, linears="product")
        found[f"int8-static, {label}"] = eight_bit_products(
            int8_static(whole, images, also=("patch",))
        )[0]
    return found


def idle_share(moment_s: float = 0.3) -> float:
    """How much of the last moment the busiest core was idle; 1 where the system does not tell."""

    def ticks() -> dict[str, tuple[int, int]]:
        path = Path("/proc/stat")
        lines = (
            [
                line.split()
                for line in path.read_text().splitlines()
                if line[:4].strip("cpu").isdigit()
            ]
            if path.exists()
            else []
        )
        return {line[0]: (int(line[4]) + int(line[5]), sum(map(int, line[1:]))) for line in lines}

    before = ticks()
    time.sleep(moment_s)
    after = ticks()
    return min(
        (
            (after[core][0] - before[core][0]) / max(1, after[core][1] - before[core][1])
            for core in before
        ),
        default=1.0,
    )


def interleaved(
    sessions: dict[tuple[str, str], onnxruntime.InferenceSession],
    image: np.ndarray,
    rounds: int,
    patience_s: float,
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Seconds of the quickest of five calls, and processor seconds a call, a number a round. Ends
    early where the machine is busy for too long.
    """
    keys, order = list(sessions), np.random.default_rng(0)
    found: dict[tuple[str, str], dict[str, list[float]]] = {
        key: {"latency_s": [], "processor_s": []} for key in keys
    }
    end = time.monotonic() + patience_s
    for done in range(rounds):
        while idle_share() < IDLE:
            if time.monotonic() > end:
                break
        if time.monotonic() > end and done:
            break
        for number in order.permutation(len(keys)):
            session, samples = sessions[keys[number]], found[keys[number]]
            session.run(None, {"images": image})
            timed, before = [], time.process_time()
            for _ in range(5):
                start = time.perf_counter()
                session.run(None, {"images": image})
                timed.append(time.perf_counter() - start)
            samples["processor_s"].append((time.process_time() - before) / len(timed))
            samples["latency_s"].append(min(timed))
    return found


def operators(
    graph: onnx.ModelProto, threads: int, config: dict[str, str], image: np.ndarray
) -> dict[str, float]:
    """{operator: seconds of one inference}, by the runtime's own profile."""
    found: dict[str, float] = {}
    for row in profiled(graph, image, PROFILED_RUNS, threads=threads, config=config):
        found[row["operator"]] = found.get(row["operator"], 0.0) + row["seconds"]
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables for people."""
    machine, threads = result["machine"], result["threads"]
    lines = [
        "# Eight bits on more than one thread, ONNX Runtime",
        "",
        f"`python -m benchmarks.speed.int8_threads` on {machine['cpu_model']}, ONNX Runtime {result['onnxruntime']}, {result['model']}, batch 1, "
        f"{result['rows'][0]['rounds']} rounds in turns of random order, each begun on an idle machine: the median over rounds of the quickest of five "
        f"calls (and of the quickest quarter of rounds), and the processor time of all threads for an image.{' ' + result['note'] if result['note'] else ''}",
        "",
        "| graph | threads | waiting | ms | quickest quarter ms | processor ms |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['graph']} | {row['threads']} | {row['waiting']} | {1e3 * row['latency_s']:.2f} | {1e3 * row['quickest_quarter_s']:.2f} | "
            f"{1e3 * row['processor_s']:.2f} |"
        )
    for name, columns in result["operators"].items():
        lines += ["", f"{name}, microseconds of one inference by the runtime's own profile:", ""]
        lines += [
            f"| operator | 1 thread | {threads}, asleep | {threads}, busily for {SPIN_US} us | gain |",
            "|---|--:|--:|--:|--:|",
        ]
        one, asleep, busily = columns
        for kind in sorted(one, key=lambda kind: -one[kind])[:9]:
            lines.append(
                f"| {kind} | {1e6 * one[kind]:.0f} | {1e6 * asleep[kind]:.0f} | {1e6 * busily[kind]:.0f} | {one[kind] / busily[kind]:.2f}x |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--patience-s",
        type=float,
        default=600.0,
        help="to wait for an idle machine, all rounds together",
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = vitrim.lift(timm.create_model(options.model).eval())
    images = torch.randn(
        8, *model.architecture.image, generator=torch.Generator().manual_seed(1)
    ).numpy()
    made = graphs(model, images)
    sessions, threads_of = {}, {}
    for name, graph in made.items():
        sessions[name, "-"], threads_of[name, "-"] = opened(graph), 1
        for waiting, config in WAITS.items():
            sessions[name, waiting], threads_of[name, waiting] = (
                opened(graph, threads=options.threads, config=config),
                options.threads,
            )
    rows = []
    for (name, waiting), samples in interleaved(
        sessions, images[:1], options.rounds, options.patience_s
    ).items():
        latency_s = sorted(samples["latency_s"])
        rows.append(
            {
                "graph": name, "waiting": waiting, "threads": threads_of[name, waiting], "latency_s": statistics.median(latency_s),
                "quickest_quarter_s": statistics.median(latency_s[: max(1, len(latency_s) // 4)]),
                "processor_s": statistics.median(samples["processor_s"]), "rounds": len(latency_s),
            }
        )  # fmt: skip
    shown = [name for name in made if name.startswith("int8,")]
    settings: list[tuple[int, dict[str, str]]] = [
        (1, {}),
        (options.threads, {}),
        (options.threads, THREADS_CONFIG),
    ]
    profiles = {
        name: [operators(made[name], threads, config, images[:1]) for threads, config in settings]
        for name in shown
    }
    result = {
        "schema": "vitrim.benchmark-int8-threads/1", "machine": read_machine(), "onnxruntime": onnxruntime.__version__, "model": options.model,
        "threads": options.threads, "note": options.note, "rows": rows, "operators": profiles,
    }  # fmt: skip
    save_result(options.out, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
