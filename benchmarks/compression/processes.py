"""Mask learning in two processes against one: `python -m benchmarks.compression.processes`.

    python -m benchmarks.compression.processes [--repeats 3] [--epochs 2]

The quickstart's images and model, equal batches of 64, at a fixed number of epochs of mask learning
for 30 % of the parameters: one process with one thread, one with two, and two with one thread each,
in turns. Images per second are those of the whole epochs, by the history of the run; the learned
masks are compared unit by unit with those of one process with one thread. Writes
`results/processes.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from vitrim.bench.local.environment import read_machine, read_state

from ..results_file import RESULTS, markdown_head, markdown_row, publish, spread

# Processes, and threads of each.
CASES = ((1, 1), (1, 2), (2, 1))
SETTINGS = (
    *('masks.method="learned"', "masks.params=0.3", "masks.lr=1e-3", 'masks.augmentation="none"'),
    *("masks.attention_overhead_macs=0", "masks.ffn_overhead_macs=0", "finetune.epochs=0"),
    *("train.batch_size=64", "distill.enabled=false"),
)


def learn(processes: int, threads: int, epochs: int) -> dict[str, Any]:
    """Learn masks once.

    Args:
        processes: They share each batch.
        threads: Of each process.
        epochs: Of mask learning.

    Returns:
        The images per second of each epoch, and what the mask keeps.

    Raises:
        RuntimeError: The training failed; the message contains its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-processes-") as name:
        folder = Path(name, "run")
        command = [sys.executable, "-m", "vitrim", "compress", "quickstart", "--quiet"]
        command += ["--processes", str(processes), "--out", str(folder)]
        for item in (*SETTINGS, f"train.threads={threads}", f"masks.epochs={epochs}"):
            command += ["--set", item]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{found.stderr[-800:]}")
        lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        mask = load_file(folder / "mask.safetensors")
    kept = {key: (values != 0).ravel().tolist() for key, values in mask.items()}
    records = [json.loads(line) for line in lines]
    speeds = [each["images_per_s"] for each in records if each["phase"] == "masks"]
    return {"processes": processes, "threads": threads, "images_per_s": speeds, "kept": kept}


def differing(first: dict[str, list[bool]], second: dict[str, list[bool]]) -> int:
    """The number of heads, widths and channels that only one of two masks keeps."""
    return sum(sum(a != b for a, b in zip(first[key], second[key], strict=True)) for key in first)


def table(rows: Sequence[dict[str, Any]], epochs: int, units: int) -> str:
    """Images per second, mean and deviation, and relative to one process with one thread."""
    lines = markdown_head(
        *("processes", "threads of each"),
        *(f"epoch {number + 1}: images/s" for number in range(epochs)),
        *("relative", f"kept differently, of {units} units"),
        numbers=2 + epochs,
    )
    base = None
    for processes, threads in CASES:
        found = [row for row in rows if (row["processes"], row["threads"]) == (processes, threads)]
        speeds = [[row["images_per_s"][number] for row in found] for number in range(epochs)]
        whole = statistics.median(statistics.harmonic_mean(row["images_per_s"]) for row in found)
        base = whole if base is None else base
        apart = max(row["kept_differently"] for row in found)
        cells = [spread(values, 0) for values in speeds]
        lines.append(markdown_row(processes, threads, *cells, f"{whole / base:.2f}", apart))
    return "\n".join(lines)


def main() -> None:
    """Run all cases in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    cpu, busy = read_machine()["cpu_model"], read_state(1.0).get("busy_cores") or 0.0
    rows = [learn(*case, options.epochs) for _ in range(options.repeats) for case in CASES]
    masks = [row.pop("kept") for row in rows]
    for row, mask in zip(rows, masks, strict=True):
        row["kept_differently"] = differing(masks[0], mask)
    units = sum(map(len, masks[0].values()))
    note = f"on {cpu}, {os.cpu_count()} cores, of which other work kept {busy:.1f} busy"
    command = "python -m benchmarks.compression.processes"
    text = f"`{command}` {note} at the start.\n\n{table(rows, options.epochs, units)}\n"
    result = {"command": command, "cpu": cpu, "busy_cores": busy, "rows": rows}
    publish(RESULTS / "processes", result, text)


if __name__ == "__main__":
    main()
