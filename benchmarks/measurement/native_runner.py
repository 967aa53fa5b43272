"""Is the C++ example as fast as the Python runner? `python -m benchmarks.measurement.native_runner`.

Both time the same artifact in turns of random order, each in a process of its own at the same
priority, one thread: the example of `vitrim export --bundle` as its CMake builds it, and
bench/local/runner.py. Told: both medians, their ratio with its 95 % interval (goal: the example is
not slower by 3 % or more), the spread of each, and what the example itself reports of bytes on disk
and in memory.

    python -m benchmarks.measurement.native_runner [ARTIFACT...] [--rounds 40] [--threads 1] [--header FOLDER]
    [--json FILE]

Without paths, the demo's shapes and DeiT-T with random weights are exported in fp32 and int8.
FOLDER holds onnxruntime_c_api.h; without it the places where Debian's libonnxruntime-dev puts it
are looked through.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vitrim.bench.local import environment
from vitrim.bench.local.conductor import RunnerProcess
from vitrim.bench.local.measure import make_plan
from vitrim.bench.results.statistics import ratio_interval, summarise
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.bundle import bundle

RESULTS = Path(__file__).parent / "results"
GOAL = 0.03
HEADER = "onnxruntime_c_api.h"
HEADER_PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
TURN_S = 0.15
SHAPES: dict[str, dict[str, Any]] = {
    "demo": {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    },
    "deit-t": {},
}


def samples(folder: Path) -> Iterator[Artifact]:
    """The demo's shapes and DeiT-T with random weights, fp32 and int8."""
    import timm
    import torch
    import vitrim
    from vitrim.export.exporter import export

    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model = vitrim.lift(timm.create_model("vit_tiny_patch16_224", **shape).eval())
        channels, height, width = model.architecture.image
        prepared = {
            "channels": channels,
            "height": height,
            "width": width,
            "mean": [0.5] * channels,
            "std": [0.5] * channels,
        }
        for precision in ("fp32", "int8"):
            yield export(
                model,
                folder / f"{name}-{precision}",
                precision=precision,
                preprocessing=prepared,
                name=f"{name} {precision}",
            )


def built(artifact: Artifact, header: Path, folder: Path) -> Path:
    """The example of an artifact's bundle, built as its README says."""
    place = bundle(artifact, folder)
    for command in (
        ["cmake", "-S", ".", "-B", "build", f"-DONNXRUNTIME_INCLUDE={header}"],
        ["cmake", "--build", "build"],
    ):
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InputError(
                f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.stdout[-300:]}"
            )
    return place / "build" / "vitrim_example"


def hold(
    artifact: Artifact, header: Path, folder: Path, *, rounds: int, threads: int
) -> dict[str, Any]:
    """One row: the example against the runner, in turns."""
    import onnxruntime

    program = built(artifact, header, folder / "bundle")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    prepared = artifact.manifest.preprocessing
    assert prepared is not None
    picture = folder / "picture.ppm"
    pixels = np.random.default_rng(0).integers(
        0, 256, prepared.height * prepared.width * prepared.channels, dtype=np.uint8
    )
    kind = b"P5" if prepared.channels == 1 else b"P6"
    picture.write_bytes(
        kind + f"\n{prepared.width} {prepared.height}\n255\n".encode() + pixels.tobytes()
    )
    command = [str(program), str(library), str(folder / "bundle" / "model"), str(picture)]
    told = subprocess.run(
        [*command, "--report"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    report = {
        name: int(value) for name, value in (line.split() for line in told if "_bytes" in line)
    }

    plan, _ = make_plan({"runner": artifact.folder}, threads=threads)
    runner = RunnerProcess("runner", plan["jobs"]["runner"], 300.0)
    order, ours, theirs = random.Random(0), [], []
    with subprocess.Popen(
        [*command, "--listen"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as example:

        def ask_example(count: int) -> list[float]:
            assert example.stdin is not None
            assert example.stdout is not None
            example.stdin.write(f"{count}\n")
            example.stdin.flush()
            while not (line := example.stdout.readline().split()) or "%" in line:
                # The five best labels come first.
                pass
            return [float(value) for value in line]

        # The same standing with the scheduler as the runner has.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, example.pid, runner.ready["niceness"])
        p50_s = runner.request("warm")["p50_s"]
        count = max(5, min(200, math.ceil(TURN_S / p50_s)))
        ask_example(count)
        for _ in range(rounds):
            for name in order.sample(["runner", "example"], 2):
                if name == "runner":
                    ours += runner.request("run", count=count, settle=2)["latency_s"]
                else:
                    theirs += ask_example(count + 2)[2:]
        memory = runner.request("memory")
        runner.close()
        assert example.stdin is not None
        example.stdin.close()
    turns = [count] * rounds
    interval = ratio_interval(theirs, ours, turns, turns, paired=True, level=0.95)
    first, second = summarise(ours), summarise(theirs)
    return {
        "artifact": artifact.manifest.name,
        "threads": threads,
        "runner_p50_s": first.p50_s,
        "example_p50_s": second.p50_s,
        "runner_spread": first.spread,
        "example_spread": second.spread,
        "ratio": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "rounds": rounds,
        "samples_per_turn": count,
        "runner_peak_rss_bytes": memory["peak_rss_bytes"],
        **report,
    }


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# The C++ example beside the Python runner",
        "",
        f"`python -m benchmarks.measurement.native_runner`, {machine['cpu_model']}, ONNX Runtime {machine['libraries'].get('onnxruntime')}, interleaved, medians.",
        "A ratio below 1 says that the example is faster. Memory is the highest of the whole process; the runner's holds a Python with numpy.",
        "",
        "| artifact | threads | runner p50 | example p50 | example / runner (95 %) | spread, runner / example "
        "| example's bytes | runtime | model | peak RSS, example / runner |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['artifact']} | {row['threads']} | {row['runner_p50_s'] * 1e3:.3f} ms | {row['example_p50_s'] * 1e3:.3f} ms "
            f"| {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {100 * row['runner_spread']:.1f} / {100 * row['example_spread']:.1f} % "
            f"| {row['program_bytes'] / 1e3:.0f} kB | {row['runtime_bytes'] / 1e6:.1f} MB | {row['model_bytes'] / 1e6:.2f} MB "
            f"| {row['peak_rss_bytes'] / 1e6:.1f} / {row['runner_peak_rss_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines) + "\n"


def header_folder(named: Path | None) -> Path:
    """Errors: InputError where the header is nowhere."""
    places = (
        [named]
        if named
        else [Path(os.environ["ONNXRUNTIME_INCLUDE"])]
        if "ONNXRUNTIME_INCLUDE" in os.environ
        else map(Path, HEADER_PLACES)
    )
    for place in places:
        if found := sorted(place.rglob(HEADER)):
            return found[0].parent
    raise InputError(
        f"{HEADER} is not here; install libonnxruntime-dev, or name its folder with --header"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "artifacts", nargs="*", type=Path, help="artifact folders with preprocessing, batch 1"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        choices=(1,),
        help="the example opens its model with one thread",
    )
    parser.add_argument("--header", type=Path, help="the folder of onnxruntime_c_api.h")
    parser.add_argument("--json", type=Path, default=RESULTS / "native_runner.json")
    options = parser.parse_args()
    try:
        header = header_folder(options.header)
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for number, artifact in enumerate(
                map(Artifact.load, options.artifacts) if options.artifacts else samples(folder)
            ):
                (folder / str(number)).mkdir()
                rows.append(
                    hold(
                        artifact,
                        header,
                        folder / str(number),
                        rounds=options.rounds,
                        threads=options.threads,
                    )
                )
                row = rows[-1]
                print(
                    f"{row['artifact']:14} runner {row['runner_p50_s'] * 1e3:8.3f} ms, example {row['example_p50_s'] * 1e3:8.3f} ms, "
                    f"ratio {row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f})",
                    flush=True,
                )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    slow = [row["artifact"] for row in rows if row["ratio"] >= 1 + GOAL]
    print(f"slower by {100 * GOAL:.0f} % or more: {', '.join(slow) or 'none'}")
    machine = environment.read_machine()
    text = table(rows, machine)
    options.json.write_text(
        json.dumps({"machine": machine, "goal": GOAL, "rows": rows}, indent=1) + "\n"
    )
    options.json.with_suffix(".md").write_text(text)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
