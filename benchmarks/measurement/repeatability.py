"""Do the numbers come again? `python -m benchmarks.measurement.repeatability`.

The same two artifacts are measured several times, each time anew; the table shows each time's p50s
and their ratio, and by how much the ratio varies (largest over smallest, less one; the goal is
below 3 %). Absolute times drift with the machine's other work, which the table states too. Then the
runner's p50 is held against a C program that times the same file through ONNX Runtime's own C API,
in turns of random order (goal: within 3 %), and its peak memory against GNU time's (goal: within 2
%).

    python -m benchmarks.measurement.repeatability [DENSE COMPACT] [--times 5] [--time-limit 20] [--threads 1]
    [--header FOLDER] [--json FILE]

Without paths, the demo's shapes with random weights are exported: dense, and cut to half of its
heads and FFN. FOLDER holds onnxruntime_c_api.h; without it the C program is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitrim.bench.local.conductor import RunnerProcess
from vitrim.bench.local.measure import make_plan, measure_interleaved
from vitrim.bench.results.compare import compare
from vitrim.bench.results.statistics import ratio_interval

HERE = Path(__file__).parent
ROUNDS, PER_ROUND = 40, 20


def demo_pair(folder: Path) -> tuple[Path, Path]:
    """The demo's model and a cut of it, with random weights, as .onnx files."""
    import timm
    import torch
    import vitrim
    from vitrim.export.forms import write_network
    from vitrim.export.graphs.known_forms import best_form

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    }
    dense = vitrim.lift(timm.create_model("vit_tiny_patch16_224", **shape).eval())
    cut = vitrim.compact(
        dense, vitrim.StructuredMask.random(dense, keep_ratio={"head": 0.5, "ffn": 0.5})
    ).eval()
    form = best_form("x86-64", 1)[0]
    for name, model in (("dense", dense), ("compact", cut)):
        (folder / f"{name}.onnx").write_bytes(write_network(model, form).SerializeToString())
    return folder / "dense.onnx", folder / "compact.onnx"


def repeat(
    dense: Path, cut: Path, times: int, threads: int, limit_s: float
) -> list[dict[str, Any]]:
    """One row a time: p50s in seconds, the compact model's time over the dense one's (paired
    rounds), rounds, and how busy the machine was.
    """
    rows = []
    for time in range(times):
        found = measure_interleaved(
            {"dense": dense, "compact": cut},
            threads,
            time_limit_s=limit_s,
            half_width=0.005,
            least_rounds=100,
            seed=time,
            quiet=True,
        )
        one, two = found["dense"], found["compact"]
        ratio = compare(one, two).ratio
        rows.append(
            {
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
        )
        told = rows[-1]
        print(
            f"{time + 1:4} {told['dense_p50_s'] * 1e3:10.4f} ms {told['compact_p50_s'] * 1e3:10.4f} ms {told['ratio']:8.4f} "
            f"({told['low']:.4f} to {told['high']:.4f}) {told['rounds']:6} rounds, load {told['load']:.1f}",
            flush=True,
        )
    return rows


def witness(model: Path, threads: int, header: Path, folder: Path) -> dict[str, Any]:
    """The runner's time over the C program's on one file, in turns of random order, with its 95 %
    interval.
    """
    import onnxruntime

    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    program = folder / "runtime_timing"
    subprocess.run(
        ["cc", "-O2", f"-I{header}", str(HERE / "runtime_timing.c"), "-o", str(program), "-ldl"],
        check=True,
    )
    plan, _ = make_plan({"model": model}, threads=threads)
    runner = RunnerProcess("model", plan["jobs"]["model"], 120.0)
    shape = [str(size) for size in runner.ready["input_shape"]]
    command = [str(program), str(library), str(model), str(threads), *shape]
    order, ours, theirs = random.Random(0), [], []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:

        def ask_other() -> list[float]:
            assert other.stdin is not None
            assert other.stdout is not None
            other.stdin.write(f"{PER_ROUND + 2}\n")
            other.stdin.flush()
            return [float(value) for value in other.stdout.readline().split()][2:]

        # The same standing with the scheduler as the runner has.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, other.pid, runner.ready["niceness"])
        runner.request("warm")
        ask_other()
        for _ in range(ROUNDS):
            for name in order.sample(["ours", "theirs"], 2):
                if name == "ours":
                    ours += runner.request("run", count=PER_ROUND)["latency_s"]
                else:
                    theirs += ask_other()
        runner.close()
    turns = [PER_ROUND] * ROUNDS
    interval = ratio_interval(ours, theirs, turns, turns, paired=True, level=0.95)
    return {"ratio": interval.estimate, "low": interval.low, "high": interval.high}


def memory_witness(model: Path, threads: int) -> dict[str, int]:
    """Peak memory as the runner tells it, and as GNU time does of the same process, in bytes."""
    plan, _ = make_plan({"model": model}, threads=threads)
    job = {**plan["jobs"]["model"], "commands": [{"do": "run", "count": 20}, {"do": "memory"}]}
    runner = HERE.parent / "bench" / "runner.py"
    done = subprocess.run(
        ["/usr/bin/time", "-v", sys.executable, str(runner), json.dumps(job)],
        capture_output=True,
        text=True,
        check=True,
    )
    told = next(line for line in done.stderr.splitlines() if "Maximum resident set size" in line)
    return {
        "runner_bytes": json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"],
        "gnu_time_bytes": int(told.split(":")[1]) * 1024,
    }


def main() -> int:
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
        parser.error("two artifacts are wanted, or none")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, cut = options.artifacts or demo_pair(folder)
        print("time  dense p50      compact p50     compact/dense (99 % interval)", flush=True)
        rows = repeat(dense, cut, options.times, options.threads, options.time_limit)
        ratios = [row["ratio"] for row in rows]
        result: dict[str, Any] = {"rows": rows, "variation": max(ratios) / min(ratios) - 1}
        plain = [row["compact_p50_s"] / row["dense_p50_s"] for row in rows]
        result["plain_variation"] = max(plain) / min(plain) - 1
        print(
            f"the ratio varies by {100 * result['variation']:.2f} % (goal: below 3 %); p50 over p50 by {100 * result['plain_variation']:.2f} %"
        )
        if dense.suffix == ".onnx":
            if options.header:
                result["witness"] = witness(dense, options.threads, options.header, folder)
                told = result["witness"]
                print(
                    f"the runner's time over a C program's: {told['ratio']:.4f} ({told['low']:.4f} to {told['high']:.4f}); goal: within 3 %"
                )
            if Path("/usr/bin/time").exists():
                result["memory"] = memory_witness(dense, options.threads)
                memory = result["memory"]
                print(
                    f"peak memory: runner {memory['runner_bytes']}, GNU time {memory['gnu_time_bytes']} bytes; goal: within 2 %"
                )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
