"""Results of a benchmark: JSON for programs and Markdown for readers, each written atomically."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrim.core.storage import replace_file

RESULTS = Path(__file__).parent / "results"


def save_result(out: Path, result: Any, text: str | None = None) -> None:
    """Write `out` with the suffix .json, and with the suffix .md where there is a text."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    if text is not None:
        replace_file(out.with_suffix(".md"), text)


def publish(out: Path, result: Any, text: str) -> None:
    """Write both files, and print the text."""
    save_result(out, result, text)
    print(text)


def earlier_rows(out: Path, head: Any) -> list[dict[str, Any]]:
    """The rows of an interrupted benchmark; none if its `head` was another one.

    Args:
        out: As of `save_result`.
        head: The settings, which the file has under "head".
    """
    path = out.with_suffix(".json")
    if not path.is_file():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = old["rows"] if old.get("head") == head else []
    return rows


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean and the standard deviation; of one value the value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown_row(*cells: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown_head(*titles: str, numbers: int = 0) -> list[str]:
    """The first two lines of a Markdown table; the last `numbers` columns are aligned right."""
    sides = ["---"] * (len(titles) - numbers) + ["--:"] * numbers
    return [markdown_row(*titles), "|" + "|".join(sides) + "|"]
