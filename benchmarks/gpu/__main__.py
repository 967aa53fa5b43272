"""Vision Transformers on an NVIDIA GPU: `python -m benchmarks.gpu`.

ONNX Runtime with each of its GPU providers, and torch, in fp32 and fp16, over batch sizes; with and
without copies, launched and as a recorded CUDA graph; synchronised after each call, with the device
memory that each took. Before timing, the logits are compared with the processor's. Then training:
equal masks on the GPU and the CPU, runs that resume on the other one, two processes, and images per
second and memory by precision. Writes `results/gpu.json` and `gpu.md`, which name the device and
what was skipped. Without a GPU it prints what it skips as JSON and returns 2.

    python -m benchmarks.gpu [--model deit_tiny_patch16_224] [--batches 1,8,32,128]
        [--train-model deit_small_patch16_224] [--train-batch 128] [--time-limit 2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.options import gpu_providers, why_no_gpu
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.quantization.quantize import half
from vitrim.runtimes import EngineError, open_engine

from ..models import lifted, noise
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from . import training

BATCHES = (1, 8, 32, 128)
WARM_UP_CALLS, LEAST_CALLS = 20, 50


def write_models(name: str, batch: int, folder: Path) -> tuple[CompactModel, dict[str, Path]]:
    """The module, and {precision: .onnx} with a fixed batch, as recorded graphs need it."""
    network = lifted(name)
    graph = write_network(network, best_form("cuda", "dynamic")[0], batch=batch)
    found = {}
    for precision, model in (("fp32", graph), ("fp16", half(graph))):
        found[precision] = folder / f"{name}-{precision}-{batch}.onnx"
        onnx.save(model, str(found[precision]))
    return network, found


def timed(call: Callable[[], object], limit_s: float) -> list[float]:
    """Seconds of each call after a warm-up, until the time limit."""
    for _ in range(WARM_UP_CALLS):
        call()
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < LEAST_CALLS or time.perf_counter() - start < limit_s:
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    return seconds


def row(
    where: dict[str, Any], seconds: list[float], memory_bytes: int | None, batch: int
) -> dict[str, Any]:
    """One line of the table.

    Args:
        where: Runtime, provider, precision and so on.
        seconds: Of each call.
        memory_bytes: Peak device memory, where it is known.
        batch: Images of a call.
    """
    quantiles = statistics.quantiles(seconds, n=100)
    p50_s = statistics.median(seconds)
    return {
        **where,
        "batch": batch,
        "p50_s": p50_s,
        "p90_s": quantiles[89],
        "p99_s": quantiles[98],
        "images_per_s": batch / p50_s,
        "device_memory_peak_bytes": memory_bytes,
        "calls": len(seconds),
    }


def runtime_rows(
    files: dict[str, Path], expected: np.ndarray, images: np.ndarray, limit_s: float
) -> list[dict[str, Any]]:
    """Measure ONNX Runtime with each provider, precision, copies and graph.

    Args:
        files: {precision: .onnx}.
        expected: The processor's logits.
        images: (batch, channels, height, width).
        limit_s: Time limit of each row.

    Returns:
        One row for each combination that the runtime supports.
    """
    rows = []
    for provider, (precision, path), copies, graph in itertools.product(
        gpu_providers(), files.items(), (True, False), (False, True)
    ):
        where = {
            "runtime": "onnxruntime",
            "provider": provider,
            "precision": precision,
            "copies_timed": copies,
            "cuda_graph": graph,
        }
        tensorrt_half = provider.startswith("Tensorrt") and precision == "fp16"
        job = {
            "model": str(path),
            "threads": 1,
            "providers": [provider, "CPUExecutionProvider"],
            "copies": copies,
            "cuda_graph": graph,
            "provider_options": {provider: {"trt_fp16_enable": "1"} if tensorrt_half else {}},
        }
        try:
            engine = open_engine(job)
            engine.load()
            error = np.abs(engine.infer(images) - expected).max() / np.abs(expected).max()
            seconds = timed(engine.timed_call(images), limit_s)
        except (EngineError, RuntimeError) as problem:
            # What one provider cannot do is one line; the others continue.
            print(f"{where}: {' '.join(str(problem).split())[:200]}", flush=True)
            continue
        found = row(where, seconds, engine.device_memory_peak_bytes(), len(images))
        rows.append({**found, "ran_on": engine.provider, "relative_error": float(error)})
    return rows


def launched(module: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that launches every kernel."""
    return lambda: module(images)


def recorded(module: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that replays a recorded CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output: torch.Tensor = module(images)

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def synchronised(
    work: Callable[[], torch.Tensor], host: torch.Tensor | None, there: torch.Tensor
) -> Callable[[], None]:
    """A call that waits for the device; with `host`, it copies images there and logits back."""

    def call() -> None:
        if host is None:
            work()
        else:
            there.copy_(host, non_blocking=True)
            work().cpu()
        torch.cuda.synchronize()

    return call


def torch_rows(
    module: nn.Module, expected: np.ndarray, images: np.ndarray, limit_s: float
) -> list[dict[str, Any]]:
    """Measure torch, eager and as a recorded graph.

    Args:
        module: The model on the CPU.
        expected: Its logits there.
        images: (batch, channels, height, width).
        limit_s: Time limit of each row.

    Returns:
        One row for each precision, with and without graph and copies.
    """
    rows = []
    wanted = torch.from_numpy(expected)
    for precision, graph, copies in itertools.product(
        ("fp32", "fp16"), (False, True), (True, False)
    ):
        torch.cuda.reset_peak_memory_stats()
        dtype = torch.float16 if precision == "fp16" else torch.float32
        on_device = copy.deepcopy(module).to("cuda", dtype)
        host = torch.from_numpy(images).to(dtype).pin_memory()
        there = host.to("cuda")
        with torch.no_grad():
            for _ in range(3):
                output = on_device(there)
            torch.cuda.synchronize()
            error = (output.float().cpu() - wanted).abs().max() / wanted.abs().max()
            work = recorded(on_device, there) if graph else launched(on_device, there)
            seconds = timed(synchronised(work, host if copies else None, there), limit_s)
        where = {
            "runtime": "torch",
            "provider": torch.cuda.get_device_name(),
            "precision": precision,
            "copies_timed": copies,
            "cuda_graph": graph,
        }
        memory = int(torch.cuda.max_memory_reserved())
        rows.append({**row(where, seconds, memory, len(images)), "relative_error": float(error)})
    return rows


def markdown(rows: list[dict[str, Any]], device: str, model: str) -> str:
    """The table, with the device's name."""
    lines = [
        f"# {model} on {device}",
        "",
        "`python -m benchmarks.gpu`; every call is synchronised; copies: images to the device and "
        "logits back within the timing.",
        "",
        *markdown_head(
            *("runtime", "provider", "precision", "batch", "copies", "CUDA graph"),
            *("p50", "p99", "images/s", "device memory", "error"),
        ),
    ]
    for entry in sorted(rows, key=lambda entry: (entry["batch"], entry["p50_s"])):
        memory = entry["device_memory_peak_bytes"]
        lines.append(
            markdown_row(
                *(entry[key] for key in ("runtime", "provider", "precision", "batch")),
                "timed" if entry["copies_timed"] else "not",
                "yes" if entry["cuda_graph"] else "no",
                f"{1e3 * entry['p50_s']:.3f} ms",
                f"{1e3 * entry['p99_s']:.3f} ms",
                f"{entry['images_per_s']:.0f}",
                "" if memory is None else f"{memory / 1e6:.0f} MB",
                f"{entry['relative_error']:.1e}",
            )
        )
    return "\n".join(lines) + "\n"


def training_markdown(found: dict[str, Any]) -> str:
    """The checks and the table of training, and what was skipped."""
    lines = ["", "## Training", ""]
    for name, check in found["checks"].items():
        figures = ", ".join(f"{key} {value}" for key, value in check.items() if key != "passed")
        lines.append(f"- {name}: {'passed' if check['passed'] else 'FAILED'} ({figures})")
    lines += [f"- {name}: skipped, {reason}" for name, reason in found["skipped"].items()]
    if found["rows"]:
        heads = ("task", "precision", "compiled", "batch", "images/s", "device memory")
        lines += ["", *markdown_head(*heads)]
    for row in found["rows"]:
        memory = f"{row.get('device_memory_peak_bytes', 0) / 1e9:.2f} GB"
        speed = row.get("error") or f"{row['images_per_s']:.0f}"
        cells = (row["task"], row["precision"], "yes" if row["compiled"] else "no")
        lines.append(markdown_row(*cells, row.get("batch", ""), speed, memory))
    return "\n".join(lines) + "\n"


def inference_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of inference, batch by batch."""
    rows = []
    for batch in map(int, options.batches.split(",")):
        with tempfile.TemporaryDirectory() as name:
            network, files = write_models(options.model, batch, Path(name))
            images = noise(network, batch)
            with torch.no_grad():
                expected = network(torch.from_numpy(images)).numpy()
            rows += runtime_rows(files, expected, images, options.time_limit)
            if torch.cuda.is_available():
                rows += torch_rows(network, expected, images, options.time_limit)
            else:
                print(f"torch {torch.__version__} finds no GPU; its rows are left out", flush=True)
    return rows


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--train-model", default="deit_small_patch16_224", help="a timm name")
    parser.add_argument("--train-batch", type=int, default=128)
    parser.add_argument("--time-limit", type=float, default=2.0, help="seconds for each row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    reason = why_no_gpu()
    trained = training.measure(options.train_model, options.train_batch, options.time_limit)
    if reason:
        trained["skipped"]["inference"] = reason
        sys.stderr.write(reason + "\n")
    if not trained["checks"] and not trained["rows"] and reason:
        print(json.dumps({"skipped": trained["skipped"]}, indent=1))
        return 2
    machine = read_machine()
    rows = [] if reason else inference_rows(options)
    device = str(machine["accelerator"] or torch.cuda.get_device_name())
    text = markdown(rows, device, options.model) + training_markdown(trained)
    content = {"model": options.model, "machine": machine, "rows": rows, "training": trained}
    save_result(options.out / "gpu", content, text)
    print(text)
    return 0 if all(check["passed"] for check in trained["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
