"""Rows of a coverage command, one a model name, kept in a file; an interrupted command resumes."""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..results_file import earlier_rows, save_result
from . import small_models


@dataclass
class Row:
    """One name: "exact", "refused", "uncovered" or "wrong", and the error of each mask."""

    name: str
    result: str = "exact"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    graphs: int = 0
    moves: int = 0
    seconds: float = 0.0

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)

    def add_error(self, mask: str, error: float) -> None:
        """Record an error; what is no number counts as infinite."""
        error = error if error == error else float("inf")
        self.errors[mask] = max(self.errors.get(mask, 0.0), error)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse what every coverage command accepts beside its own, and prepare its process.

    Returns:
        The arguments, with all names where none is given, and `until` as `coverage_rows` takes it.
    """
    parser.add_argument("names", nargs="*", help="names to examine (default: all)")
    parser.add_argument(
        "--again", action="store_true", help="examine names again that the file has a row of"
    )
    parser.add_argument(
        "--minutes", type=float, help="begin no name after this time; the same command resumes"
    )
    found = parser.parse_args()
    found.names = found.names or small_models.names()
    found.until = None if found.minutes is None else time.monotonic() + 60 * found.minutes
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    return found


def coverage_rows(
    names: Sequence[str],
    examine: Callable[[str], Row],
    out: Path,
    settings: Any,
    *,
    again: bool = False,
    until: float | None = None,
) -> list[Row]:
    """Examine names, print a line for each, and write the file after each.

    Args:
        names: The names.
        examine: Returns the row of a name.
        out: The file. Its rows are kept if they are of the same settings and versions.
        settings: What the rows depend on besides the names.
        again: Whether to examine names again that the file has a row of.
        until: The time (`time.monotonic`, seconds) after which no name begins. None: all do.

    Returns:
        The rows of the names that were examined, now or before.
    """
    head = {"settings": settings, **{name: version(name) for name in ("vitrim", "timm", "torch")}}
    known = {row["name"]: row for row in earlier_rows(out, head)}
    found: list[Row] = []
    for name in names:
        if name in known and not again:
            found.append(Row(**known[name]))
            continue
        if until is not None and time.monotonic() > until:
            break
        start = time.perf_counter()
        row = examine(name)
        row.seconds = time.perf_counter() - start
        known[name] = asdict(row)
        found.append(row)
        save_result(
            out, {"schema": "vitrim.coverage_rows/1", "head": head, "rows": [*known.values()]}
        )
        print(
            f"{name:52s} {row.result:9s} {row.error:.1e} ({row.seconds:.1f} s) {row.reason[:100]}",
            flush=True,
        )
    print(dict(Counter(row.result for row in found)), "of", len(names), "in", out)
    return found
