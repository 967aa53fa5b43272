"""The picture of a study of tokens: how many the network carries, by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...bench.report.markup import Markup, element
from ...bench.report.plot import Frame, marker, path, sheet, text_at, x_axis, y_axis
from ...bench.report.style import packed
from ...compress.network.files import TOKENS_FILE
from ...core.written_kinds import json_object
from .article import COLOURS, MARKERS, pdf, report_link
from .article_text import Figure, escaped
from .claims import SLIMMING, TOKENS
from .expansion import settings_text
from .summary import Summary, number
from .table import RUNS

PICTURE_FILE = "study-tokens.svg"
WIDTH_PX, HEIGHT_PX, LEGEND_PX, MOST = 760.0, 420.0, 33.0, 5
_STYLE = packed(
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .title{font-size:16px;font-weight:650}"
    ".plot .course{fill:none;stroke-width:1.75}"
    + "".join(f".plot .c{place}{{stroke:var(--s{place})}}" for place in range(1, MOST + 1))
)
_DEPTH = "sub-layers passed; 0: behind the stem"


@dataclass(frozen=True)
class Course:
    """The tokens of one run.

    Attributes:
        method: How they were chosen.
        name: The other settings of the run.
        run: Its id.
        counts: The tokens after the stem and after each sub-layer.
    """

    method: str
    name: str
    run: str
    counts: tuple[int, ...]


def courses(summary: Summary, folder: Path) -> list[Course]:
    """The tokens of one method and seed, a run for each other setting.

    Args:
        summary: The study.
        folder: The study folder.

    Returns:
        At most five; of Patch Slimming where the study has it, else of the first method. None
        where no finished run has one set of tokens for all images.
    """
    rows = [row for row in summary.done if row.get(TOKENS) is not None]
    methods = dict.fromkeys(row[TOKENS] for row in rows)
    for method in sorted(methods, key=lambda name: name != SLIMMING):
        chosen = [row for row in rows if row[TOKENS] == method]
        first = min(number(row["seed"]) for row in chosen)
        found: dict[str, Course] = {}
        for row in chosen:
            if row["seed"] != first:
                continue
            others = {axis: row[axis] for axis in summary.axes if axis != TOKENS}
            name, run = settings_text(others), str(row["id"])
            counts = _counts(folder / RUNS / run / TOKENS_FILE)
            if counts:
                found.setdefault(name, Course(str(method), name, run, counts))
        if found:
            return list(found.values())[:MOST]
    return []


def courses_picture(shown: Sequence[Course]) -> str:
    """A stand-alone SVG, a line for each run that links to its report."""
    top = 60.0 + LEGEND_PX * 0.75 * len(shown)
    frame = Frame(WIDTH_PX, HEIGHT_PX, left=58, right=26, top=top, bottom=58)
    x = frame.x(0, max(len(each.counts) for each in shown) - 1)
    y = frame.y(0, 1.05 * max(each.counts[0] for each in shown))
    title = f"Tokens by depth, chosen by {shown[0].method}"
    parts: list[Markup | None] = [
        text_at(26, 34, title, class_="title"),
        x_axis(frame, x, _DEPTH, 12, whole=True),
        y_axis(frame, y, 6),
    ]
    for place, each in enumerate(shown, 1):
        points = [(x(depth), y(count)) for depth, count in enumerate(each.counts)]
        hint = f"run {each.run}: {each.counts[0]} to {each.counts[-1]} tokens"
        marks = [marker(*point, place, radius=3.5, title=hint) for point in points]
        parts.append(
            element(
                "a",
                path(points, f"course c{place}"),
                *marks,
                href=f"{RUNS}/{each.run}/report.html",
            )
        )
        height = 34.0 + LEGEND_PX * 0.75 * place
        parts += [
            marker(32, height - 4, place, radius=4.5),
            text_at(43, height, each.name, class_="tick"),
        ]
    return str(sheet(WIDTH_PX, HEIGHT_PX, title, _STYLE, *parts)) + "\n"


def courses_figure(shown: Sequence[Course]) -> dict[Figure, bytes]:
    """The same for an article."""
    links = ", ".join(report_link(each.run) for each in shown)
    about = escaped(f"Tokens by depth, chosen by {shown[0].method}")
    caption = f"{about}. The runs are {links}."
    figure = Figure(Path(PICTURE_FILE).stem, "Tokens by depth", caption)
    return {figure: pdf(partial(_draw, shown=shown), 0.72)}


def _draw(axes: Any, shown: Sequence[Course]) -> None:
    for place, each in enumerate(shown):
        axes.plot(
            each.counts,
            marker=MARKERS[place],
            color=COLOURS[place],
            linewidth=0.8,
            markersize=2.5,
            label=each.name.replace("$", r"\$"),
        )
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel(_DEPTH)
    axes.set_ylabel("tokens")
    axes.grid(color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6, frameon=False)


def _counts(file: Path) -> tuple[int, ...]:
    """The counts of tokens.json in the order of depth; none where it is missing or damaged."""
    counts = (json_object(file) or {}).get("counts")
    found = tuple(counts.values()) if isinstance(counts, dict) else ()
    return found if all(isinstance(count, int) for count in found) else ()
