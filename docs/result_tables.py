"""Tables of `benchmarks.md` from the result files of the benchmarks, figures unchanged."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .markdown import table


def result_table(path: Path) -> str:
    """A result file as Markdown: a `.md` file with lower headings, or a known JSON file."""
    if path.suffix == ".md":
        return _lowered(path.read_text(encoding="utf-8"))
    return RENDERERS[path.name](json.loads(path.read_text(encoding="utf-8")))


def _lowered(text: str) -> str:
    lines = text.strip().splitlines()
    if lines[0].startswith("# "):
        # The page has a heading of its own there.
        lines = lines[1:]
    return "\n".join(re.sub(r"^(#+) ", r"##\1 ", line) for line in lines)


def _compaction_cost(data: Any) -> str:
    rows = [
        (
            f"`{row['model']}`",
            row["tool"],
            f"{row['cpu_s']:.3f}",
            f"{row['wall_s']:.3f}",
            f"{row['model_bytes'] / 1e6:.0f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['peak_of_model']:.2f}",
            f"{row['parameters']:,}",
        )
        for row in sorted(data["rows"], key=lambda row: (row["model_bytes"], row["tool"]))
    ]
    header = (
        "model", "tool", "processor time (s)", "wall time (s)", "model (MB)",
        "peak memory (MB)", "peak / model", "parameters left",
    )  # fmt: skip
    return f"Machine: {data['machine']}.\n\n{table(header, rows)}"


def _peak_rss(data: Any) -> str:
    rows = [
        (
            row["model"],
            f"{row['runner_bytes']:,}",
            f"{row['gnu_time_bytes']:,}",
            f"{row['ratio']:.5f}",
        )
        for row in data["rows"]
    ]
    worst = f"Largest deviation {100 * data['worst']:.2f} %, goal {100 * data['goal']:.0f} %."
    header = ("model", "runner (bytes)", "GNU time (bytes)", "runner / GNU time")
    return f"{table(header, rows)}\n\n{worst}"


def _agreement(data: Any) -> str:
    pairs = zip(data["runner_p50_s"], data["benchmark_app_p50_s"], strict=True)
    rows = [
        (str(number), f"{1e3 * own:.2f}", f"{1e3 * other:.2f}", f"{own / other:.3f}")
        for number, (own, other) in enumerate(pairs, 1)
    ]
    ratio = (
        f"Median ratio {data['ratio']:.3f} (extremes {data['low']:.3f} to {data['high']:.3f}); "
        f"{data['artifact']}, {data['threads']} thread, {data['turns']} turns a pair."
    )
    header = ("pair", "vitrim's runner p50 (ms)", "benchmark_app p50 (ms)", "ratio")
    machine = data["machine"]
    where = f"Machine: {machine['cpu_model']}, {machine['os']}."
    return f"{where}\n\n{table(header, rows)}\n\n{ratio}"


def _coverage(data: Any) -> str:
    rows = data["rows"]
    worst = max(row["compact_error"] or 0.0 for row in rows)
    counts = Counter(("vitrim", row["vitrim"]) for row in rows)
    counts.update(("Torch-Pruning", row["peer"]) for row in rows)
    text = table(
        ("tool", "outcome", "model names"),
        [(tool, outcome, str(count)) for (tool, outcome), count in sorted(counts.items())],
    )
    return f"{text}\n\nLargest relative error of vitrim, masked against compact: {worst:.1e}."


RENDERERS = {
    "compaction_cost.json": _compaction_cost,
    "peak_rss.json": _peak_rss,
    "agreement.json": _agreement,
    "coverage.json": _coverage,
}
