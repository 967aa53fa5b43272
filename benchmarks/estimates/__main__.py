"""Estimated latencies held against measured ones: `python -m benchmarks.estimates`.

Every device in bench/estimate/published.toml (figures of others, each with its source) and
bench/estimate/measured.json (this project's machine) is predicted by a calibration that never saw
that device; the table shows predicted, measured and their ratio, and the error bar that `vitrim
targets check` prints comes from it. Writes benchmarks/results/estimates.json and estimates.md.

    python -m benchmarks.estimates python -m benchmarks.estimates --measure [--python PYTHON]
    measure this machine first, and calibrate each operator's cost on it python -m
    benchmarks.estimates --add ncnn                      measure one more runtime on the machine of
    measured.json, busy or not

--measure times plain ViTs of random weights in ONNX Runtime and OpenVINO with one and two threads,
in turns, and the clock and multiply-add rate of the core before and after. PYTHON is an interpreter
that has OpenVINO, where this one has none.

--add takes processor time of one thread in turns with ONNX Runtime, which other work on the machine
hardly touches, and what it writes to measured.json is ONNX Runtime's latency there times the ratio
of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrim.bench.estimate.calibration import LEVEL, LeftOut, error_factor, fit, leave_one_out
from vitrim.bench.estimate.costs import OperatorCosts, TimedOperator, fit_costs, rescale
from vitrim.bench.estimate.machine import Machine
from vitrim.bench.estimate.points import MEASURED, Processor, known_points, read_latencies
from vitrim.bench.estimate.workload import PlainVit
from vitrim.bench.local.environment import read_machine
from vitrim.core.storage import replace_file

HERE = Path(__file__).parent
# image, patch, embed, depth, heads, classes, channels
SIZES = {
    "demo": (28, 4, 128, 4, 4, 10, 1),
    "vit_tiny_patch16_224": (224, 16, 192, 12, 3, 1000, 3),
    "vit_small_patch32_224": (224, 32, 384, 12, 6, 1000, 3),
    "deit_small_patch16_224": (224, 16, 384, 12, 6, 1000, 3),
    "vit_base_patch32_384": (384, 32, 768, 12, 12, 1000, 3),
}
FORMS_LAST_QUERIES = True
ROUNDS = 8


@dataclass(frozen=True)
class Setting:
    """A runtime with threads."""

    runtime: str
    threads: int
    precision: str = "fp32"


# No setting with a narrower instruction set: under ONEDNN_MAX_CPU_ISA=AVX2 OpenVINO 2026.4 computes
# vit_tiny faster than AVX2's own peak, since its matrix products come from MLAS, which obeys no
# such limit (nor does onnxruntime's). It would be a machine that does not exist.
SETTINGS = (
    *(Setting(runtime, threads) for runtime in ("onnxruntime", "openvino") for threads in (1, 2)),
    *(Setting("onnxruntime", threads, "int8") for threads in (1, 2)),
)


def vit_of(name: str) -> PlainVit:
    """The sizes as the estimator counts them."""
    image, patch, embed, depth, heads, classes, channels = SIZES[name]
    return PlainVit(image, patch, embed, depth, heads, 4 * embed, classes, channels)


def write_model(name: str, folder: Path) -> dict[str, Path]:
    """{precision: file} with random weights, in the graph form that vitrim ships."""
    import timm
    import torch
    import vitrim
    from vitrim.export.forms import write_network
    from vitrim.export.graphs.known_forms import best_form

    torch.manual_seed(0)
    torch.set_num_threads(1)
    image, patch, embed, depth, heads, classes, channels = SIZES[name]
    source = timm.models.VisionTransformer(
        img_size=image,
        patch_size=patch,
        in_chans=channels,
        embed_dim=embed,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
    )
    network, form = vitrim.lift(source.eval()), best_form("x86-64", 1)[0]
    paths = {"fp32": folder / f"{name}.onnx", "int8": folder / f"{name}-int8.onnx"}
    paths["fp32"].write_bytes(write_network(network, form).SerializeToString())
    paths["int8"].write_bytes(
        write_network(network, form, linears="int8", weight_bits=8).SerializeToString()
    )
    return paths


def write_ncnn(name: str, folder: Path) -> Path:
    """The same network as ncnn's files, converted as the exporter does."""
    import numpy as np
    import timm
    import torch
    import vitrim
    from vitrim.export.forms import write_network
    from vitrim.export.parity import Probe
    from vitrim.export.runtimes import Source, runtime_named

    image, patch, embed, depth, heads, classes, channels = SIZES[name]
    torch.manual_seed(0)
    source = timm.models.VisionTransformer(
        img_size=image,
        patch_size=patch,
        in_chans=channels,
        embed_dim=embed,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
    )
    network, ncnn = vitrim.lift(source.eval()), runtime_named("ncnn")
    assert ncnn.form is not None
    nothing = np.zeros((1, channels, image, image), np.float32)
    given = Source(
        model=source, compact=network, graph=write_network(network, ncnn.form, batch=1), shape=(channels, image, image), batch=1, target="host", threads=1,
        precision="fp32", images=None, probe=Probe(nothing, "seeded-noise", 0, np.zeros((1, classes), np.float32)),
    )  # fmt: skip
    path = folder / ncnn.write(given, folder).main
    path.with_suffix(".shape").write_text(json.dumps(nothing.shape))
    return path


def add(runtime: str) -> None:
    """Add a runtime's latencies with one thread to measured.json, by its ratio to ONNX
    Runtime's.
    """
    content = json.loads(MEASURED.read_text(encoding="utf-8"))
    known = {
        entry["model"]: entry
        for entry in content["latencies"]
        if (entry["runtime"], entry["precision"], entry["threads"]) == ("onnxruntime", "fp32", 1)
    }
    kept = [entry for entry in content["latencies"] if entry["runtime"] != runtime]
    for model, entry in known.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = {
                "onnxruntime": write_model(model, folder)["fp32"],
                runtime: write_ncnn(model, folder),
            }
            children = {
                key: Timing(sys.executable, path, Setting(key, 1), clock="processor")
                for key, path in paths.items()
            }
            count = max(
                2, min(50, round(0.1 / min(child.take(3)[-1] for child in children.values())))
            )
            ratios = []
            for turn in range(ROUNDS):
                order = list(children) if turn % 2 else list(children)[::-1]
                best = {key: min(children[key].take(count + 1)[1:]) for key in order}
                ratios.append(best[runtime] / best["onnxruntime"])
            for child in children.values():
                child.close()
        ratio = statistics.median(ratios)
        print(
            f"{model:26s} {runtime} takes {ratio:.3f} of ONNX Runtime's time ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
        source = f"`python -m benchmarks.estimates --add {runtime}`: ONNX Runtime's latency times the ratio of processor times in turns, median of {ROUNDS}"
        kept.append(
            {
                **entry,
                "runtime": runtime,
                "latency_s": float(f"{entry['latency_s'] * ratio:.4g}"),
                "source": source,
            }
        )
    replace_file(MEASURED, json.dumps({**content, "latencies": kept}, indent=1) + "\n")


class Timing:
    """A process with one model in one setting, waiting for its turn. clock: `wall`, or `processor`
    for the time that the process itself computed.
    """

    def __init__(self, python: str, model: Path, setting: Setting, clock: str = "wall") -> None:
        self.process = subprocess.Popen(
            [
                python,
                str(HERE / "estimate_timing.py"),
                setting.runtime,
                str(model),
                str(setting.threads),
                clock,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(setting.threads)},
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, -10)

    def take(self, count: int) -> list[float]:
        """Seconds of `count` calls; nothing from a process that could not start."""
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


def processor_rates(folder: Path) -> list[float]:
    """Clock in hertz, and multiply-adds a cycle at 512, 256 and 128 bits."""
    program = folder / "processor_rates"
    if not program.exists():
        subprocess.run(
            ["cc", "-O1", str(HERE / "processor_rates.c"), "-o", str(program)], check=True
        )
    return [
        float(value)
        for value in subprocess.run(
            [str(program)], capture_output=True, text=True, check=True
        ).stdout.split()
    ]


def memory_rate() -> float:
    """Bytes a second that one core reads from memory: the sum of 512 MB."""
    import time

    import numpy as np

    values = np.ones(64 * 2**20, dtype=np.float64)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


def measure(python: str) -> None:
    """Write measured.json and costs.json."""
    machine = read_machine()
    bandwidth = memory_rate()
    rates: list[list[float]] = []
    found: list[dict[str, Any]] = []
    timed: list[tuple[str, list[Any]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in SIZES:
            paths = write_model(model, folder)
            rates.append(processor_rates(folder))
            children = {
                setting: Timing(
                    python if setting.runtime == "openvino" else sys.executable,
                    paths[setting.precision],
                    setting,
                )
                for setting in SETTINGS
            }
            samples: dict[Setting, list[float]] = {setting: [] for setting in SETTINGS}
            warm = {setting: child.take(3) for setting, child in children.items()}
            counts = {
                setting: max(2, min(50, round(0.1 / min(values))))
                for setting, values in warm.items()
                if values
            }
            for turn in range(ROUNDS):
                order = list(counts)
                for setting in order[turn % len(order) :] + order[: turn % len(order)]:
                    samples[setting].append(min(children[setting].take(counts[setting] + 1)[1:]))
            for child in children.values():
                child.close()
            rates.append(processor_rates(folder))
            for setting, values in samples.items():
                if values:
                    found.append(
                        {
                            "processor": "host",
                            "model": model,
                            "runtime": setting.runtime,
                            "precision": setting.precision,
                            "threads": setting.threads,
                            "latency_s": float(f"{statistics.median(values):.4g}"),
                            "source": f"measured by `python -m benchmarks.estimates --measure`, median of {ROUNDS} turns' best",
                            "last_queries": FORMS_LAST_QUERIES,
                        }
                    )
                    print(
                        f"{model:26s} {setting.runtime:12s} {setting.threads} {setting.precision} {1e3 * found[-1]['latency_s']:9.3f} ms",
                        flush=True,
                    )
                else:
                    print(
                        f"{model:26s} {setting.runtime:12s} could not start; give --python an interpreter that has it",
                        flush=True,
                    )
            timed.append((model, profile(paths["fp32"])))
            for path in paths.values():
                path.unlink()
    clock = statistics.median(rate[0] for rate in rates)
    widest = next(column for column in (1, 2, 3) if all(rate[column] for rate in rates))
    processor = {
        "title": f"{machine['cpu_model']} with {machine['cores']} cores"
        + (", a virtual machine" if machine["virtual_machine"] else ""),
        "architecture": machine["architecture"],
        "cores": machine["cores"],
        "clock_hz": clock,
        "lanes": {1: 16, 2: 8, 3: 4}[widest],
        # Cycles are whole: what is less was taken by others.
        "fp32_macs_per_cycle": (
            floats := 2 ** round(math.log2(max(rate[widest] for rate in rates)))
        ),
        # An int8 dot product does four multiply-adds in the place of one.
        "int8_macs_per_cycle": 4 * floats
        if {"avx512_vnni", "avx_vnni", "asimddp"} & set(machine["cpu_features"])
        else None,
        "bandwidth_bytes_per_s": bandwidth,
        "last_cache_bytes": _last_cache_bytes(),
        "source": "clock and multiply-adds a cycle measured beside the timings by benchmarks/estimates/processor_rates.c; bandwidth: one core's read of 512 MB",
    }
    models = {
        name: dict(
            zip(
                ("image", "patch", "embed", "depth", "heads", "classes", "channels"),
                sizes,
                strict=True,
            )
        )
        for name, sizes in SIZES.items()
    }
    content = {
        "schema": "vitrim.latencies/1",
        "models": models,
        "processors": {"host": processor},
        "latencies": found,
    }
    replace_file(MEASURED, json.dumps(content, indent=1) + "\n")
    host = Processor.model_validate(processor).machine("host", 1, "fp32")
    operators = [entry for model, rows in timed for entry in match(model, rows, host)]
    fitted = fit_costs(
        operators,
        f"{processor['title']}, onnxruntime, one thread, {len(operators)} nodes of {len(SIZES)} models",
    )
    whole = [point for point in read_latencies(MEASURED).points() if point.family == "onnxruntime"]
    # int8 is a family of its own, since its products run at another share of another peak.
    rescale(fitted, [(point.workload, point.machine, point.latency_s) for point in whole]).save()


def _last_cache_bytes() -> int:
    from vitrim.targets.detect import detect_host

    memory = detect_host().memory
    return memory.l3_bytes or memory.l2_bytes or 0


def profile(path: Path) -> list[Any]:
    """Rows of the runtime's own profiler, one thread."""
    from vitrim.bench.local.measure import profile_operators

    return list(profile_operators(path, 1, runs=10).rows)


def match(model: str, rows: list[Any], host: Machine) -> list[TimedOperator]:
    """Each operator of the workload with the seconds of the nodes that it became: those whose name
    begins with its own.
    """
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
    """The workload's operator of a node of vitrim's graphs; None for what belongs to none
    (reshapes, slices).
    """
    parts = node.split("/")[0].split(".")
    if operator in ("Reshape", "Slice", "Transpose", "Concat", "Squeeze", "Unsqueeze"):
        return None
    if parts[0] != "blocks" or len(parts) < 4:
        return {"stem": "stem", "head": "head", "norm": "norm"}.get(parts[0])
    block, branch, rest = ".".join(parts[:2]), parts[2], parts[3]
    if branch == "attn":
        inner = {
            "q": "attn.q",
            "k": "attn.k",
            "v": "attn.v",
            "out": "attn.out",
            "norm": "attn.norm",
        }.get(rest)
        if inner is None:
            inner = "attn.add" if operator == "Add" else "attn"
    else:
        inner = {"fc1": "ffn.fc1", "out": "ffn.out", "norm": "ffn.norm", "act": "ffn.act"}.get(rest)
        if inner is None:
            inner = "ffn.add" if operator == "Add" else None
    return None if inner is None else f"{block}.{inner}"


def table(left_out: list[LeftOut]) -> list[str]:
    """Markdown: one line a figure."""
    lines = [
        "| device | runtime | model | precision | predicted | measured | predicted / measured | rests on | measured by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in left_out:
        point, cell = (
            entry.point,
            " on ".join(part for part in entry.cell if part) or "every device",
        )
        lines.append(
            f"| {point.label} | {point.family} | {point.workload.name} | {point.machine.precision} | {_ms(entry.predicted_s)} | {_ms(point.latency_s)} | "
            f"{entry.ratio:.2f} | {cell} | {point.source} |"
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def summary(left_out: list[LeftOut], without: list[LeftOut]) -> dict[str, Any]:
    """Median and worst miss over devices and over figures, as factors."""
    misses = {
        entry.point.label + entry.point.workload.name + entry.point.family: math.exp(
            abs(math.log(entry.ratio))
        )
        for entry in left_out
    }
    worst = max(left_out, key=lambda entry: abs(math.log(entry.ratio)))
    devices = {entry.point.machine.device for entry in left_out}
    published = [entry for entry in left_out if entry.point.machine.device != "host"]
    return {
        "figures": len(left_out),
        "devices": len(devices),
        "median_ratio": statistics.median(entry.ratio for entry in left_out),
        "median_factor": statistics.median(misses.values()),
        "median_factor_published": statistics.median(
            math.exp(abs(math.log(entry.ratio))) for entry in published
        ),
        "within_factor_2": sum(miss <= 2 for miss in misses.values()) / len(misses),
        "worst_ratio": worst.ratio,
        "worst": f"{worst.point.label}, {worst.point.workload.name}",
        "error_factor": error_factor(
            [
                entry
                for entry in left_out
                if entry.cell == (entry.point.family, entry.point.machine.architecture)
            ]
        ),
        "error_factor_without_runtime": error_factor(without),
        "level": LEVEL,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine and calibrate on it first"
    )
    parser.add_argument(
        "--add", choices=["ncnn"], help="measure this runtime too, in turns with ONNX Runtime"
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter with OpenVINO")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.measure:
        measure(options.python)
    if options.add:
        add(options.add)
    points, costs = known_points(), OperatorCosts.load()
    left_out = leave_one_out(points, costs)
    told, calibration = (
        summary(left_out, leave_one_out(points, costs, without_runtime=True)),
        fit(points, costs),
    )
    lines = table(left_out)
    text = [
        "# Estimates held against measured latencies",
        "",
        "`python -m benchmarks.estimates`. Each device is predicted by a calibration that never saw it, with any runtime, model or number of threads.",
        f"Operator costs were calibrated on `host`: {costs.calibrated_on}. Emulated times are nowhere among them.",
        "",
        *lines,
        "",
        f"{told['figures']} figures of {told['devices']} devices. Median ratio {told['median_ratio']:.2f}; the median miss is a factor of "
        f"{told['median_factor']:.2f} ({told['median_factor_published']:.2f} on the published ones alone), {100 * told['within_factor_2']:.0f} % are within",
        f"a factor of 2; the worst ratio is {told['worst_ratio']:.2f} ({told['worst']}).",
        "",
        f"Error bar of an estimate (split conformal over the devices, {100 * LEVEL:.0f} %): a factor of {told['error_factor']:.2f} where the runtime was",
        f"measured on the kind of machine, {told['error_factor_without_runtime']:.2f} where it was not (predicted without any figure of its runtime).",
    ]
    print("\n".join(text))
    rows = [
        {
            "device": entry.point.machine.device,
            "setting": entry.point.setting,
            "threads": entry.point.machine.threads,
            "runtime": entry.point.family,
            "model": entry.point.workload.name,
            "precision": entry.point.machine.precision,
            "predicted_s": entry.predicted_s,
            "measured_s": entry.point.latency_s,
            "ratio": entry.ratio,
            "rests_on": list(entry.cell),
            "source": entry.point.source,
        }
        for entry in left_out
    ]
    levels = {
        " on ".join(part for part in cell if part) or "all": level
        for cell, level in calibration.levels.items()
    }
    content = {
        "summary": told,
        "threads_power": calibration.threads_power,
        "levels": levels,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    replace_file(options.out / "estimates.json", json.dumps(content, indent=1) + "\n")
    replace_file(options.out / "estimates.md", "\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
