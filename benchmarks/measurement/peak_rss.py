"""The runner's peak memory compared with GNU time's: `python -m benchmarks.measurement.peak_rss`.

Both measure the same process; the goal is a difference of at most 2 %. Models of several sizes are
measured, since a constant error would be hidden in a large one. Writes `results/peak_rss.json`.

    python -m benchmarks.measurement.peak_rss [MODEL.onnx ...] [--threads 1] [--out FILE]

Without models, transformer blocks of three sizes with random weights are written and measured.
Needs /usr/bin/time (Debian: time).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitrim.bench.local import runner
from vitrim.bench.local.measure import make_plan

from ..results_file import RESULTS, save_result
from .block_graph import BlockShape, block_model

GNU_TIME = Path("/usr/bin/time")
GOAL = 0.02
# tokens, heads, width of a head, ffn, embed, copies
SIZES = {
    "small": (50, 4, 32, 512, 128, 4),
    "middle": (197, 6, 64, 1536, 384, 6),
    "large": (197, 12, 64, 3072, 768, 6),
}


def models(folder: Path) -> dict[str, Path]:
    """Write models of three sizes."""
    found = {}
    for name, (tokens, heads, width, ffn, embed, copies) in SIZES.items():
        found[name] = folder / f"{name}.onnx"
        shape = BlockShape(tokens, tokens, heads, width, width, ffn, embed)
        found[name].write_bytes(block_model(shape, copies))
    return found


def peak_memory(model: Path, threads: int) -> dict[str, int]:
    """Peak memory in bytes of one process, by the runner itself and by GNU time."""
    plan, _ = make_plan({"model": model}, threads=threads)
    job = {**plan["jobs"]["model"], "commands": [{"do": "run", "count": 20}, {"do": "memory"}]}
    command = [str(GNU_TIME), "-v", sys.executable, runner.__file__, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reported = next(
        line for line in done.stderr.splitlines() if "Maximum resident set size" in line
    )
    return {
        "runner_bytes": json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"],
        "gnu_time_bytes": int(reported.split(":")[1]) * 1024,
    }


def main() -> int:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "peak_rss")
    options = parser.parse_args()
    if not GNU_TIME.exists():
        sys.stderr.write(f"{GNU_TIME} is missing; install it (Debian: time)\n")
        return 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        given = {path.stem: path for path in options.models}
        for label, path in (given or models(Path(name))).items():
            found = peak_memory(path, options.threads)
            ratio = found["runner_bytes"] / found["gnu_time_bytes"]
            rows.append({"model": label, **found, "ratio": ratio})
            print(
                f"{label:12s} runner {found['runner_bytes'] / 1e6:8.1f} MB  "
                f"GNU time {found['gnu_time_bytes'] / 1e6:8.1f} MB  ratio {ratio:.4f}",
                flush=True,
            )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    reached = "reached" if worst <= GOAL else "not reached"
    print(f"worst {100 * worst:.2f} %, goal within {100 * GOAL:.0f} %: {reached}")
    save_result(options.out, {"rows": rows, "worst": worst, "goal": GOAL})
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
