"""Outputs of ARM targets compared with this machine's.

    python -m benchmarks.accuracy.aarch64_parity [--targets rpi4 rpi5] [--images 8] [--json FILE]

The demo's shapes with random weights are exported for every aarch64 target in every precision, and
each file runs on the target's own processor under qemu-aarch64 (`vitrim targets emulate`). Reported
are the largest error against torch there and here, relative to the largest logit, the difference of
the two, and on how many images the top class is torch's.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.export import capabilities
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export
from vitrim.targets.catalog import list_targets, load_target
from vitrim.targets.emulation import ready

from ..models import lifted, noise
from ..results_file import RESULTS, markdown_head, markdown_row, save_result

PRECISIONS = ("fp32", "fp16", "int8", "int8-static", "int8-weights")
# As the note of an emulated target states it.
DIFFERENCE = re.compile(r"(\d\.\de[+-]\d+) of the largest")
HEAD = markdown_head(
    *("target", "emulated processor", "precision", "error there", "error here"),
    *("there from here", "torch's answer"),
)


def rows(targets: list[str], count: int, folder: Path) -> list[dict[str, Any]]:
    """Export for every target in every precision, and print each row once it is measured."""
    torch.set_num_threads(1)
    model = lifted("demo")
    found = []
    for target in targets:
        for precision in PRECISIONS:
            if precision == "fp16" and not capabilities.has_half(target):
                continue
            row: dict[str, Any] = {"target": target, "precision": precision}
            try:
                row |= errors(_export(model, folder / f"{target}-{precision}", row, count))
            except InputError as error:
                row["refused"] = str(error)
            found.append(row)
            print(line(row), flush=True)
    return found


def _export(model: CompactModel, folder: Path, row: dict[str, Any], count: int) -> Artifact:
    return export(
        model,
        folder,
        target=row["target"],
        precision=row["precision"],
        images=noise(model, count),
    )


def errors(artifact: Artifact) -> dict[str, Any]:
    """The errors that the manifest states."""
    *_, here, there = artifact.manifest.parity
    differences = (DIFFERENCE.search(note) for note in artifact.manifest.notes)
    return {
        "processor": there.stage.partition("(")[2].rstrip(")"),
        "error_there": there.max_relative_error,
        "error_here": here.max_relative_error,
        "apart": next(float(match[1]) for match in differences if match),
        "top1_agreement": there.top1_agreement,
        "images": there.images,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    if "refused" in row:
        return markdown_row(
            row["target"], "", row["precision"], f"refused: {row['refused']}", *"   "
        )
    return markdown_row(
        row["target"],
        row["processor"],
        row["precision"],
        f"{row['error_there']:.1e}",
        f"{row['error_here']:.1e}",
        f"{row['apart']:.1e}",
        f"{100 * row['top1_agreement']:.0f} % of {row['images']}",
    )


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", help="default: all aarch64 targets")
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
    print(*HEAD, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        found = rows(targets, options.images, Path(name))
    versions = ", ".join(f"{key} {value}" for key, value in emulator.versions.items())
    text = [
        "# Outputs of ARM targets, emulated",
        "",
        f"`python -m benchmarks.accuracy.aarch64_parity`; {versions}; the demo's shapes, random "
        "weights.",
        "Errors are relative to the largest logit, against torch in fp32.",
        "",
        *HEAD,
        *map(line, found),
    ]
    result = {"versions": emulator.versions, "rows": found}
    save_result(options.json, result, "\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
