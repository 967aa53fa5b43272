"""The C++ example compared with the Python runner.

`python -m benchmarks.measurement.native_runner` times the same artifact by both in turns of random
order, each in a process of its own at the same priority, on one thread: the example of `vitrim
export --bundle` as its CMake builds it, and bench/local/runner.py. It reports both medians, their
ratio with its 95 % interval (goal: the example is at most 3 % slower), the spread of each, and the
example's own report of bytes on disk and in memory.

    python -m benchmarks.measurement.native_runner [ARTIFACT...] [--rounds 40] [--header FOLDER]
        [--json FILE]

Without paths, the demo's shapes and DeiT-T with random weights are exported in fp32 and int8.
FOLDER contains onnxruntime_c_api.h; by default the folders of Debian's libonnxruntime-dev are
searched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vitrim.bench.local.environment import read_machine
from vitrim.bench.results.statistics import summarise
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.bundle import bundle
from vitrim.export.exporter import export

from ..models import lifted
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from .other_program import compare_with_runner, runtime_library

GOAL = 0.03
HEADER = "onnxruntime_c_api.h"
HEADER_PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
TURN_S = 0.15
# The example opens its model with one thread.
THREADS = 1
MODELS = {"demo": "demo", "deit-t": "vit_tiny_patch16_224"}


def samples(folder: Path) -> Iterator[Artifact]:
    """Export the demo's shapes and DeiT-T with random weights, in fp32 and int8."""
    torch.set_num_threads(1)
    for name, source in MODELS.items():
        model = lifted(source)
        channels, height, width = model.architecture.image
        preprocessing = {
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
                preprocessing=preprocessing,
                name=f"{name} {precision}",
            )


def built(artifact: Artifact, header: Path, folder: Path) -> Path:
    """Build the example of an artifact's bundle as its README describes."""
    place = bundle(artifact, folder)
    for command in (
        ["cmake", "-S", ".", "-B", "build", f"-DONNXRUNTIME_INCLUDE={header}"],
        ["cmake", "--build", "build"],
    ):
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout[-300:]).splitlines()[-1]
            raise InputError(f"{' '.join(command)}: {reason}")
    return place / "build" / "vitrim_example"


def write_picture(artifact: Artifact, path: Path) -> None:
    """A picture of noise (PGM or PPM) of the size that the artifact takes."""
    prepared = artifact.manifest.preprocessing
    assert prepared is not None
    count = prepared.height * prepared.width * prepared.channels
    pixels = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)
    kind = "P5" if prepared.channels == 1 else "P6"
    header = f"{kind}\n{prepared.width} {prepared.height}\n255\n"
    path.write_bytes(header.encode() + pixels.tobytes())


def compare(artifact: Artifact, header: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Time the example and the runner in turns.

    Args:
        artifact: What to time.
        header: Folder of onnxruntime_c_api.h.
        folder: Where the example is built.
        rounds: Turns of each.

    Returns:
        One row of the table.
    """
    program = built(artifact, header, folder / "bundle")
    picture = folder / "picture.ppm"
    write_picture(artifact, picture)
    model = folder / "bundle" / "model"
    command = [str(part) for part in (program, runtime_library(), model, picture)]
    done = subprocess.run([*command, "--report"], capture_output=True, text=True, check=True)
    lines = (line.split() for line in done.stdout.splitlines() if "_bytes" in line)
    report = {name: int(value) for name, value in lines}
    compared = compare_with_runner(
        artifact.folder, [*command, "--listen"], threads=THREADS, rounds=rounds, turn_s=TURN_S
    )
    ratio = compared.program_over_runner()
    runner, example = summarise(compared.runner_s), summarise(compared.program_s)
    return {
        "artifact": artifact.manifest.name,
        "threads": THREADS,
        "runner_p50_s": runner.p50_s,
        "example_p50_s": example.p50_s,
        "runner_spread": runner.spread,
        "example_spread": example.spread,
        "ratio": ratio.estimate,
        "low": ratio.low,
        "high": ratio.high,
        "rounds": rounds,
        "samples_per_turn": compared.samples_per_turn,
        "runner_peak_rss_bytes": compared.peak_rss_bytes,
        **report,
    }


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# The C++ example compared with the Python runner",
        "",
        f"`python -m benchmarks.measurement.native_runner`, {machine['cpu_model']}, "
        f"ONNX Runtime {machine['libraries'].get('onnxruntime')}, interleaved, medians.",
        "Below a ratio of 1 the example is faster. Memory is the peak of the whole process; the "
        "runner's includes Python and numpy.",
        "",
        *markdown_head(
            *("artifact", "threads", "runner p50", "example p50", "example / runner (95 %)"),
            *("spread, runner / example", "example's bytes", "runtime", "model"),
            "peak RSS, example / runner",
        ),
    ]
    for row in rows:
        peaks = (row["peak_rss_bytes"], row["runner_peak_rss_bytes"])
        lines.append(
            markdown_row(
                row["artifact"],
                row["threads"],
                f"{row['runner_p50_s'] * 1e3:.3f} ms",
                f"{row['example_p50_s'] * 1e3:.3f} ms",
                f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
                f"{100 * row['runner_spread']:.1f} / {100 * row['example_spread']:.1f} %",
                f"{row['program_bytes'] / 1e3:.0f} kB",
                f"{row['runtime_bytes'] / 1e6:.1f} MB",
                f"{row['model_bytes'] / 1e6:.2f} MB",
                f"{peaks[0] / 1e6:.1f} / {peaks[1] / 1e6:.1f} MB",
            )
        )
    return "\n".join(lines) + "\n"


def header_folder(named: Path | None) -> Path:
    """The folder of the header.

    Raises:
        InputError: No folder contains it.
    """
    if named:
        places = [named]
    elif "ONNXRUNTIME_INCLUDE" in os.environ:
        places = [Path(os.environ["ONNXRUNTIME_INCLUDE"])]
    else:
        places = list(map(Path, HEADER_PLACES))
    for place in places:
        if found := sorted(place.rglob(HEADER)):
            return found[0].parent
    raise InputError(
        f"{HEADER} is missing; install libonnxruntime-dev, or name its folder with --header"
    )


def main() -> int:
    """Compare, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "artifacts", nargs="*", type=Path, help="artifact folders with preprocessing, batch 1"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--header", type=Path, help="the folder of onnxruntime_c_api.h")
    parser.add_argument("--json", type=Path, default=RESULTS / "native_runner.json")
    options = parser.parse_args()
    rows = []
    try:
        header = header_folder(options.header)
        with tempfile.TemporaryDirectory() as name:
            given = map(Artifact.load, options.artifacts)
            for number, artifact in enumerate(given if options.artifacts else samples(Path(name))):
                folder = Path(name) / str(number)
                folder.mkdir()
                row = compare(artifact, header, folder, options.rounds)
                rows.append(row)
                print(
                    f"{row['artifact']:14} runner {row['runner_p50_s'] * 1e3:8.3f} ms, "
                    f"example {row['example_p50_s'] * 1e3:8.3f} ms, "
                    f"ratio {row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f})",
                    flush=True,
                )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    slow = [row["artifact"] for row in rows if row["ratio"] >= 1 + GOAL]
    print(f"slower by {100 * GOAL:.0f} % or more: {', '.join(slow) or 'none'}")
    machine = read_machine()
    result = {"machine": machine, "goal": GOAL, "rows": rows}
    save_result(options.json, result, table(rows, machine))
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
