"""The points of the accuracy pictures: rows with a top-1 and a cost."""

from __future__ import annotations

from collections.abc import Sequence

from . import wording
from .overview import Row
from .scatter import Point


def latency_points(rows: Sequence[Row]) -> list[Point]:
    """Cost is the p50 in milliseconds; rows that were not timed or not scored are left out."""
    return [
        _point(row, row.summary.p50_s * 1e3, wording.duration(row.summary.p50_s))
        for row in rows
        if row.summary and row.top1 is not None
    ]


def size_points(rows: Sequence[Row]) -> list[Point]:
    """Cost is the artifact's files in megabytes; rows without a top-1 are left out."""
    return [
        _point(row, row.file_bytes / 1e6, wording.size(row.file_bytes))
        for row in rows
        if row.top1 is not None
    ]


def _point(row: Row, cost: float, said: str) -> Point:
    top1, bounds = row.top1 or 0.0, row.top1_interval
    return Point(
        label=row.label,
        series=row.series,
        cost=cost,
        accuracy=100 * top1,
        accuracy_low=100 * bounds[0] if bounds else None,
        accuracy_high=100 * bounds[1] if bounds else None,
        hint=f"{wording.percent(top1, 2)} top-1, {said}",
    )
