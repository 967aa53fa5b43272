"""The rows of a study as CSV, JSON and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ...core import strict_json
from ...core.written_kinds import FileKind
from .condition import require_column
from .summary import Summary, grouped, number
from .table import Column, Row


def rows_kind(format_: str, summary: Summary) -> FileKind:
    """The kind of files that have rows of a study, or their means, so that no other is replaced.

    Args:
        format_: csv, json or parquet.
        summary: The study.

    Returns:
        The kind; a file is of it if all its columns are such of the study.
    """
    names = {column.name for column in summary.columns}
    known = {*names, *(f"{name}_std" for name in names), "runs"}
    reader = _READERS[format_]

    def matches(path: Path) -> bool:
        try:
            return reader(path) <= known
        except (ValueError, AttributeError, csv.Error):
            return False

    return FileKind(f"rows of this study as {format_}", matches)


def _csv_columns(path: Path) -> set[str]:
    with path.open(encoding="utf-8", newline="") as stream:
        first = stream.readline()
    # An empty file has no columns; an empty line names one of no study.
    return set(next(csv.reader([first])) or [""]) if first else set()


def _json_columns(path: Path) -> set[str]:
    rows = strict_json.parse(path.read_bytes())
    if not isinstance(rows, list):
        raise ValueError("not a list of rows")
    return set().union(*(row.keys() for row in rows))


def _parquet_columns(path: Path) -> set[str]:
    import pyarrow.parquet

    # Its errors are ValueErrors.
    return set(pyarrow.parquet.read_schema(path).names)


_READERS: dict[str, Callable[[Path], set[str]]] = {
    "csv": _csv_columns,
    "json": _json_columns,
    "parquet": _parquet_columns,
}


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """CSV with full precision; values that do not exist are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row[name] is None else row[name] for name in columns])
    return text.getvalue()


def as_json(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A JSON array of objects."""
    return json.dumps([{name: row[name] for name in columns} for row in rows], indent=1) + "\n"


def as_parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """A Parquet file; a column with texts and numbers becomes one of texts."""
    import pyarrow
    import pyarrow.parquet

    arrays = {}
    for name in columns:
        values = [row[name] for row in rows]
        if len({isinstance(value, str) for value in values if value is not None}) > 1:
            values = [None if value is None else str(value) for value in values]
        arrays[name] = pyarrow.array(values)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink)
    return sink.getvalue()


def mean_rows(
    summary: Summary, rows: Sequence[Row], sort: str | None = None
) -> tuple[list[Row], list[Column]]:
    """One row for each setting, with the mean and the deviation of every figure over its runs.

    Args:
        summary: The study.
        rows: The rows to include; those that are not finished are left out.
        sort: As for `StudyTable.rows`, by the means.

    Returns:
        The rows, and their columns: the axes, `runs` (their number), and for each figure that
        some run has, the mean and the sample standard deviation (`_std`).
    """
    done = [row for row in rows if row["state"] == "done"]
    figures = [
        column
        for column in summary.columns
        if column.kind == "figure" and any(row[column.name] is not None for row in done)
    ]
    found: list[Row] = []
    for group in grouped(done, summary.axes):
        row: Row = {**group.cells, "runs": len(group.rows)}
        for column in figures:
            row[column.name] = group.mean(column.name)
            row[f"{column.name}_std"] = group.deviation(column.name)
        found.append(row)
    columns = [column for column in summary.columns if column.kind == "axis"]
    columns.append(Column("runs", "run", "INTEGER", "number of runs"))
    for column in figures:
        columns.append(column)
        name, meaning = f"{column.name}_std", f"standard deviation of {column.name}"
        columns.append(Column(name, "figure", "REAL", meaning))
    if sort is not None:
        found = _sorted(found, sort, columns)
    return found, columns


def _sorted(rows: list[Row], sort: str, columns: Sequence[Column]) -> list[Row]:
    known = {column.name: column for column in columns}
    name = require_column(sort.removeprefix("-"), known, "--sort")
    down = known[name].rising != sort.startswith("-")
    given = [row for row in rows if row[name] is not None]
    texts = any(isinstance(row[name], str) for row in given)
    given.sort(key=lambda row: str(row[name]) if texts else number(row[name]), reverse=down)
    return [*given, *(row for row in rows if row[name] is None)]
