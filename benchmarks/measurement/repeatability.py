"""Repeatability of a measured ratio: `python -m benchmarks.measurement.repeatability`.

The same two artifacts are measured several times, each time in new processes. The table shows the
p50s and their ratio each time, and how much the ratio varies (largest over smallest, less one; goal
below 3 %). Absolute times drift with other work on the machine, which the table reports. Then the
runner's p50 is compared with that of a C program that times the same file through ONNX Runtime's
own C API, in turns of random order (goal within 3 %), and its peak memory with GNU time's (goal
within 2 %).

    python -m benchmarks.measurement.repeatability [DENSE COMPACT] [--times 5] [--time-limit 20]
        [--threads 1] [--header FOLDER] [--json FILE]

Without paths, the demo's shapes with random weights are exported: dense, and cut to half of its
heads and FFN. FOLDER contains onnxruntime_c_api.h; without it the C program is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vitrim.bench.local.measure import measure_interleaved
from vitrim.bench.results.compare import compare
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form

from ..models import lifted, randomly_cut
from ..results_file import save_result
from .other_program import compare_with_runner, runtime_library
from .peak_rss import GNU_TIME, peak_memory

SOURCE = Path(__file__).with_name("runtime_timing.c")
ROUNDS, TURN_S = 40, 0.05


def demo_pair(folder: Path) -> tuple[Path, Path]:
    """The demo's model and a cut of it, with random weights, as .onnx files."""
    torch.set_num_threads(1)
    dense = lifted("demo")
    models = {"dense": dense, "compact": randomly_cut(dense, {"head": 0.5, "ffn": 0.5})}
    form = best_form("x86-64-v4-vnni", 1)[0]
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(write_network(model, form).SerializeToString())
    return folder / "dense.onnx", folder / "compact.onnx"


def measure_once(
    dense: Path, cut: Path, *, seed: int, threads: int, limit_s: float
) -> dict[str, Any]:
    """Measure both in new processes.

    Args:
        dense: The larger artifact.
        cut: The smaller artifact.
        seed: Seed of the order of turns.
        threads: Threads of the runtime.
        limit_s: Time limit of the rounds.

    Returns:
        p50s in seconds, the ratio of the paired rounds, and how busy the machine was.
    """
    found = measure_interleaved(
        {"dense": dense, "compact": cut},
        threads,
        time_limit_s=limit_s,
        half_width=0.005,
        least_rounds=100,
        seed=seed,
        quiet=True,
    )
    one, two = found["dense"], found["compact"]
    ratio = compare(one, two).ratio
    return {
        "dense_p50_s": one.summary().p50_s,
        "compact_p50_s": two.summary().p50_s,
        "ratio": ratio.estimate,
        "low": ratio.low,
        "high": ratio.high,
        "rounds": len(one.samples_per_turn),
        "cpu_share": one.cpu_share,
        "busy_cores": one.environment.busy_cores_before,
        "load": one.environment.load_after,
    }


def compare_with_c(model: Path, threads: int, header: Path, folder: Path) -> dict[str, float]:
    """Compare the runner's time with that of the C program, on one file.

    Args:
        model: The .onnx file.
        threads: Threads of both.
        header: Folder of onnxruntime_c_api.h.
        folder: Where the program is built.

    Returns:
        The ratio runner / program with its 95 % interval.
    """
    program = folder / "runtime_timing"
    subprocess.run(
        ["cc", "-O2", f"-I{header}", str(SOURCE), "-o", str(program), "-ldl"], check=True
    )
    command = [str(program), str(runtime_library()), str(model), str(threads), "SHAPE"]
    compared = compare_with_runner(model, command, threads=threads, rounds=ROUNDS, turn_s=TURN_S)
    ratio = compared.runner_over_program()
    return {"ratio": ratio.estimate, "low": ratio.low, "high": ratio.high}


def line(number: int, row: dict[str, Any]) -> str:
    """One line of the printed table."""
    return (
        f"{number:4} {row['dense_p50_s'] * 1e3:10.4f} ms {row['compact_p50_s'] * 1e3:10.4f} ms "
        f"{row['ratio']:8.4f} ({row['low']:.4f} to {row['high']:.4f}) {row['rounds']:6} rounds, "
        f"load {row['load']:.1f}"
    )


def variation(ratios: list[float]) -> float:
    """Largest over smallest, less one."""
    return max(ratios) / min(ratios) - 1


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "artifacts", nargs="*", type=Path, help="two .onnx files or artifact folders"
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--header", type=Path, help="the folder of onnxruntime_c_api.h")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if len(options.artifacts) not in (0, 2):
        parser.error("give two artifacts, or none")
    with tempfile.TemporaryDirectory() as name:
        dense, cut = options.artifacts or demo_pair(Path(name))
        print("time  dense p50      compact p50     compact/dense (99 % interval)", flush=True)
        rows = []
        for number in range(options.times):
            settings = {"threads": options.threads, "limit_s": options.time_limit}
            rows.append(measure_once(dense, cut, seed=number, **settings))
            print(line(number + 1, rows[-1]), flush=True)
        plain = [row["compact_p50_s"] / row["dense_p50_s"] for row in rows]
        result: dict[str, Any] = {
            "rows": rows,
            "variation": variation([row["ratio"] for row in rows]),
            "plain_variation": variation(plain),
        }
        print(
            f"the ratio varies by {100 * result['variation']:.2f} % (goal: below 3 %); "
            f"p50 over p50 by {100 * result['plain_variation']:.2f} %"
        )
        if dense.suffix == ".onnx" and options.header:
            found = compare_with_c(dense, options.threads, options.header, Path(name))
            result["witness"] = found
            print(
                f"the runner's time over a C program's: {found['ratio']:.4f} "
                f"({found['low']:.4f} to {found['high']:.4f}); goal: within 3 %"
            )
        if dense.suffix == ".onnx" and GNU_TIME.exists():
            memory = result["memory"] = peak_memory(dense, options.threads)
            print(
                f"peak memory: runner {memory['runner_bytes']}, GNU time "
                f"{memory['gnu_time_bytes']} bytes; goal: within 2 %"
            )
    if options.json:
        save_result(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
