"""Accuracy against a cost (latency, file size), with the Pareto front.

The cost axis starts at zero, so that distances are proportional to costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import wording
from .markup import Markup, element, joined
from .overview import Row
from .plot import (
    Frame,
    Scale,
    line,
    marker,
    padded,
    path,
    shortened,
    svg,
    text_at,
    text_width,
    x_axis,
    y_axis,
)

# A smaller range of accuracies, in percentage points, would exaggerate differences.
MIN_SPAN = 2.0


@dataclass(frozen=True)
class Point:
    """One artifact: `cost` in the unit of the axis, accuracy and its interval in percent."""

    label: str
    series: int
    cost: float
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    hint: str


def latency_points(rows: Sequence[Row]) -> list[Point]:
    """Points whose cost is the p50 in milliseconds; rows without a p50 or a top-1 are left out."""
    return [
        _point(row, row.summary.p50_s * 1e3, wording.duration(row.summary.p50_s))
        for row in rows
        if row.summary and row.top1 is not None
    ]


def size_points(rows: Sequence[Row]) -> list[Point]:
    """Points whose cost is the file size in megabytes; rows without a top-1 are left out."""
    return [
        _point(row, row.file_bytes / 1e6, wording.size(row.file_bytes))
        for row in rows
        if row.top1 is not None
    ]


def _point(row: Row, cost: float, cost_text: str) -> Point:
    top1, bounds = row.top1 or 0.0, row.top1_interval
    return Point(
        label=row.label,
        series=row.series,
        cost=cost,
        accuracy=100 * top1,
        accuracy_low=100 * bounds[0] if bounds else None,
        accuracy_high=100 * bounds[1] if bounds else None,
        hint=f"{wording.percent(top1, 2)} top-1, {cost_text}",
    )


def scatter(
    points: Sequence[Point],
    *,
    cost_title: str,
    label: str,
    width: float,
    height: float,
    class_: str = "plot",
) -> Markup:
    """Plot accuracy against cost.

    Args:
        points: At least one point.
        cost_title: Title of the cost axis, with its unit.
        label: Description for screen readers.
        width: Width in pixels.
        height: Height in pixels.
        class_: CSS classes.

    Returns:
        The plot.
    """
    frame = Frame(width, height, left=44, right=14, top=26, bottom=46)
    x, y = _scales(points, frame)
    marks = [
        joined(
            _whiskers(x(point.cost), y, point),
            marker(
                x(point.cost), y(point.accuracy), point.series, title=f"{point.label}: {point.hint}"
            ),
        )
        for point in points
    ]
    return svg(
        width,
        height,
        text_at(frame.left - 34, 13, "top-1, %", class_="axis"),
        text_at(frame.inner_right, 13, "better: up and left ↖", class_="tick", anchor="end"),
        x_axis(frame, x, cost_title, int(width // 90)),
        y_axis(frame, y, 5),
        _front(points, x, y, frame),
        *marks,
        *_labels(points, frame, x, y),
        label=label,
        class_=class_,
    )


def _scales(points: Sequence[Point], frame: Frame) -> tuple[Scale, Scale]:
    lows = [
        point.accuracy if point.accuracy_low is None else point.accuracy_low for point in points
    ]
    highs = [
        point.accuracy if point.accuracy_high is None else point.accuracy_high for point in points
    ]
    low, high = padded(min(lows), max(highs), share=0.12, min_span=MIN_SPAN)
    x = frame.x(0.0, max(point.cost for point in points) * 1.16 or 1.0)
    # The axis ends just above 100 %, so that the marker of a point at 100 % is complete.
    return x, frame.y(max(low, 0.0), min(high, 100.5))


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both cost and accuracy, by ascending cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def _front(points: Sequence[Point], x: Scale, y: Scale, frame: Frame) -> Markup | None:
    front = pareto(points)
    if len(points) < 2:
        return None
    steps = [(x(front[0].cost), frame.inner_bottom)]
    for point in front:
        # Between two points of the front, the left one is still the best.
        steps += [(x(point.cost), steps[-1][1]), (x(point.cost), y(point.accuracy))]
    return path([*steps, (frame.inner_right, steps[-1][1])], "front")


def _whiskers(x: float, y: Scale, point: Point) -> Markup | None:
    if point.accuracy_low is None or point.accuracy_high is None:
        return None
    top, bottom = y(point.accuracy_high), y(point.accuracy_low)
    ends = [line(x - 4, level, x + 4, level, "whisker") for level in (top, bottom)]
    stem = line(x, top, x, bottom, "whisker")
    return element("g", stem, *ends, class_=f"s{min(point.series, 5)}")


def _labels(points: Sequence[Point], frame: Frame, x: Scale, y: Scale) -> list[Markup]:
    """A label beside every point, at the first position that overlaps nothing.

    Points of the front are labelled first. A point without a free position has no label; its marker
    is that of the column in the table.
    """
    occupied = [
        _Box(x(p.cost) - 8, y(p.accuracy) - 8, x(p.cost) + 8, y(p.accuracy) + 8) for p in points
    ]
    edge = _Box(frame.left + 2, frame.top - 8, frame.inner_right + 10, frame.inner_bottom)
    labels = []
    front = pareto(points)
    for point in sorted(points, key=lambda p: (p not in front, -p.accuracy)):
        name = shortened(point.label, 26 if frame.width > 400 else 20)
        width, centre, level = 1.06 * text_width(name), x(point.cost), y(point.accuracy)
        positions = [
            (centre + 11 if right else centre - 11 - width, level + down)
            for down in (-9, 17, -24, 32, -39, 47)
            for right in (True, False)
        ]
        free = (start for start in positions if _is_free(_box(start, width), occupied, edge))
        found = next(free, None)
        if found is None:
            continue
        start, base = found
        occupied.append(_box(found, width))
        if start > centre:
            labels.append(text_at(start, base, name, class_="name halo"))
        else:
            labels.append(text_at(start + width, base, name, class_="name halo", anchor="end"))
    return labels


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


def _box(start: tuple[float, float], width: float) -> _Box:
    return _Box(start[0], start[1] - 11, start[0] + width, start[1] + 3)


def _is_free(box: _Box, occupied: Sequence[_Box], edge: _Box) -> bool:
    inside = (
        box.left >= edge.left
        and box.right <= edge.right
        and box.top >= edge.top
        and box.bottom <= edge.bottom
    )
    return inside and not any(
        box.left < b.right and b.left < box.right and box.top < b.bottom and b.top < box.bottom
        for b in occupied
    )
