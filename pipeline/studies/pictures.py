"""The figures of a study: accuracy against a cost, every run a point that links to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...bench.report import wording
from ...bench.report.markup import Markup, element
from ...bench.report.plot import (
    Frame,
    Scale,
    marker,
    padded,
    path,
    sheet,
    shortened,
    text_at,
    text_width,
    x_axis,
    y_axis,
)
from ...bench.report.style import packed
from .expansion import settings_text
from .summary import Summary, number, numbers, pareto
from .table import Row

WIDTH_PX, HEIGHT_PX, LEGEND_PX = 760.0, 460.0, 22.0
# An axis with more values has too many colours to distinguish.
MOST_COLOURS = 6
LONGEST_NAME = 24
# The parts of a report that have figures.
ACCURACY, BY_DEPTH = "Accuracy and cost", "Tokens"
_STYLE = packed(
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .title{font-size:16px;font-weight:650}"
    ".plot .under{font-size:12.5px;fill:var(--soft)}"
)


@dataclass(frozen=True)
class Cost:
    """What accuracy is compared with.

    Attributes:
        column: Its column.
        title: Title of the axis, with the unit.
        unit: How many of the column's units are one of the axis.
        axis: The axis of the study whose values have colours; None: all runs have one.
        place: Of several pictures of the cost, from 0.
    """

    column: str
    title: str
    unit: float
    axis: str | None = None
    place: int = 0

    @property
    def file(self) -> str:
        """Name of its figures, without the suffix."""
        name = f"{self.column} {self.axis}" if self.place else self.column
        return f"study-{re.sub('[^a-z0-9]+', '-', name)}"


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        file: Its name.
        svg: Its contents.
        caption: Sentences; the first one is the alternative text.
        section: The part of the report that it belongs to.
    """

    file: str
    svg: str
    caption: str
    section: str = ACCURACY

    @staticmethod
    def first_sentence(caption: str) -> str:
        """The beginning of a caption up to its first full stop before a space."""
        return f"{caption.partition('. ')[0].rstrip('.')}."

    @property
    def alt(self) -> str:
        """What the picture shows, for readers who do not see it."""
        return self.first_sentence(self.caption)


@dataclass(frozen=True)
class Series:
    """The points of one value of the axis that the colours show."""

    name: str
    rows: tuple[Row, ...]


def costs(summary: Summary) -> list[Cost]:
    """The costs that the finished runs have; one of them once for each axis with colours.

    That is the first one in which the runs differ: tokens, for example, have no parameters.
    """
    axes = coloured_axes(summary)
    varied = [column for column in summary.fronts if _differs(summary, column)]
    main = next(iter(varied or summary.fronts), None)
    found: list[Cost] = []
    for column in summary.fronts:
        shown: Sequence[str | None] = (axes if column == main else axes[:1]) or [None]
        title, unit = _cost_title(summary, column)
        found += [Cost(column, title, unit, axis, place) for place, axis in enumerate(shown)]
    return found


def _differs(summary: Summary, column: str) -> bool:
    """Whether the largest cost of a finished run is over 5 % above the smallest."""
    values = numbers(summary.done, column)
    return max(values) > 1.05 * min(values)


def _cost_title(summary: Summary, column: str) -> tuple[str, float]:
    if column in summary.latencies:
        name = column.removeprefix("compact_").removesuffix("_ms").replace("_", " ")
        return f"median latency of {name}, ms", 1.0
    largest = max(number(row.get(column)) for row in summary.done)
    word, unit = ("millions", 1e6) if largest >= 1e6 else ("thousands", 1e3)
    what = {
        "params": "parameters",
        "macs": "multiply-adds",
        "params_nonzero": "parameters that are not zero",
    }[column]
    return f"{what}, {word}", unit


def coloured_axes(summary: Summary) -> list[str]:
    """The axes with two to six values in finished runs; those that set the size are last.

    Of axes that divide the runs equally, as those of a zip do, the first.
    """
    found: dict[tuple[int, ...], str] = {}
    for axis in [*summary.configurations, *summary.axes]:
        values = [row[axis] for row in summary.done]
        places = {value: place for place, value in enumerate(dict.fromkeys(values))}
        if 2 <= len(places) <= MOST_COLOURS:
            found.setdefault(tuple(places[value] for value in values), axis)
    return list(found.values())


def series(summary: Summary, axis: str | None) -> list[Series]:
    """The finished runs by the value of an axis."""
    if axis is None:
        return [Series("", tuple(summary.done))]
    values = dict.fromkeys(row[axis] for row in summary.done)
    return [
        Series(
            "not set" if value is None else str(value),
            tuple(row for row in summary.done if row[axis] == value),
        )
        for value in values
    ]


def cost_caption(summary: Summary, cost: Cost) -> str:
    """The caption of the figure of a cost."""
    quality = quality_title(summary)
    coloured = "" if cost.axis is None else f", coloured by {cost.axis}"
    what, _, unit = cost.title.rpartition(", ")
    about = f"{quality[0].upper()}{quality[1:]} by {what} ({unit}){coloured}"
    return f"{about}. A point is a run; a line is the Pareto front of a seed."


def cost_pictures(summary: Summary) -> list[Picture]:
    """The figures of accuracy and cost, in the order of `costs`."""
    return [
        Picture(f"{cost.file}.svg", f"{picture(summary, cost)}\n", cost_caption(summary, cost))
        for cost in costs(summary)
    ]


def picture(summary: Summary, cost: Cost, *, linked: bool = True) -> str:
    """A stand-alone SVG: accuracy against a cost, with the Pareto front of each seed.

    Args:
        summary: A study with finished runs.
        cost: The cost axis.
        linked: Whether each point links to the report of its run, relative to the study folder.

    Returns:
        The SVG.
    """
    rows = [row for row in summary.done if row.get(cost.column) is not None]
    rows = [row for row in rows if row[summary.quality] is not None]
    frame = Frame(WIDTH_PX, HEIGHT_PX, left=58, right=26, top=92, bottom=58)
    shares = [100 * number(row[summary.quality]) for row in rows]
    low, high = padded(min(shares), max(shares), share=0.1, min_span=2.0)
    x = frame.x(0.0, max(number(row[cost.column]) for row in rows) / cost.unit * 1.06 or 1.0)
    y = frame.y(max(0.0, low), min(100.5, high))
    title = shortened(summary.name, 60)
    named = f"{title}: {quality_title(summary)}"
    return str(
        sheet(
            WIDTH_PX,
            HEIGHT_PX,
            Picture.first_sentence(cost_caption(summary, cost)),
            _STYLE,
            text_at(26, 34, f"{named}, %", class_="title"),
            text_at(
                26, 54, "a point is a run; a dashed line is the front of a seed", class_="under"
            ),
            *_legend(summary, cost.axis),
            x_axis(frame, x, cost.title, 7),
            y_axis(frame, y, 6),
            *(_front(summary, cost, seed, frame, x, y) for seed in summary.fronts[cost.column]),
            *_points(summary, cost, rows, x, y, linked=linked),
        )
    )


def quality_title(summary: Summary) -> str:
    """The accuracy that is compared."""
    return {"top1": "top-1", "val_top1": "validation top-1"}[summary.quality]


def hint(summary: Summary, row: Row) -> str:
    """A run in one line: its settings, accuracy and size."""
    settings = settings_text({axis: row[axis] for axis in summary.axes})
    top1 = wording.percent(number(row[summary.quality]), 2)
    params = wording.count(number(row["params"]))
    return f"{settings}, seed {row['seed']}: {top1}, {params} parameters"


def _legend(summary: Summary, axis: str | None) -> list[Markup]:
    if axis is None:
        return []
    parts, x = [text_at(26, 76, f"{axis}:", class_="tick")], 40.0 + text_width(f"{axis}:", 11.5)
    for place, each in enumerate(series(summary, axis), 1):
        name = shortened(each.name, LONGEST_NAME)
        parts += [marker(x, 72, place, radius=4.5), text_at(x + 11, 76, name, class_="tick")]
        x += text_width(name, 11.5) + LEGEND_PX + 11
    return parts


def _points(
    summary: Summary, cost: Cost, rows: Sequence[Row], x: Scale, y: Scale, *, linked: bool
) -> list[Markup]:
    shown = {row["id"] for row in rows}
    marks = []
    for place, each in enumerate(series(summary, cost.axis), 1):
        for row in each.rows:
            if row["id"] not in shown:
                continue
            at = (x(number(row[cost.column]) / cost.unit), y(100 * number(row[summary.quality])))
            mark = marker(*at, place, radius=4.5, title=hint(summary, row))
            marks.append(
                element("a", mark, href=f"runs/{row['id']}/report.html") if linked else mark
            )
    return marks


def _front(
    summary: Summary, cost: Cost, seed: int, frame: Frame, x: Scale, y: Scale
) -> Markup | None:
    rows = [row for row in summary.done if row["seed"] == seed]
    front = pareto(rows, cost.column, summary.quality)
    if len(front) < 2:
        return None
    places = [
        (x(number(r[cost.column]) / cost.unit), y(100 * number(r[summary.quality]))) for r in front
    ]
    steps = [(places[0][0], frame.inner_bottom)]
    for place in places:
        # Between two runs of the front, the left one is still the best.
        steps += [(place[0], steps[-1][1]), place]
    return path([*steps, (frame.inner_right, steps[-1][1])], "front")
