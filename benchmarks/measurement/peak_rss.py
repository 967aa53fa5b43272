"""Peak memory as the runner tells it beside GNU time's of the very same process: `python -m
benchmarks.measurement.peak_rss`.

The goal is within 2 %. Several sizes of model are asked, since a fixed error would hide in a large
one. Writes benchmarks/results/peak_rss.json.

    python -m benchmarks.measurement.peak_rss [MODEL.onnx ...] [--threads 1] [--out FOLDER]

Without models, blocks of transformers of three sizes with random weights are written and measured.
Needs /usr/bin/time (Debian: time).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from vitrim.bench.local.block_graph import BlockShape, block_model
from vitrim.core.storage import replace_file

from benchmarks.measurement.repeatability import memory_witness

GOAL = 0.02
# tokens, heads, width of a head, ffn, embed, copies
SIZES = {
    "small": (50, 4, 32, 512, 128, 4),
    "middle": (197, 6, 64, 1536, 384, 6),
    "large": (197, 12, 64, 3072, 768, 6),
}


def models(folder: Path) -> dict[str, Path]:
    """Three sizes, written."""
    found = {}
    for name, (tokens, heads, width, ffn, embed, copies) in SIZES.items():
        found[name] = folder / f"{name}.onnx"
        found[name].write_bytes(
            block_model(BlockShape(tokens, tokens, heads, width, width, ffn, embed), copies)
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not Path("/usr/bin/time").exists():
        sys.stderr.write(
            "there is no /usr/bin/time here to compare with; install it (Debian: time)\n"
        )
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for label, path in (
            {path.stem: path for path in options.models} or models(Path(name))
        ).items():
            told = memory_witness(path, options.threads)
            ratio = told["runner_bytes"] / told["gnu_time_bytes"]
            rows.append({"model": label, **told, "ratio": ratio})
            print(
                f"{label:12s} runner {told['runner_bytes'] / 1e6:8.1f} MB  GNU time {told['gnu_time_bytes'] / 1e6:8.1f} MB  ratio {ratio:.4f}",
                flush=True,
            )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(
        f"worst {100 * worst:.2f} %, goal within {100 * GOAL:.0f} %: {'reached' if worst <= GOAL else 'not reached'}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    replace_file(
        options.out / "peak_rss.json",
        json.dumps({"rows": rows, "worst": worst, "goal": GOAL}, indent=1) + "\n",
    )
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
