"""A profile as pictures: the time by kind of operator, and by part of the network (its blocks, as
the nodes' names tell them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..results.operator_table import OperatorTable
from . import wording
from .markup import Markup, element
from .plot import Frame, line, shortened, svg, text_width, ticks, words
from .style import picture_style

ROW_PX = 24.0
BAR_PX = 14.0
MOST_ROWS = 12
_BLOCK = re.compile(r"(?:^|[./_])(?:blocks?|layers?|stages?)[./_](\d+)(?:[./_]|$)")


@dataclass(frozen=True)
class Part:
    """A bar: what it stands for, how many nodes, and their seconds in one inference."""

    name: str
    nodes: int
    seconds: float


def by_kind(table: OperatorTable) -> list[Part]:
    """Kinds of operators by falling time; what is beyond the first dozen is summed up."""
    parts = [
        Part(name, nodes, seconds) for name, (nodes, seconds, _) in table.by_operator().items()
    ]
    rest = parts[MOST_ROWS - 1 :]
    if len(rest) < 2:
        return parts
    other = Part(
        f"{len(rest)} other kinds",
        sum(part.nodes for part in rest),
        sum(part.seconds for part in rest),
    )
    return [*parts[: MOST_ROWS - 1], other]


def by_block(table: OperatorTable) -> list[Part]:
    """Blocks in their order, and `outside of the blocks`; empty where the nodes' names tell no
    blocks.
    """
    found: dict[int, Part] = {}
    for row in table.rows:
        match = _BLOCK.search(row.node)
        number = int(match[1]) if match else -1
        before = found.get(
            number, Part("outside of the blocks" if number < 0 else f"block {number}", 0, 0.0)
        )
        found[number] = Part(before.name, before.nodes + 1, before.seconds + row.seconds)
    if all(number < 0 for number in found):
        return []
    blocks = [found[number] for number in sorted(found) if number >= 0]
    return [*blocks, found[-1]] if -1 in found else blocks


def bars(parts: list[Part], *, label: str, width: float, class_: str = "plot") -> Markup:
    """One bar a part, its share of all time and its nodes written beside it."""
    total = sum(part.seconds for part in parts) or 1.0
    # On a phone the names give way to the bars.
    longest = 24 if width > 400 else 15
    left = 14 + max(text_width(shortened(part.name, longest), 13.0) for part in parts)
    frame = Frame(width, ROW_PX * len(parts) + 34, left=left, right=14, top=4, bottom=30)
    room = 128.0 if width > 400 else 84.0
    most = max(part.seconds for part in parts) or 1.0
    scale = frame.x(
        0.0,
        most
        * (frame.inner_right - left)
        / max(40.0, frame.inner_right - left - room)
        / total
        * 100,
    )
    drawn = []
    for value in ticks(0.0, most / total * 100, max(2, int(width // 160))):
        drawn.append(line(scale(value), frame.top, scale(value), frame.inner_bottom, "grid"))
        drawn.append(
            words(
                scale(value),
                frame.inner_bottom + 17,
                f"{value:g} %",
                class_="tick",
                anchor="middle",
            )
        )
    for number, part in enumerate(parts):
        y = frame.top + ROW_PX * number
        end = scale(100 * part.seconds / total)
        figure = f"{100 * part.seconds / total:.1f} %" + (
            f" · {wording.duration(part.seconds)}" if width > 400 else ""
        )
        drawn += [
            words(left - 8, y + 14, shortened(part.name, longest), class_="name", anchor="end"),
            element(
                "rect",
                element("title", _told(part, total)),
                x=left,
                y=y + 4,
                width=max(1.0, end - left),
                height=BAR_PX,
                rx=2,
                class_="shape",
            ),
            words(end + 6, y + 15, figure, class_="tick halo"),
        ]
    told = "; ".join(_told(part, total) for part in parts)
    return svg(
        width,
        frame.height,
        element("g", *drawn, class_="s1"),
        label=f"{label}: {told}",
        class_=class_,
    )


def operator_picture(table: OperatorTable, title: str) -> str:
    """One SVG that stands alone: by kind, and below it by block."""
    parts, y, width = [], 56.0, 720.0
    for head, rows in (("By kind of operator", by_kind(table)), ("By block", by_block(table))):
        if rows:
            drawn = bars(rows, label=head, width=width - 40)
            parts += [
                words(20, y, head, class_="name"),
                element("g", drawn, transform=f"translate(20 {y + 8:g})"),
            ]
            y += ROW_PX * len(rows) + 76
    sheet = element(
        "rect",
        x=0.5,
        y=0.5,
        width=width - 1,
        height=y - 31,
        rx=12,
        style="fill:var(--card);stroke:var(--hair)",
    )
    head = words(
        20,
        30,
        f"{shortened(title, 60)}: {wording.duration(table.seconds)} of operators in one inference",
        class_="name",
    )
    picture = element(
        "svg",
        element("style", Markup(picture_style())),
        sheet,
        head,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {y - 30:g}",
        width=width,
        height=y - 30,
        class_="plot",
        role="img",
    )
    return f"{picture}\n"


def _told(part: Part, total: float) -> str:
    return f"{part.name} {100 * part.seconds / total:.1f} %, {wording.plural(part.nodes, 'node')}, {wording.duration(part.seconds)}"
