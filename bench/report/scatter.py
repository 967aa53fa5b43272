"""Accuracy against a cost (latency, size): the cost starts at zero, so that distances are honest;
the front is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .markup import Markup, element, joined
from .plot import (
    Frame,
    Scale,
    line,
    marker,
    padded,
    path,
    shortened,
    svg,
    text_width,
    words,
    x_axis,
    y_axis,
)


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


def scatter(
    points: Sequence[Point],
    *,
    cost_title: str,
    label: str,
    width: float,
    height: float,
    class_: str = "plot",
) -> Markup:
    """A picture of `points`; needs at least one."""
    frame = Frame(width, height, left=44, right=14, top=26, bottom=46)
    lows = [
        point.accuracy if point.accuracy_low is None else point.accuracy_low for point in points
    ]
    highs = [
        point.accuracy if point.accuracy_high is None else point.accuracy_high for point in points
    ]
    # At least two percent points high: a smaller window would blow up differences that do not
    # matter.
    low, high = padded(min(lows), max(highs), share=0.12, least=2.0)
    x = frame.x(0.0, max(point.cost for point in points) * 1.16 or 1.0)
    # No window reaches above 100 %, but a point that sits there keeps its whole mark.
    y = frame.y(max(low, 0.0), min(high, 100.5))
    drawn = [
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
        words(frame.left - 34, 13, "top-1, %", class_="axis"),
        words(frame.inner_right, 13, "better: up and left ↖", class_="tick", anchor="end"),
        x_axis(frame, x, cost_title, wanted=int(width // 90)),
        y_axis(frame, y, wanted=5),
        _front(points, x, y, frame),
        *drawn,
        *_labels(points, frame, x, y),
        label=label,
        class_=class_,
    )


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both cost and accuracy, by rising cost."""
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
        # Between two points of the front, the best that one can have is still the left one.
        steps += [(x(point.cost), steps[-1][1]), (x(point.cost), y(point.accuracy))]
    return path([*steps, (frame.inner_right, steps[-1][1])], "front")


def _whiskers(x: float, y: Scale, point: Point) -> Markup | None:
    if point.accuracy_low is None or point.accuracy_high is None:
        return None
    top, bottom = y(point.accuracy_high), y(point.accuracy_low)
    ends = [line(x - 4, at, x + 4, at, "whisker") for at in (top, bottom)]
    return element(
        "g", line(x, top, x, bottom, "whisker"), *ends, class_=f"s{min(point.series, 5)}"
    )


def _labels(points: Sequence[Point], frame: Frame, x: Scale, y: Scale) -> list[Markup]:
    """A name beside every point: the first of several places that meets neither an edge, nor a
    mark, nor another name.

    Where many points crowd, those of the front are named first, and one that finds no place stays
    without: its mark is that of the table's head.
    """
    taken = [
        _Box(x(p.cost) - 8, y(p.accuracy) - 8, x(p.cost) + 8, y(p.accuracy) + 8) for p in points
    ]
    edge = _Box(frame.left + 2, frame.top - 8, frame.inner_right + 10, frame.inner_bottom)
    made = []
    front = pareto(points)
    for point in sorted(points, key=lambda p: (p not in front, -p.accuracy)):
        name = shortened(point.label, 26 if frame.width > 400 else 20)
        wide, at, level = 1.06 * text_width(name), x(point.cost), y(point.accuracy)
        places = [
            (at + 11 if right else at - 11 - wide, level + down)
            for down in (-9, 17, -24, 32, -39, 47)
            for right in (True, False)
        ]
        found = next((place for place in places if _free(_box(place, wide), taken, edge)), None)
        if found is None:
            continue
        start, base = found
        taken.append(_box((start, base), wide))
        made.append(
            words(start, base, name, class_="name halo")
            if start > at
            else words(start + wide, base, name, class_="name halo", anchor="end")
        )
    return made


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


def _box(place: tuple[float, float], wide: float) -> _Box:
    return _Box(place[0], place[1] - 11, place[0] + wide, place[1] + 3)


def _free(box: _Box, taken: Sequence[_Box], edge: _Box) -> bool:
    inside = (
        box.left >= edge.left
        and box.right <= edge.right
        and box.top >= edge.top
        and box.bottom <= edge.bottom
    )
    return inside and not any(
        box.left < b.right and b.left < box.right and box.top < b.bottom and b.top < box.bottom
        for b in taken
    )
