"""Vision Transformers on an NVIDIA GPU: `python -m benchmarks.gpu`.

ONNX Runtime with each GPU provider that it has, and torch, in fp32 and fp16, over batch sizes;
copies timed and not, launched and as a recorded CUDA graph; synchronised after each call, with the
device memory that each took. The logits are held against the processor's before anything is timed.
Writes benchmarks/results/gpu.json and gpu.md, which name the device. Without a GPU it says so in
one line and leaves with 2.

    python -m benchmarks.gpu [--model deit_tiny_patch16_224] [--batches 1,8,32,128] [--time-limit
    10] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrim.bench.local.options import gpu_providers, why_no_gpu

HERE = Path(__file__).parent
BATCHES = (1, 8, 32, 128)
WARM, LEAST = 20, 50


def write_models(name: str, batch: int, folder: Path) -> tuple[Any, dict[str, Path]]:
    """The module, and {precision: .onnx} with a fixed batch: a recorded graph wants fixed sizes."""
    import onnx
    import timm
    import torch
    import vitrim
    from vitrim.export.forms import write_network
    from vitrim.export.graphs.known_forms import best_form
    from vitrim.export.quantization.half import half

    torch.manual_seed(0)
    network = vitrim.lift(timm.create_model(name).eval())
    graph = write_network(network, best_form("cuda", "dynamic")[0], batch=batch)
    found = {}
    for precision, model in (("fp32", graph), ("fp16", half(graph))):
        found[precision] = folder / f"{name}-{precision}-{batch}.onnx"
        onnx.save(model, str(found[precision]))
    return network, found


def timed(call: Callable[[], Any], limit_s: float) -> list[float]:
    """Seconds of each call after a warm-up, until the limit."""
    for _ in range(WARM):
        call()
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < LEAST or time.perf_counter() - start < limit_s:
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    return seconds


def row(
    where: dict[str, Any], seconds: list[float], memory_bytes: int | None, batch: int
) -> dict[str, Any]:
    """One line of the table."""
    p50 = statistics.median(seconds)
    quantiles = statistics.quantiles(seconds, n=100)
    return {
        **where,
        "batch": batch,
        "p50_s": p50,
        "p90_s": quantiles[89],
        "p99_s": quantiles[98],
        "images_per_s": batch / p50,
        "device_memory_peak_bytes": memory_bytes,
        "calls": len(seconds),
    }


def runtime_rows(
    files: dict[str, Path], expected: Any, images: Any, limit_s: float
) -> list[dict[str, Any]]:
    """ONNX Runtime, each provider, precision, copies and graph, each in turn through the engine
    that `vitrim bench` times.
    """
    import numpy as np
    from vitrim.runtimes import EngineError, open_engine

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
        options = (
            {"trt_fp16_enable": "1"}
            if provider.startswith("Tensorrt") and precision == "fp16"
            else {}
        )
        job = {
            "model": str(path),
            "threads": 1,
            "providers": [provider, "CPUExecutionProvider"],
            "copies": copies,
            "cuda_graph": graph,
        }
        try:
            engine = open_engine({**job, "provider_options": {provider: options}})
            engine.load()
            error = float(np.abs(engine.infer(images) - expected).max() / np.abs(expected).max())
            found = row(
                where,
                timed(engine.timed_call(images), limit_s),
                engine.device_memory_peak_bytes(),
                len(images),
            )
            rows.append({**found, "ran_on": engine.provider, "relative_error": error})
        except (EngineError, RuntimeError) as problem:
            # What one provider cannot do is one line, and the others go on.
            print(f"{where}: {' '.join(str(problem).split())[:200]}", flush=True)
    return rows


def launched(module: Any, there: Any) -> Callable[[], Any]:
    """Each kernel launched anew."""

    def work() -> Any:
        return module(there)

    return work


def recorded(module: Any, there: Any) -> Callable[[], Any]:
    """A CUDA graph of one call, replayed."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = module(there)

    def work() -> Any:
        graph.replay()
        return answer

    return work


def torch_rows(module: Any, expected: Any, images: Any, limit_s: float) -> list[dict[str, Any]]:
    """torch: eager and as a recorded graph, synchronised."""
    import copy

    import torch

    rows = []
    for precision, graph, copies in itertools.product(
        ("fp32", "fp16"), (False, True), (True, False)
    ):
        torch.cuda.reset_peak_memory_stats()
        kind = torch.float16 if precision == "fp16" else torch.float32
        there_module = copy.deepcopy(module).to("cuda", kind)
        host = torch.from_numpy(images).to(kind).pin_memory()
        there = host.to("cuda")
        with torch.no_grad():
            for _ in range(3):
                answer = there_module(there)
            torch.cuda.synchronize()
            error = float(
                (answer.float().cpu() - torch.from_numpy(expected)).abs().max()
                / abs(expected).max()
            )
            work = recorded(there_module, there) if graph else launched(there_module, there)

            def call(
                work: Callable[[], Any] = work,
                there: Any = there,
                host: Any = host,
                copies: bool = copies,
            ) -> None:
                if copies:
                    there.copy_(host, non_blocking=True)
                    work().cpu()
                else:
                    work()
                torch.cuda.synchronize()

            seconds = timed(call, limit_s)
        where = {
            "runtime": "torch",
            "provider": torch.cuda.get_device_name(),
            "precision": precision,
            "copies_timed": copies,
            "cuda_graph": graph,
        }
        rows.append(
            {
                **row(where, seconds, int(torch.cuda.max_memory_reserved()), len(images)),
                "relative_error": error,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], device: str, model: str) -> str:
    """The table, with the device's name."""
    lines = [
        f"# {model} on {device}",
        "",
        "`python -m benchmarks.gpu`; every call waited for; copies: images to the device and logits back within the timing.",
        "",
        "| runtime | provider | precision | batch | copies | CUDA graph | p50 | p99 | images/s | device memory | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(rows, key=lambda entry: (entry["batch"], entry["p50_s"])):
        memory = entry["device_memory_peak_bytes"]
        lines.append(
            f"| {entry['runtime']} | {entry['provider']} | {entry['precision']} | {entry['batch']} | {'timed' if entry['copies_timed'] else 'not'} | "
            f"{'yes' if entry['cuda_graph'] else 'no'} | {1e3 * entry['p50_s']:.3f} ms | {1e3 * entry['p99_s']:.3f} ms | {entry['images_per_s']:.0f} | "
            f"{'' if memory is None else f'{memory / 1e6:.0f} MB'} | {entry['relative_error']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a name that timm knows")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument(
        "--time-limit", type=float, default=2.0, help="seconds for each line of the table"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if reason := why_no_gpu():
        sys.stderr.write(reason + "\n")
        return 2
    import numpy as np
    import torch
    from vitrim.bench.local.environment import read_machine
    from vitrim.core.storage import replace_file

    machine, rows = read_machine(), []
    for batch in map(int, options.batches.split(",")):
        with tempfile.TemporaryDirectory() as name:
            network, files = write_models(options.model, batch, Path(name))
            images = np.random.default_rng(0).standard_normal(
                (batch, *network.architecture.image), dtype=np.float32
            )
            with torch.no_grad():
                expected = network(torch.from_numpy(images)).numpy()
            rows += runtime_rows(files, expected, images, options.time_limit)
            if torch.cuda.is_available():
                rows += torch_rows(network, expected, images, options.time_limit)
            else:
                print(
                    f"torch {torch.__version__} reaches no GPU; its rows are left out", flush=True
                )
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"model": options.model, "machine": machine, "rows": rows}
    replace_file(options.out / "gpu.json", json.dumps(content, indent=1) + "\n")
    text = markdown(
        rows, str(machine["accelerator"] or torch.cuda.get_device_name()), options.model
    )
    replace_file(options.out / "gpu.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
