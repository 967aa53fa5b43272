"""Where static eight bits spend their time on ONNX Runtime: `python -m benchmarks.speed.static_int8` ->
benchmarks/results/static_int8.{json,md}

DeiT-Tiny, one thread, batch 1: fp32, dynamic int8, and static int8 written in every way that was
tried, with the operators that the runtime made of it. All graphs run in turns in one process; what
is timed is the processor time of the one thread, as in benchmarks.speed.forms, and ratios are medians
over rounds of the ratio within the round.

    taskset -c 0 python -m benchmarks.speed.static_int8 [--model deit_tiny_patch16_224] [--rounds 40]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import vitrim
from vitrim.bench.local.environment import read_machine
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.parity import answers, relative_error
from vitrim.export.quantization.quantize import int8_static
from vitrim.export.quantization.static_kernels import eight_bit_products

from ..graph_sessions import opened, profiled
from ..result_files import save_result

RESULTS = Path(__file__).parent / "results" / "static_int8"
TARGET, PROFILED_RUNS = "x86-64", 30
DYNAMIC = "dynamic, batch rows, patches too (shipped)"
# The two whose operators are shown beside each other.
BEFORE, SHIPPED = "pairs, unsigned", "the runtime's products, patches too (shipped)"


@dataclass(frozen=True)
class Way:
    """A graph, and the runtime's optimisers that are switched off for it."""

    graph: onnx.ModelProto
    off: tuple[str, ...] = ()


def ways(model: CompactModel, images: np.ndarray) -> dict[str, Way]:
    """fp32 first: what the others are held against."""
    tokens = model.architecture.tokens
    fp32, shipped = (
        best_form(TARGET, 1, tokens)[0],
        best_form(TARGET, 1, tokens, precision="int8-static")[0],
    )
    portable, floating = (
        replace(fp32, attention="split", norm="layer"),
        replace(shipped, stem="matrix"),
    )

    def quantized(form: Any, linears: Any = "product", **settings: Any) -> onnx.ModelProto:
        return int8_static(write_network(model, form, linears=linears), images, **settings)

    def products(form: Any, **settings: Any) -> Way:
        return Way(eight_bit_products(quantized(form, **settings))[0])

    pairs = quantized(portable)
    return {
        "fp32": Way(write_network(model, fp32)),
        "dynamic, matrix rows": Way(write_network(model, fp32, linears="int8")),
        "dynamic, batch rows": Way(write_network(model, floating, linears="int8")),
        DYNAMIC: Way(write_network(model, shipped, linears="int8")),
        BEFORE: Way(pairs),
        "pairs, MatMulAddFusion switched off": Way(pairs, ("MatMulAddFusion",)),
        "pairs around Gemm, bias in 32 bits": Way(quantized(portable, "gemm")),
        "pairs, signed and symmetric (form .../qdq)": Way(
            quantized(replace(portable, rows="batch"), symmetric=True)
        ),
        "the runtime's products, matrix rows": products(fp32),
        "the runtime's products, batch rows": products(floating),
        SHIPPED: products(shipped, also=("patch",)),
        "the runtime's products, q, k, v in one": products(
            replace(floating, attention="fused-qkv")
        ),
        "the runtime's products, split attention": products(replace(floating, attention="split")),
        "the runtime's products, split attention in eight bits too": products(
            replace(floating, attention="split"), also=("attention",)
        ),
        "the runtime's products, signed inputs": products(floating, symmetric=True),
    }


def interleaved(
    sessions: dict[str, onnxruntime.InferenceSession], image: np.ndarray, rounds: int
) -> dict[str, list[float]]:
    """Processor time in seconds, a number a round: the least of three after one that is not
    counted; the order is drawn anew.
    """
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(sessions)):
            session = sessions[str(name)]
            session.run(None, {"images": image})
            timed = []
            for _ in range(3):
                start = time.thread_time()
                session.run(None, {"images": image})
                timed.append(time.thread_time() - start)
            samples[str(name)].append(min(timed))
    return samples


def operators(way: Way, image: np.ndarray) -> dict[str, dict[str, float]]:
    """{operator: nodes and seconds of one inference}, by the runtime's own profile."""
    rows = profiled(way.graph, image, PROFILED_RUNS, off=way.off)
    nodes = Counter(row["operator"] for row in rows)
    return {
        kind: {
            "nodes": nodes[kind],
            "seconds": sum(row["seconds"] for row in rows if row["operator"] == kind),
        }
        for kind in nodes
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables for people."""
    machine = result["machine"]
    lines = [
        "# Static eight bits on ONNX Runtime",
        "",
        f"`python -m benchmarks.speed.static_int8` on {machine['cpu_model']}, ONNX Runtime {result['onnxruntime']}, {result['model']}, one thread, batch 1: "
        f"processor time, median of {result['rounds']} rounds in turns; the ratio to dynamic int8 as shipped is the median of the rounds' ratios. Errors are "
        f"relative to the largest logit, on the {result['images']} images of noise that it was calibrated on.",
        "",
        "| way | ms | / dynamic | mean error | largest error | products: eight bits / float |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['way']} | {1e3 * row['processor_s']:.2f} | {row['ratio_to_dynamic']:.3f} | {row['mean_relative_error']:.1e} | "
            f"{row['max_relative_error']:.1e} | {row['eight_bit_products']} / {row['float_products']} |"
        )
    lines += [
        "",
        f"What the runtime ran, microseconds of one inference by its own profile (it costs some itself): {BEFORE!r} and {SHIPPED!r}.",
        "",
    ]
    lines += [
        "| operator | nodes before | us before | nodes shipped | us shipped |",
        "|---|--:|--:|--:|--:|",
    ]
    before, shipped = result["operators"][BEFORE], result["operators"][SHIPPED]
    kinds = sorted(
        {*before, *shipped},
        key=lambda kind: (
            -max(side.get(kind, {"seconds": 0})["seconds"] for side in (before, shipped))
        ),
    )
    for kind in kinds:
        cells = [
            f"{side[kind]['nodes']:.0f} | {1e6 * side[kind]['seconds']:.0f}"
            if kind in side
            else " | "
            for side in (before, shipped)
        ]
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=16, help="of noise, to find ranges on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = vitrim.lift(timm.create_model(options.model).eval())
    images = torch.randn(
        options.images, *model.architecture.image, generator=torch.Generator().manual_seed(1)
    ).numpy()
    with torch.no_grad():
        reference = model(torch.from_numpy(images)).numpy()
    found = ways(model, images)
    samples = interleaved(
        {name: opened(way.graph, off=way.off) for name, way in found.items()},
        images[:1],
        options.rounds,
    )
    rows: list[dict[str, Any]] = []
    ran: dict[str, dict[str, dict[str, float]]] = {}
    for name, way in found.items():
        ran[name] = operators(way, images[:1])
        small = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"}
        counts = [
            sum(int(row["nodes"]) for kind, row in ran[name].items() if kind in kinds)
            for kinds in (small, {"Gemm", "MatMul", "FusedMatMul"})
        ]
        error = relative_error(reference, answers(way.graph, images, batch=1))
        rows.append(
            {
                "way": name, "processor_s": statistics.median(samples[name]),
                "ratio_to_dynamic": statistics.median(own / other for own, other in zip(samples[name], samples[DYNAMIC], strict=True)),
                "mean_relative_error": float(error.mean()), "max_relative_error": float(error.max()),
                "eight_bit_products": counts[0], "float_products": counts[1],
            }
        )  # fmt: skip
    result = {
        "schema": "vitrim.benchmark-static-int8/1", "machine": read_machine(), "onnxruntime": onnxruntime.__version__, "model": options.model,
        "rounds": options.rounds, "images": options.images, "rows": rows, "operators": ran,
    }  # fmt: skip
    save_result(options.out, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
