"""A profile as bars: time by kind of operator, and by block of the network."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..results.operator_table import OperatorTable
from . import wording
from .markup import Markup, element
from .plot import Frame, Scale, bar, line, shortened, svg, text_at, text_width, ticks
from .style import picture_style

ROW_PX = 24.0
BAR_PX = 14.0
MOST_ROWS = 12
PICTURE_PX = 720.0
# On narrower plots, names and figures are shorter.
NARROW_PX = 400.0
_BLOCK = re.compile(r"(?:^|[./_])(?:blocks?|layers?|stages?)[./_](\d+)(?:[./_]|$)")


@dataclass(frozen=True)
class Part:
    """A bar: its name, how many nodes it sums up, and their seconds in one inference."""

    name: str
    nodes: int
    seconds: float


def by_kind(table: OperatorTable) -> list[Part]:
    """Kinds of operators by descending time; those beyond the first dozen are summed up."""
    kinds = table.by_operator().items()
    parts = [Part(name, nodes, seconds) for name, (nodes, seconds, _) in kinds]
    rest = parts[MOST_ROWS - 1 :]
    if len(rest) < 2:
        return parts
    nodes, seconds = sum(part.nodes for part in rest), sum(part.seconds for part in rest)
    return [*parts[: MOST_ROWS - 1], Part(f"{len(rest)} other kinds", nodes, seconds)]


def by_block(table: OperatorTable) -> list[Part]:
    """Blocks in order, then `outside of the blocks`; empty if no node is named after a block."""
    found: dict[int, Part] = {}
    for row in table.rows:
        match = _BLOCK.search(row.node)
        number = int(match[1]) if match else -1
        name = "outside of the blocks" if number < 0 else f"block {number}"
        sum_so_far = found.get(number, Part(name, 0, 0.0))
        found[number] = Part(name, sum_so_far.nodes + 1, sum_so_far.seconds + row.seconds)
    if all(number < 0 for number in found):
        return []
    blocks = [found[number] for number in sorted(found) if number >= 0]
    return [*blocks, found[-1]] if -1 in found else blocks


def bars(parts: list[Part], *, label: str, width: float, class_: str = "plot") -> Markup:
    """Plot one bar per part, with its share of the time.

    Args:
        parts: At least one part.
        label: Start of the description for screen readers; the shares follow.
        width: Width in pixels.
        class_: CSS classes.

    Returns:
        The plot.
    """
    total = sum(part.seconds for part in parts) or 1.0
    wide = width > NARROW_PX
    longest = 24 if wide else 15
    left = 14 + max(text_width(shortened(part.name, longest), 13.0) for part in parts)
    frame = Frame(width, ROW_PX * len(parts) + 34, left=left, right=14, top=4, bottom=30)
    largest = (max(part.seconds for part in parts) or 1.0) / total * 100
    # The longest bar leaves space for its figure.
    full, space = frame.inner_right - left, 128.0 if wide else 84.0
    scale = frame.x(0.0, largest * full / max(40.0, full - space))
    drawn = _percent_axis(frame, scale, largest)
    for number, part in enumerate(parts):
        y = frame.top + ROW_PX * number
        end = scale(100 * part.seconds / total)
        figure = f"{100 * part.seconds / total:.1f} %"
        if wide:
            figure += f" · {wording.duration(part.seconds)}"
        hint = element("title", _description(part, total))
        drawn += [
            text_at(left - 8, y + 14, shortened(part.name, longest), class_="name", anchor="end"),
            bar(left, y + 4, max(1.0, end - left), BAR_PX, hint, class_="shape"),
            text_at(end + 6, y + 15, figure, class_="tick halo"),
        ]
    descriptions = "; ".join(_description(part, total) for part in parts)
    group = element("g", *drawn, class_="s1")
    return svg(width, frame.height, group, label=f"{label}: {descriptions}", class_=class_)


def _percent_axis(frame: Frame, scale: Scale, largest: float) -> list[Markup]:
    drawn = []
    for value in ticks(0.0, largest, max(2, int(frame.width // 160))):
        x = scale(value)
        drawn += [
            line(x, frame.top, x, frame.inner_bottom, "grid"),
            text_at(x, frame.inner_bottom + 17, f"{value:g} %", class_="tick", anchor="middle"),
        ]
    return drawn


def operator_picture(table: OperatorTable, title: str) -> str:
    """The profile as one stand-alone SVG: by kind of operator, and below it by block."""
    parts, y, width = [], 56.0, PICTURE_PX
    for head, rows in (("By kind of operator", by_kind(table)), ("By block", by_block(table))):
        if rows:
            drawn = bars(rows, label=head, width=width - 40)
            moved = element("g", drawn, transform=f"translate(20 {y + 8:g})")
            parts += [text_at(20, y, head, class_="name"), moved]
            y += ROW_PX * len(rows) + 76
    card = element(
        "rect",
        x=0.5,
        y=0.5,
        width=width - 1,
        height=y - 31,
        rx=12,
        style="fill:var(--card);stroke:var(--hair)",
    )
    seconds = wording.duration(table.seconds)
    head = f"{shortened(title, 60)}: {seconds} of operators in one inference"
    picture = element(
        "svg",
        element("style", Markup(picture_style())),
        card,
        text_at(20, 30, head, class_="name"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {y - 30:g}",
        width=width,
        height=y - 30,
        class_="plot",
        role="img",
    )
    return f"{picture}\n"


def _description(part: Part, total: float) -> str:
    nodes, seconds = wording.plural(part.nodes, "node"), wording.duration(part.seconds)
    return f"{part.name} {100 * part.seconds / total:.1f} %, {nodes}, {seconds}"
