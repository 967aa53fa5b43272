"""Ways to write static int8 for ONNX Runtime: `python -m benchmarks.speed.static_int8`.

DeiT-Tiny, one thread, batch 1: fp32, dynamic int8, and static int8 written in every way that was
tried, with the operators that the runtime made of it. All graphs run in turns in one process. The
processor time of the one computing thread is measured; ratios are medians over rounds of the ratio
within the round. Writes `results/static_int8.json` and `static_int8.md`.

    taskset -c 0 python -m benchmarks.speed.static_int8 [--rounds 40]
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
import torch
from vitrim.bench.local.environment import read_machine
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.parity import model_outputs, relative_error
from vitrim.export.quantization.quantize import int8_static
from vitrim.export.quantization.static_kernels import eight_bit_products

from ..models import calibration_noise, lifted
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from ..turns import in_turns, least
from .graph_sessions import call_of, opened, profiled

TARGET, PROFILED_RUNS = "host", 30
DYNAMIC = "dynamic, batch rows, patches too (shipped)"
# The two whose operators are shown side by side.
BEFORE, SHIPPED = "pairs, unsigned", "the runtime's products, patches too (shipped)"
INT8_PRODUCTS = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"}
FLOAT_PRODUCTS = {"Gemm", "MatMul", "FusedMatMul"}


@dataclass(frozen=True)
class Variant:
    """A graph, and the runtime's optimizers that are disabled for it."""

    graph: onnx.ModelProto
    off: tuple[str, ...] = ()


def variants(model: CompactModel, images: np.ndarray) -> dict[str, Variant]:
    """Every way to write the model, fp32 first."""
    tokens = model.architecture.tokens
    fp32 = best_form(TARGET, 1, tokens)[0]
    shipped = best_form(TARGET, 1, tokens, precision="int8-static")[0]
    portable = replace(fp32, attention="split", norm="layer")
    floating = replace(shipped, stem="matrix")

    def quantized(form: Any, linears: Any = "product", **settings: Any) -> onnx.ModelProto:
        return int8_static(write_network(model, form, linears=linears), images, **settings)

    def products(form: Any, **settings: Any) -> Variant:
        return Variant(eight_bit_products(quantized(form, **settings))[0])

    pairs = quantized(portable)
    return {
        "fp32": Variant(write_network(model, fp32)),
        "dynamic, matrix rows": Variant(write_network(model, fp32, linears="int8")),
        "dynamic, batch rows": Variant(write_network(model, floating, linears="int8")),
        DYNAMIC: Variant(write_network(model, shipped, linears="int8")),
        BEFORE: Variant(pairs),
        "pairs, MatMulAddFusion switched off": Variant(pairs, ("MatMulAddFusion",)),
        "pairs around Gemm, bias in 32 bits": Variant(quantized(portable, "gemm")),
        "pairs, signed and symmetric (form .../qdq)": Variant(
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


def operators(variant: Variant, image: np.ndarray) -> dict[str, dict[str, float]]:
    """{operator: nodes and seconds of one inference} by the runtime's own profile."""
    rows = profiled(variant.graph, image, PROFILED_RUNS, off=variant.off)
    nodes = Counter(row["operator"] for row in rows)
    seconds = {
        kind: sum(row["seconds"] for row in rows if row["operator"] == kind) for kind in nodes
    }
    return {kind: {"nodes": nodes[kind], "seconds": seconds[kind]} for kind in nodes}


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    machine = result["machine"]
    lines = [
        "# Static int8 on ONNX Runtime",
        "",
        f"`python -m benchmarks.speed.static_int8` on {machine['cpu_model']}, "
        f"ONNX Runtime {result['onnxruntime']}, {result['model']}, one thread, batch 1: processor "
        f"time, median of {result['rounds']} rounds in turns; the ratio to dynamic int8 as shipped "
        "is the median of the rounds' ratios. Errors are relative to the largest logit, on the "
        f"{result['images']} images of noise that it was calibrated on.",
        "",
        *markdown_head(
            "way",
            "ms",
            "/ dynamic",
            "mean error",
            "largest error",
            "products: eight bits / float",
            numbers=5,
        ),
    ]
    for row in result["rows"]:
        lines.append(
            markdown_row(
                row["way"],
                f"{1e3 * row['processor_s']:.2f}",
                f"{row['ratio_to_dynamic']:.3f}",
                f"{row['mean_relative_error']:.1e}",
                f"{row['max_relative_error']:.1e}",
                f"{row['eight_bit_products']} / {row['float_products']}",
            )
        )
    lines += [
        "",
        "What the runtime ran, microseconds of one inference by its own profile (which takes some "
        f"time too): {BEFORE!r} and {SHIPPED!r}.",
        "",
        *markdown_head(
            "operator", "nodes before", "us before", "nodes shipped", "us shipped", numbers=4
        ),
        *_operator_lines(result["operators"][BEFORE], result["operators"][SHIPPED]),
    ]
    return "\n".join(lines) + "\n"


def _operator_lines(
    before: dict[str, dict[str, float]], shipped: dict[str, dict[str, float]]
) -> list[str]:
    absent: dict[str, float] = {"seconds": 0}
    kinds = sorted(
        {*before, *shipped},
        key=lambda kind: -max(side.get(kind, absent)["seconds"] for side in (before, shipped)),
    )
    return [
        markdown_row(
            kind,
            *(
                cell
                for side in (before, shipped)
                for cell in (
                    (f"{side[kind]['nodes']:.0f}", f"{1e6 * side[kind]['seconds']:.0f}")
                    if kind in side
                    else ("", "")
                )
            ),
        )
        for kind in kinds
    ]


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=16, help="images of noise to calibrate on")
    parser.add_argument("--out", type=Path, default=RESULTS / "static_int8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = lifted(options.model)
    images = calibration_noise(model, options.images)
    with torch.no_grad():
        reference = model(torch.from_numpy(images)).numpy()
    found = variants(model, images)
    calls = {
        name: call_of(opened(variant.graph, off=variant.off), images[:1])
        for name, variant in found.items()
    }
    turns = in_turns(calls, range(options.rounds), clock=time.thread_time, shuffle=True)
    samples = least(turns)
    profiles = {name: operators(variant, images[:1]) for name, variant in found.items()}
    rows: list[dict[str, Any]] = []
    for name, variant in found.items():
        counts = [
            sum(int(row["nodes"]) for kind, row in profiles[name].items() if kind in kinds)
            for kinds in (INT8_PRODUCTS, FLOAT_PRODUCTS)
        ]
        error = relative_error(reference, model_outputs(variant.graph, images, batch=1))
        pairs = zip(samples[name], samples[DYNAMIC], strict=True)
        rows.append(
            {
                "way": name,
                "processor_s": statistics.median(samples[name]),
                "ratio_to_dynamic": statistics.median(one / dynamic for one, dynamic in pairs),
                "mean_relative_error": float(error.mean()),
                "max_relative_error": float(error.max()),
                "eight_bit_products": counts[0],
                "float_products": counts[1],
            }
        )
    result = {
        "schema": "vitrim.benchmark-static-int8/1",
        "machine": read_machine(),
        "onnxruntime": onnxruntime.__version__,
        "model": options.model,
        "rounds": options.rounds,
        "images": options.images,
        "rows": rows,
        "operators": profiles,
    }
    save_result(options.out, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
