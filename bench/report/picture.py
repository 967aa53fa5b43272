"""One picture of a run for a README: what was kept in every block, and accuracy against latency. An
SVG that follows light and dark.

python -m vitrim.bench.report.picture RUN_FOLDER OUT.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_file
from . import wording
from .fronts import latency_points
from .kept import MOST_CELLS, Bar, Kept, kept_blocks
from .markup import Markup, element, joined
from .overview import Device, Overview, overview
from .plot import shortened, text_width, words
from .run import Run, load_run
from .scatter import scatter
from .style import picture_style

WIDTH_PX = 960.0
EDGE_PX = 30.0
HEAD_PX = 112.0
ROW_PX = 27.0
BAR_PX = 13.0
_SHORT = {"head": "heads", "qk": "q·k", "ffn": "FFN"}
SCATTER_PX = 350.0
LEAST_PX = 380.0


def write_picture(run_folder: Path | str, out: Path | str) -> Path:
    """Write the SVG; InputError if `out` is no .svg, or if the run holds neither kept.json nor a
    timed artifact with a top-1.
    """
    out = Path(out)
    if out.suffix != ".svg":
        raise InputError(f"{out}: the picture is an SVG; name a file that ends in .svg")
    replace_file(out, render_picture(load_run(run_folder), where=str(run_folder)))
    return out


def render_picture(run: Run, *, where: str = "the run") -> str:
    """The SVG as text."""
    view = overview(run)
    device = next((device for device in view.devices if not device.emulated and device.timed), None)
    points = latency_points(device.rows) if device else []
    kept = kept_blocks(run.kept) if run.kept else None
    if kept is None and not points:
        raise InputError(
            f"{where}: nothing to draw: no kept.json, and no measured artifact with a top-1; finish the run first"
        )
    rows = len(kept.blocks) + (1 if kept.embed else 0) if kept else 0
    height = max(LEAST_PX, HEAD_PX + 92 + rows * ROW_PX)
    right = SCATTER_PX if kept else WIDTH_PX - 2 * EDGE_PX
    parts = []
    if kept:
        wide = WIDTH_PX - SCATTER_PX - 3 * EDGE_PX if points else WIDTH_PX - 2 * EDGE_PX
        parts.append(_kept(kept, EDGE_PX, HEAD_PX, wide, height - HEAD_PX - EDGE_PX))
    if points and device:
        told = "; ".join(f"{point.label} {point.hint}" for point in points)
        drawn = scatter(
            points,
            cost_title="p50 latency, ms",
            label=f"Top-1 against latency: {told}",
            width=right,
            height=height - HEAD_PX - 46,
        )
        left = WIDTH_PX - EDGE_PX - right
        title = words(left, HEAD_PX + 4, "Accuracy against latency", class_="title")
        parts += [title, element("g", drawn, transform=f"translate({left:g} {HEAD_PX + 16:g})")]
    picture = element(
        "svg",
        element("title", f"{view.title}: {view.headline}"),
        element("style", Markup(picture_style() + _OWN)),
        element("rect", x=0.5, y=0.5, width=WIDTH_PX - 1, height=height - 1, rx=12, class_="sheet"),
        *_head(view, device),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH_PX:g} {height:g}",
        width=WIDTH_PX,
        height=height,
        class_="plot",
        role="img",
    )
    return f"{picture}\n"


_OWN = (
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}.plot .headline{font-size:27px;font-weight:700;letter-spacing:-.02em}"
    ".plot .under{font-size:14px;fill:var(--soft)}.plot .title{font-size:14px;font-weight:650}.plot .track{fill:var(--track)}"
    ".plot .fill{fill:var(--accent)}.plot .figure{font-size:11.5px;fill:var(--soft)}.plot .figure .is{fill:var(--ink);font-weight:600}"
)


def _head(view: Overview, device: Device | None) -> list[Markup]:
    room = WIDTH_PX - 2 * EDGE_PX
    size = min(27.0, 27.0 * room / text_width(view.headline, 27.0))
    under = (
        view.title
        + (f": {view.chosen} against the dense baseline" if view.chosen else "")
        + (f", on {device.title}" if device else "")
    )
    return [
        words(EDGE_PX, 48, view.headline, class_="headline", style=f"font-size:{size:.1f}px"),
        words(EDGE_PX, 73, shortened(under, 110), class_="under"),
    ]


def _kept(kept: Kept, left: float, top: float, width: float, height: float) -> Markup:
    columns = [
        column
        for column in kept.columns
        if any(bar.dimension == column for block in kept.blocks for bar in block.bars)
    ]
    names, gap = 66.0, 16.0
    each = (width - names - gap * (len(columns) - 1)) / max(1, len(columns))
    starts = [left + names + number * (each + gap) for number in range(len(columns))]
    parts = [words(left, top + 4, "What was kept in every block", class_="title")]
    y = top + 26
    if kept.embed:
        parts += [
            words(left, y + 13, "stream", class_="name"),
            _bar(kept.embed, left + names, y, width - names, total=True),
        ]
        y += ROW_PX + 8
    totals = {
        column: {
            bar.total
            for block in kept.blocks
            for bar in block.bars
            if bar.dimension == column and bar.total
        }
        for column in columns
    }
    for column, x in zip(columns, starts, strict=True):
        # Where all blocks began alike, the total stands once, in the head of the column.
        of = f", of {next(iter(totals[column]))}" if len(totals[column]) == 1 else ""
        parts.append(words(x, y + 8, _SHORT.get(column, column) + of, class_="tick"))
    y += 20
    step = min(40.0, (top + height - y) / len(kept.blocks))
    for block in kept.blocks:
        parts.append(words(left, y + 13, shortened(block.name, 9), class_="name"))
        known = {bar.dimension: bar for bar in block.bars}
        parts += [
            _bar(known[c], x, y, each, total=len(totals[c]) > 1)
            for c, x in zip(columns, starts, strict=True)
            if c in known
        ]
        y += step
    return joined(*parts)


def _bar(bar: Bar, x: float, y: float, width: float, *, total: bool) -> Markup:
    hint = element("title", f"{bar.name}: {bar.word or f'{bar.kept} of {bar.total} kept'}")
    if bar.word:
        return element("g", hint, words(x, y + 13, bar.word, class_="tick"))
    said = joined(
        element("tspan", str(bar.kept), class_="is"),
        element("tspan", f" of {bar.total}") if total else None,
    )
    room = text_width(str(bar.total) + (f" of {bar.total}" if total else "")) + 6
    figure = element("text", said, x=x + width, y=y + 13, text_anchor="end", class_="figure")
    return element("g", hint, figure, *_track(bar, x, y + 2, width - room))


def _track(bar: Bar, x: float, y: float, width: float) -> list[Markup]:
    if bar.dimension == "head" and 0 < bar.total <= MOST_CELLS:
        step = (width + 2) / bar.total
        return [
            element(
                "rect",
                x=x + n * step,
                y=y,
                width=step - 2,
                height=BAR_PX,
                rx=2,
                class_="fill" if n < bar.kept else "track",
            )
            for n in range(bar.total)
        ]
    track = element("rect", x=x, y=y, width=width, height=BAR_PX, rx=3, class_="track")
    return [
        track,
        element(
            "rect",
            x=x,
            y=y,
            width=width * bar.share,
            height=BAR_PX,
            rx=min(3.0, width * bar.share / 2),
            class_="fill",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of this file's first lines."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m vitrim.bench.report.picture RUN_FOLDER OUT.svg", file=sys.stderr)
        return 2
    try:
        out = write_picture(*arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: {wording.size(out.stat().st_size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
