"""Do ARM targets answer as this machine does? `python -m benchmarks.accuracy.aarch64_parity`.

The demo's shapes with random weights are exported for every aarch64 target in every precision, and
each file is asked on the target's own processor under qemu-aarch64 (`vitrim targets emulate`).
Told: the largest error against torch there and here, relative to the largest logit, how far the two
are apart, and on how many images the answer is torch's.

    python -m benchmarks.accuracy.aarch64_parity [--targets rpi4 rpi5] [--images 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from vitrim.bench.emulation import ready
from vitrim.core.errors import InputError
from vitrim.export import capabilities
from vitrim.export.exporter import export
from vitrim.targets.catalog import list_targets, load_target

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("fp32", "fp16", "int8", "int8-static", "int8-weights")
SHAPE: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}


def rows(targets: list[str], count: int, folder: Path) -> list[dict[str, Any]]:
    """One row a target and precision, told as it is known."""
    import timm
    import torch
    import vitrim

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = vitrim.lift(timm.create_model("vit_tiny_patch16_224", **SHAPE).eval())
    images = np.random.default_rng(0).standard_normal(
        (count, *model.architecture.image), dtype=np.float32
    )
    found = []
    for target in targets:
        for precision in PRECISIONS:
            if precision == "fp16" and not capabilities.has_half(target):
                continue
            row: dict[str, Any] = {"target": target, "precision": precision}
            try:
                artifact = export(
                    model,
                    folder / f"{target}-{precision}",
                    target=target,
                    precision=precision,
                    images=images,
                )  # type: ignore[arg-type]
            except InputError as error:
                row["refused"] = str(error)
            else:
                *_, here, there = artifact.manifest.parity
                note = next(note for note in artifact.manifest.notes if "its answers are" in note)
                row |= {
                    "processor": there.stage.partition("(")[2].rstrip(")"),
                    "error_there": there.max_relative_error,
                    "error_here": here.max_relative_error,
                    "apart": float(note.split("its answers are ")[1].split()[0]),
                    "top1_agreement": there.top1_agreement,
                    "images": there.images,
                }
            found.append(row)
            print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    if "refused" in row:
        return f"| {row['target']} | | {row['precision']} | refused: {row['refused']} | | | |"
    return (
        f"| {row['target']} | {row['processor']} | {row['precision']} | {row['error_there']:.1e} | {row['error_here']:.1e} | {row['apart']:.1e} "
        f"| {100 * row['top1_agreement']:.0f} % of {row['images']} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", help="all aarch64 targets by default")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS / "aarch64_parity.json")
    options = parser.parse_args()
    emulator = ready()
    if emulator is None:
        print("aarch64 emulation is not prepared: vitrim targets emulate", file=sys.stderr)
        return 2
    targets = options.targets or [
        name for name in list_targets() if load_target(name).architecture == "aarch64"
    ]
    head = "| target | emulated processor | precision | error there | error here | there from here | torch's answer |"
    print(head, "|---|---|---|---|---|---|---|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        found = rows(targets, options.images, Path(name))
    versions = ", ".join(f"{key} {value}" for key, value in emulator.versions.items())
    text = f"# Answers of ARM targets, emulated\n\n`python -m benchmarks.accuracy.aarch64_parity`; {versions}; the demo's shapes, random weights.\n"
    text += "Errors are relative to the largest logit, against torch in fp32.\n\n"
    text += "\n".join([head, "|---|---|---|---|---|---|---|", *map(line, found)]) + "\n"
    options.json.write_text(
        json.dumps({"versions": emulator.versions, "rows": found}, indent=1) + "\n"
    )
    options.json.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
