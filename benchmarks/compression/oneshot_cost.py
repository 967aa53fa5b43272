"""Time and peak memory of a cut without training, each model in a process of its own.

    python -m benchmarks.compression.oneshot_cost [NAME ...] [--images 256] [--macs 0.7]

The weights are random with a structure: every matrix has singular values that fall as a power of
their rank, and images are smooth, so that curves, ridges and bases are as ill-conditioned as those
of trained networks. Time and memory depend on the shapes alone. Rows of other models and numbers of
images stay in the file. Writes `results/oneshot_cost`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from vitrim import lift
from vitrim.bench.local.environment import read_machine
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.oneshot.trim import TrimOptions, trim

from ..results_file import RESULTS, markdown_head, markdown_row, save_result

NAMES = ("vit_small_patch14_dinov2:224", "vit_small_patch16_224", "vit_base_patch16_224")
DECAY = 0.5
SCHEMA = "vitrim.oneshot-cost/1"
TITLE = """# Time and memory of a cut without training

`python -m benchmarks.compression.oneshot_cost NAME --images NUMBER`: random weights with a
structure, processor seconds of one thread beside other work on the machine. Statistics and fits
take time in proportion to the images, choices and solves do not, so n times the images take less
than n times the seconds.

"""


def structured(model: nn.Module) -> None:
    """Give every matrix singular values that fall as rank ** -DECAY, of the same norm."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 2 or min(parameter.shape) < 8:
                continue
            rank = torch.arange(1, min(parameter.shape) + 1) ** -DECAY
            u, s, vh = torch.linalg.svd(torch.randn_like(parameter), full_matrices=False)
            shaped = u * (rank * s.norm() / rank.norm()) @ vh
            parameter.copy_(shaped / parameter.shape[1] ** 0.5)


def smooth_images(count: int, size: tuple[int, int, int]) -> Tensor:
    """Smooth random images: (count, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(count, size[0], 14, 14, generator=generator)
    return nn.functional.interpolate(small, size=size[1:], mode="bilinear")


def measure(name: str, images: int, macs: float, threads: int) -> dict[str, Any]:
    """Cut one model in this process and return the row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    timm_name, _, size = name.partition(":")
    overrides: dict[str, Any] = {"img_size": int(size)} if size else {}
    model = timm.create_model(timm_name, **overrides).eval()
    structured(model)
    source = lift(model)
    del model
    calibration = smooth_images(images, source.architecture.image)
    stages: dict[str, float] = {}
    before, started = time.process_time(), time.perf_counter()
    last = started

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now
        print(f"{name} {stage} {done}/{total}", file=sys.stderr, flush=True)

    found = trim(source, calibration, macs=macs, options=TrimOptions(), progress=progress)
    return {
        "model": name,
        "tokens": source.architecture.tokens,
        "params": count_params(source.architecture),
        "macs": count_macs(source.architecture),
        "images": images,
        "threads": threads,
        "cpu_s": time.process_time() - before,
        "wall_s": time.perf_counter() - started,
        "stages_wall_s": stages,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cost_share": found.cost,
        "predicted_error": found.predicted_error,
        "measured_error": found.check.error,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = markdown_head(
        *("model", "tokens", "M params", "images", "threads"),
        *("CPU s", "wall s", "peak GB", "MACs kept"),
        numbers=8,
    )
    for row in rows:
        lines.append(
            markdown_row(
                row["model"],
                row["tokens"],
                f"{row['params'] / 1e6:.1f}",
                row["images"],
                row["threads"],
                f"{row['cpu_s']:.0f}",
                f"{row['wall_s']:.0f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['cost_share']:.3f}",
            )
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every model, print the table and write both files after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NAMES), help="timm names, NAME:SIZE")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "oneshot_cost.json")
    parser.add_argument("--one", action="store_true", help="one model, in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        row = measure(options.names[0], options.images, options.macs, options.threads)
        print(json.dumps(row))
        return
    rows = _kept_rows(options.out)
    for name in options.names:
        command = [sys.executable, "-m", "benchmarks.compression.oneshot_cost", name, "--one"]
        for option in ("images", "macs", "threads"):
            command += [f"--{option}", str(getattr(options, option))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows = [each for each in rows if _key(each) != _key(row)] + [row]
        rows.sort(key=lambda each: (each["params"], each["tokens"], each["images"]))
        result = {"schema": SCHEMA, "machine": read_machine(), "rows": rows}
        save_result(options.out, result, TITLE + table(rows))
    print(table(rows))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["images"], row["threads"]


def _kept_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


if __name__ == "__main__":
    main()
