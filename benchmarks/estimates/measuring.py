"""Latencies and rates of this machine, from which the operators' costs are fitted."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
import vitrim
from vitrim.bench.estimate.costs import TimedOperator, fit_costs, rescale
from vitrim.bench.estimate.machine import Machine
from vitrim.bench.estimate.points import MEASURED, Processor, read_latencies
from vitrim.bench.estimate.workload import PlainVit
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.measure import profile_operators
from vitrim.bench.results.operator_table import OperatorRow
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.storage import replace_file
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.parity import Probe
from vitrim.export.runtimes import Source, runtime_named
from vitrim.targets.detect import detect_host

HERE = Path(__file__).parent
SIZE_NAMES = ("image", "patch", "embed", "depth", "heads", "classes", "channels")
SIZES = {
    "demo": (28, 4, 128, 4, 4, 10, 1),
    "vit_tiny_patch16_224": (224, 16, 192, 12, 3, 1000, 3),
    "vit_small_patch32_224": (224, 32, 384, 12, 6, 1000, 3),
    "deit_small_patch16_224": (224, 16, 384, 12, 6, 1000, 3),
    "vit_base_patch32_384": (384, 32, 768, 12, 12, 1000, 3),
}
FORMS_LAST_QUERIES = True
ROUNDS, TURN_S, MOST_CALLS, PROFILED_RUNS = 8, 0.1, 50, 10
Key = TypeVar("Key")


@dataclass(frozen=True)
class Setting:
    """A runtime with threads."""

    runtime: str
    threads: int
    precision: str = "fp32"


# No setting with a narrower instruction set: under ONEDNN_MAX_CPU_ISA=AVX2 OpenVINO 2026.4 computes
# vit_tiny faster than AVX2's own peak, since its matrix products come from MLAS, which ignores the
# limit (as onnxruntime's does). That machine would not exist.
SETTINGS = (
    *(Setting(runtime, threads) for runtime in ("onnxruntime", "openvino") for threads in (1, 2)),
    *(Setting("onnxruntime", threads, "int8") for threads in (1, 2)),
)


class Timing:
    """A process with one model in one setting, which times calls on request.

    Args:
        python: The interpreter.
        model: The model's file.
        setting: Runtime and threads.
        clock: `wall`, or `processor` for the processor time of the process.
    """

    def __init__(self, python: str, model: Path, setting: Setting, clock: str = "wall") -> None:
        script, threads = HERE / "timing.py", str(setting.threads)
        self.process = subprocess.Popen(
            [python, str(script), setting.runtime, str(model), threads, clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, -10)

    def request(self, count: int) -> list[float]:
        """Seconds of `count` calls; none from a process that could not start."""
        if self.process.stdin is None or self.process.stdout is None:
            return []
        with suppress(OSError):
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        return [float(value) for value in self.process.stdout.readline().split()]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def fastest_of_turns(children: Mapping[Key, Timing]) -> dict[Key, list[float]]:
    """Time all processes in turns, in rotating order, and end them.

    Returns:
        The fastest call of every turn in seconds; none of a process that could not start.
    """
    warm_up = {key: child.request(3) for key, child in children.items()}
    counts = {
        key: max(2, min(MOST_CALLS, round(TURN_S / min(seconds))))
        for key, seconds in warm_up.items()
        if seconds
    }
    samples: dict[Key, list[float]] = {key: [] for key in children}
    keys = list(counts)
    for number in range(ROUNDS if keys else 0):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            samples[key].append(min(children[key].request(counts[key] + 1)[1:]))
    for child in children.values():
        child.close()
    return samples


def vit_of(name: str) -> PlainVit:
    """The sizes as the estimator counts them."""
    image, patch, embed, depth, heads, classes, channels = SIZES[name]
    return PlainVit(image, patch, embed, depth, heads, 4 * embed, classes, channels)


def _network(name: str) -> tuple[torch.nn.Module, CompactModel]:
    """A plain ViT of random weights, and the same lifted."""
    image, patch, embed, depth, heads, classes, channels = SIZES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = timm.models.VisionTransformer(
        img_size=image,
        patch_size=patch,
        in_chans=channels,
        embed_dim=embed,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
    ).eval()
    return source, vitrim.lift(source)


def write_model(name: str, folder: Path) -> dict[str, Path]:
    """Write a model in the graph form that vitrim ships: {precision: file}."""
    _, network = _network(name)
    form = best_form("x86-64-v4-vnni", 1)[0]
    graphs = {
        "fp32": write_network(network, form),
        "int8": write_network(network, form, linears="int8", weight_bits=8),
    }
    paths = {precision: folder / f"{name}-{precision}.onnx" for precision in graphs}
    for precision, graph in graphs.items():
        paths[precision].write_bytes(graph.SerializeToString())
    return paths


def write_ncnn(name: str, folder: Path) -> Path:
    """Write the same network as ncnn's files, converted as the exporter does."""
    source, network = _network(name)
    ncnn = runtime_named("ncnn")
    form = ncnn.form
    assert form is not None
    shape = network.architecture.image
    zeros = np.zeros((1, *shape), np.float32)
    outputs = np.zeros((1, network.architecture.classes), np.float32)
    given = Source(
        model=source,
        compact=network,
        make_graph=lambda: write_network(network, form, batch=1),
        shape=shape,
        batch=1,
        target="host",
        threads=1,
        precision="fp32",
        images=None,
        probe=Probe(zeros, "seeded-noise", 0, outputs),
    )
    path = folder / ncnn.write(given, folder).main
    path.with_suffix(".shape").write_text(json.dumps(zeros.shape))
    return path


def add_ncnn() -> None:
    """Add ncnn's latencies on one thread to measured.json, by its ratio to ONNX Runtime's."""
    content = json.loads(MEASURED.read_text(encoding="utf-8"))
    known = {
        entry["model"]: entry
        for entry in content["latencies"]
        if (entry["runtime"], entry["precision"], entry["threads"]) == ("onnxruntime", "fp32", 1)
    }
    kept = [entry for entry in content["latencies"] if entry["runtime"] != "ncnn"]
    source = (
        "`python -m benchmarks.estimates --add ncnn`: ONNX Runtime's latency times the ratio of "
        f"processor times in turns, median of {ROUNDS}"
    )
    for model, entry in known.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = {
                "onnxruntime": write_model(model, folder)["fp32"],
                "ncnn": write_ncnn(model, folder),
            }
            samples = fastest_of_turns(
                {
                    key: Timing(sys.executable, path, Setting(key, 1), clock="processor")
                    for key, path in paths.items()
                }
            )
        pairs = zip(samples["ncnn"], samples["onnxruntime"], strict=True)
        ratios = [ncnn / onnxruntime for ncnn, onnxruntime in pairs]
        ratio = statistics.median(ratios)
        print(
            f"{model:26s} ncnn takes {ratio:.3f} of ONNX Runtime's time "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
        latency_s = float(f"{entry['latency_s'] * ratio:.4g}")
        kept.append({**entry, "runtime": "ncnn", "latency_s": latency_s, "source": source})
    replace_file(MEASURED, json.dumps({**content, "latencies": kept}, indent=1) + "\n")


def processor_rates(folder: Path) -> list[float]:
    """Clock in hertz, and multiply-adds a cycle at 512, 256 and 128 bits."""
    program = folder / "processor_rates"
    if not program.exists():
        source = HERE / "processor_rates.c"
        subprocess.run(["cc", "-O1", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


def memory_rate() -> float:
    """Bytes a second that one core reads from memory: the sum of 512 MB."""
    values = np.ones(64 * 2**20, dtype=np.float64)
    best_s = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - start)
    return values.nbytes / best_s


def measure(python: str) -> None:
    """Measure this machine, and write measured.json and costs.json.

    Args:
        python: An interpreter that has OpenVINO.
    """
    bandwidth = memory_rate()
    rates: list[list[float]] = []
    latencies: list[dict[str, Any]] = []
    profiles: list[tuple[str, Sequence[OperatorRow]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in SIZES:
            paths = write_model(model, folder)
            rates.append(processor_rates(folder))
            latencies += _latencies(model, paths, python)
            rates.append(processor_rates(folder))
            table = profile_operators(paths["fp32"], 1, runs=PROFILED_RUNS)
            profiles.append((model, table.rows))
            for path in paths.values():
                path.unlink()
    processor = _processor(rates, bandwidth)
    content = {
        "schema": "vitrim.latencies/1",
        "models": {
            name: dict(zip(SIZE_NAMES, sizes, strict=True)) for name, sizes in SIZES.items()
        },
        "processors": {"host": processor},
        "latencies": latencies,
    }
    replace_file(MEASURED, json.dumps(content, indent=1) + "\n")
    host = Processor.model_validate(processor).machine("host", 1, "fp32")
    operators = [entry for model, rows in profiles for entry in match(model, rows, host)]
    fitted = fit_costs(
        operators,
        f"{processor['title']}, onnxruntime, one thread, "
        f"{len(operators)} nodes of {len(SIZES)} models",
    )
    whole = [point for point in read_latencies(MEASURED).points() if point.family == "onnxruntime"]
    # int8 is a family of its own, since its products reach another share of another peak.
    rescale(fitted, [(point.workload, point.machine, point.latency_s) for point in whole]).save()


def _latencies(model: str, paths: Mapping[str, Path], python: str) -> list[dict[str, Any]]:
    """Latencies of one model in every setting, as entries of measured.json."""
    samples = fastest_of_turns(
        {
            setting: Timing(
                python if setting.runtime == "openvino" else sys.executable,
                paths[setting.precision],
                setting,
            )
            for setting in SETTINGS
        }
    )
    found = []
    for setting, seconds in samples.items():
        lead = f"{model:26s} {setting.runtime:12s}"
        if not seconds:
            print(f"{lead} could not start; give --python an interpreter that has it", flush=True)
            continue
        latency_s = float(f"{statistics.median(seconds):.4g}")
        print(f"{lead} {setting.threads} {setting.precision} {1e3 * latency_s:9.3f} ms", flush=True)
        found.append(
            {
                "processor": "host",
                "model": model,
                "runtime": setting.runtime,
                "precision": setting.precision,
                "threads": setting.threads,
                "latency_s": latency_s,
                "source": "measured by `python -m benchmarks.estimates --measure`, "
                f"median of {ROUNDS} turns' best",
                "last_queries": FORMS_LAST_QUERIES,
            }
        )
    return found


def _processor(rates: list[list[float]], bandwidth: float) -> dict[str, Any]:
    """This machine's processor, as an entry of measured.json."""
    machine, memory = read_machine(), detect_host().memory
    widest = next(column for column in (1, 2, 3) if all(rate[column] for rate in rates))
    # Rates are powers of two: what is less was taken by other programs.
    floats = 2 ** round(math.log2(max(rate[widest] for rate in rates)))
    dot_products = {"avx512_vnni", "avx_vnni", "asimddp"} & set(machine["cpu_features"])
    virtual = ", a virtual machine" if machine["virtual_machine"] else ""
    return {
        "title": f"{machine['cpu_model']} with {machine['cores']} cores{virtual}",
        "architecture": machine["architecture"],
        "cores": machine["cores"],
        "clock_hz": statistics.median(rate[0] for rate in rates),
        "lanes": {1: 16, 2: 8, 3: 4}[widest],
        "fp32_macs_per_cycle": floats,
        # An int8 dot product does four multiply-adds in the place of one.
        "int8_macs_per_cycle": 4 * floats if dot_products else None,
        "bandwidth_bytes_per_s": bandwidth,
        "last_cache_bytes": memory.l3_bytes or memory.l2_bytes or 0,
        "source": "clock and multiply-adds a cycle measured beside the timings by "
        "benchmarks/estimates/processor_rates.c; bandwidth: one core's read of 512 MB",
    }


def match(model: str, rows: Sequence[OperatorRow], host: Machine) -> list[TimedOperator]:
    """Each operator of the workload with the seconds of its nodes."""
    operators = list(vit_of(model).workload(model, last_queries=FORMS_LAST_QUERIES).operators)
    seconds: dict[str, float] = {}
    for row in rows:
        name = name_of(row.node, row.operator)
        if name is not None:
            seconds[name] = seconds.get(name, 0.0) + row.seconds
    return [
        TimedOperator(operator, host, seconds[operator.name])
        for operator in operators
        if operator.name in seconds
    ]


def name_of(node: str, operator: str) -> str | None:
    """The workload's operator of a node of vitrim's graphs; None for reshapes, slices and so on."""
    parts = node.split("/")[0].split(".")
    if operator in ("Reshape", "Slice", "Transpose", "Concat", "Squeeze", "Unsqueeze"):
        return None
    if parts[0] != "blocks" or len(parts) < 4:
        return parts[0] if parts[0] in ("stem", "head", "norm") else None
    block, branch, rest = ".".join(parts[:2]), parts[2], parts[3]
    if branch == "attn":
        inner = f"attn.{rest}" if rest in ("q", "k", "v", "out", "norm") else None
        return f"{block}.{inner or ('attn.add' if operator == 'Add' else 'attn')}"
    if rest in ("fc1", "out", "norm", "act"):
        return f"{block}.ffn.{rest}"
    return f"{block}.ffn.add" if operator == "Add" else None
