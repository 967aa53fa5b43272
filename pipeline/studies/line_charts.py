"""Line charts of a study's report: as SVG with links, as PDF for an article, and their captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...bench.report.markup import Markup, element
from ...bench.report.plot import (
    Frame,
    Scale,
    line,
    marker,
    path,
    series_class,
    sheet,
    shortened,
    text_at,
    text_width,
    x_axis,
    y_axis,
)
from ...bench.report.style import packed
from .article_text import Figure, escaped
from .pictures import Picture
from .table import RUNS

WIDTH_PX, PANEL_PX, HEAD_PX, ROW_PX, GAP_PX = 760.0, 320.0, 60.0, 22.0, 46.0
LEGEND_TEXT_PX, LONGEST_NAME, LONGEST_TITLE = 11.5, 90, 78
_STYLE = packed(
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .title{font-size:16px;font-weight:650}"
    ".plot .course{fill:none;stroke-width:1.75}"
    ".plot .level{stroke:var(--soft);stroke-width:1.25;stroke-dasharray:5 4}"
    + "".join(f".plot .course.s{place}{{stroke:var(--s{place})}}" for place in range(1, 6))
)


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: What its colour stands for; empty where there is one line only.
        points: Its points; the line is drawn through them in this order.
        hints: The tooltip of each point, or none.
        spreads: The deviation of each point in y, or none.
        run: The run that it leads to.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    hints: tuple[str, ...] = ()
    spreads: tuple[float, ...] = ()
    run: str | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with lines.

    Attributes:
        x_title: What x is, with the unit.
        y_title: What y is, with the unit; above the axis.
        lines: The lines, at most five; those of equal place have equal colours in all panels.
        x: The range.
        y: The range.
        whole: Whether x has whole numbers only.
        level: A value of y to compare with, a dashed line.
    """

    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    x: tuple[float, float]
    y: tuple[float, float]
    whole: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        file: Its name without the suffix.
        section: The part of the report that it belongs to.
        about: What it shows, in words that figures of a kind have in common.
        caption: Sentences; the first one is the title and the alternative text.
        panels: One, or two beside each other.
        latex: The caption in LaTeX; empty: the caption, escaped.
    """

    file: str
    section: str
    about: str
    caption: str
    panels: tuple[Panel, ...]
    latex: str = ""

    @property
    def picture(self) -> Picture:
        """The chart for pages, each of its lines a link to its run."""
        return Picture(f"{self.file}.svg", _svg(self), self.caption, self.section)

    @property
    def figure(self) -> tuple[Figure, bytes]:
        """The chart for an article, as PDF."""
        from .article import pdf

        caption = self.latex or escaped(self.caption)
        content = pdf(partial(_draw, chart=self), 0.72 if len(self.panels) == 1 else 1.3)
        return Figure(self.file, self.about, caption), content


def _svg(chart: Chart) -> str:
    title = Picture.first_sentence(chart.caption).removesuffix(".")
    legend = list(_legend(chart.panels[0].lines))
    top = HEAD_PX + ROW_PX * (1 + max((row for *_, row in legend), default=-1))
    parts: list[Markup | None] = [text_at(26, 34, shortened(title, LONGEST_TITLE), class_="title")]
    for place, name, x, row in legend:
        y = HEAD_PX + ROW_PX * row
        parts += [marker(x, y - 4, place, radius=4.5), text_at(x + 11, y, name, class_="tick")]
    for frame, panel in zip(_frames(len(chart.panels), top), chart.panels, strict=True):
        parts += _panel(frame, panel)
    height = top + PANEL_PX
    return str(sheet(WIDTH_PX, height, f"{title}.", _STYLE, *parts)) + "\n"


def _legend(lines: Sequence[Line]) -> Iterator[tuple[int, str, float, int]]:
    """Number of the line, name, x of its mark, and row; the rows are filled one after another."""
    x, row = 32.0, 0
    for place, each in enumerate(lines, 1):
        if not each.name:
            continue
        name = shortened(each.name, LONGEST_NAME)
        width = 11.0 + text_width(name, LEGEND_TEXT_PX)
        if x > 32.0 and x + width > WIDTH_PX - 26:
            x, row = 32.0, row + 1
        yield place, name, x, row
        x += width + 24.0


def _frames(count: int, top: float) -> Iterator[Frame]:
    """The frames of panels beside each other."""
    height = top + PANEL_PX
    width = (WIDTH_PX - 58 - 26 - (count - 1) * (GAP_PX + 12)) / count
    for place in range(count):
        left = 58 + place * (width + GAP_PX + 12)
        right = WIDTH_PX - left - width
        yield Frame(WIDTH_PX, height, left=left, right=right, top=top + 14, bottom=58)


def _panel(frame: Frame, panel: Panel) -> Iterator[Markup | None]:
    x, y = frame.x(*panel.x), frame.y(*panel.y)
    narrow = frame.inner_right - frame.left < WIDTH_PX / 2
    yield text_at(frame.left - 32, frame.top - 10, panel.y_title, class_="axis")
    yield x_axis(frame, x, panel.x_title, 6 if narrow else 12, whole=panel.whole)
    yield y_axis(frame, y, 6)
    if panel.level is not None:
        at = y(panel.level)
        yield line(frame.left, at, frame.inner_right, at, "level")
    for place, each in enumerate(panel.lines, 1):
        drawn = list(_line(each, place, x, y))
        if each.run is None:
            yield from drawn
        else:
            yield element("a", *drawn, href=f"{RUNS}/{each.run}/report.html")


def _line(each: Line, place: int, x: Scale, y: Scale) -> Iterator[Markup]:
    colour = f"course {series_class(place)}"
    points = [(x(a), y(b)) for a, b in each.points]
    yield path(points, colour)
    for (at, value), spread in zip(each.points, each.spreads, strict=False):
        yield line(x(at), y(value - spread), x(at), y(value + spread), colour)
    for number, point in enumerate(points):
        title = each.hints[number] if each.hints else None
        yield marker(*point, place, radius=3.5, title=title)


def _draw(axes: Any, chart: Chart) -> None:
    """Draw on matplotlib's axes; two panels are one above the other, as a column is narrow."""
    places = [axes]
    if len(chart.panels) > 1:
        sheet_of, spot = axes.figure, axes.get_subplotspec()
        axes.remove()
        grid = spot.subgridspec(len(chart.panels), 1)
        places = [sheet_of.add_subplot(grid[row]) for row in range(len(chart.panels))]
    for place, panel in zip(places, chart.panels, strict=True):
        _draw_panel(place, panel)


def _draw_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    from .article import COLOURS, MARKERS

    if panel.level is not None:
        axes.axhline(panel.level, color="0.6", linewidth=0.7, linestyle="--")
    for place, each in enumerate(panel.lines):
        axes.errorbar(
            [point[0] for point in each.points],
            [point[1] for point in each.points],
            yerr=each.spreads or None,
            marker=MARKERS[place],
            color=COLOURS[place],
            linewidth=0.8,
            elinewidth=0.6,
            markersize=2.5,
            label=each.name.replace("$", r"\$"),
        )
    axes.set_xlim(*panel.x)
    axes.set_ylim(*panel.y)
    if panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(panel.x_title)
    axes.set_ylabel(panel.y_title)
    axes.grid(color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if any(each.name for each in panel.lines):
        axes.legend(fontsize=6, frameon=False)
