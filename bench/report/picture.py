"""One SVG of a run for a README: kept units per block, and accuracy against latency.

python -m vitrim.bench.report.picture RUN_FOLDER OUT.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_file, require_output_file
from . import wording
from .kept import MOST_CELLS, Bar, Kept, kept_blocks
from .markup import Markup, element, joined
from .overview import Device, Overview, overview
from .plot import bar as draw_bar
from .plot import sheet, shortened, text_at, text_width
from .run import Run, load_run
from .scatter import Point, latency_points, scatter
from .writing import PICTURE

WIDTH_PX = 960.0
MIN_HEIGHT_PX = 380.0
MARGIN_PX = 30.0
HEAD_PX = 112.0
ROW_PX = 27.0
MAX_ROW_PX = 40.0
BAR_PX = 13.0
NAMES_PX = 66.0
GAP_PX = 16.0
SCATTER_PX = 350.0
HEADLINE_PX = 27.0
_SHORT = {"head": "heads", "qk": "q·k", "ffn": "FFN"}
_STYLE = (
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .headline{font-size:27px;font-weight:700;letter-spacing:-.02em}"
    ".plot .under{font-size:14px;fill:var(--soft)}"
    ".plot .title{font-size:14px;font-weight:650}"
    ".plot .track{fill:var(--track)}"
    ".plot .fill{fill:var(--accent)}"
    ".plot .figure{font-size:11.5px;fill:var(--soft)}"
    ".plot .figure .is{fill:var(--ink);font-weight:600}"
)


def write_picture(run_folder: Path | str, out: Path | str) -> Path:
    """Write the SVG of a run folder, in the colours of the viewer's light or dark theme.

    Raises:
        InputError: `out` is no .svg, exists and is another picture, or the run has neither
            kept.json nor a measured artifact with a top-1.
    """
    out = Path(out)
    if out.suffix != ".svg":
        raise InputError(f"{out}: the picture is an SVG; name a file that ends in .svg")
    require_output_file(out, PICTURE, overwrite=True)
    replace_file(out, render_picture(load_run(run_folder), where=str(run_folder)), PICTURE)
    return out


def render_picture(run: Run, *, where: str = "the run") -> str:
    """The SVG as text; `where` names the run in the error line."""
    view = overview(run)
    device = next((device for device in view.devices if not device.emulated and device.timed), None)
    points = latency_points(device.rows) if device else []
    kept = kept_blocks(run.kept) if run.kept else None
    if kept is None and not points:
        raise InputError(
            f"{where}: nothing to draw: no kept.json, and no measured artifact with a top-1; "
            "finish the run first"
        )
    rows = len(kept.blocks) + (1 if kept.embed else 0) if kept else 0
    height = max(MIN_HEIGHT_PX, HEAD_PX + 92 + rows * ROW_PX)
    parts: list[Markup] = []
    inner = WIDTH_PX - 2 * MARGIN_PX
    if kept:
        width = inner - SCATTER_PX - MARGIN_PX if points else inner
        parts.append(_kept(kept, width, height - HEAD_PX - MARGIN_PX))
    if points:
        parts += _scatter(points, SCATTER_PX if kept else inner, height)
    title = f"{view.title}: {view.headline}"
    picture = sheet(WIDTH_PX, height, title, _STYLE, *_head(view, device), *parts)
    return f"{picture}\n"


def _head(view: Overview, device: Device | None) -> list[Markup]:
    fitting = (WIDTH_PX - 2 * MARGIN_PX) / text_width(view.headline, HEADLINE_PX)
    size = HEADLINE_PX * min(1.0, fitting)
    under = view.title
    if view.chosen:
        under += f": {view.chosen} compared with the dense baseline"
    if device:
        under += f", on {device.title}"
    style = f"font-size:{size:.1f}px"
    return [
        text_at(MARGIN_PX, 48, view.headline, class_="headline", style=style),
        text_at(MARGIN_PX, 73, shortened(under, 110), class_="under"),
    ]


def _scatter(points: list[Point], width: float, height: float) -> list[Markup]:
    hints = "; ".join(f"{point.label} {point.hint}" for point in points)
    drawn = scatter(
        points,
        cost_title="p50 latency, ms",
        label=f"Top-1 against latency: {hints}",
        width=width,
        height=height - HEAD_PX - 46,
    )
    left = WIDTH_PX - MARGIN_PX - width
    title = text_at(left, HEAD_PX + 4, "Accuracy against latency", class_="title")
    return [title, element("g", drawn, transform=f"translate({left:g} {HEAD_PX + 16:g})")]


def _kept(kept: Kept, width: float, height: float) -> Markup:
    columns = [
        column
        for column in kept.columns
        if any(bar.dimension == column for block in kept.blocks for bar in block.bars)
    ]
    each = (width - NAMES_PX - GAP_PX * (len(columns) - 1)) / max(1, len(columns))
    starts = {
        column: MARGIN_PX + NAMES_PX + number * (each + GAP_PX)
        for number, column in enumerate(columns)
    }
    totals = {column: _totals(kept, column) for column in columns}
    parts = [text_at(MARGIN_PX, HEAD_PX + 4, "Kept units per block", class_="title")]
    y = HEAD_PX + 26
    if kept.embed:
        stream = text_at(MARGIN_PX, y + 13, "stream", class_="name")
        parts += [stream, _bar(kept.embed, MARGIN_PX + NAMES_PX, y, width - NAMES_PX, total=True)]
        y += ROW_PX + 8
    for column, x in starts.items():
        # A total that is equal in all blocks is shown once, above the column.
        of = f", of {next(iter(totals[column]))}" if len(totals[column]) == 1 else ""
        parts.append(text_at(x, y + 8, _SHORT.get(column, column) + of, class_="tick"))
    y += 20
    step = min(MAX_ROW_PX, (HEAD_PX + height - y) / len(kept.blocks))
    for block in kept.blocks:
        parts.append(text_at(MARGIN_PX, y + 13, shortened(block.name, 9), class_="name"))
        for bar in block.bars:
            several = len(totals[bar.dimension]) > 1
            parts.append(_bar(bar, starts[bar.dimension], y, each, total=several))
        y += step
    return joined(*parts)


def _totals(kept: Kept, column: str) -> set[int]:
    bars = [bar for block in kept.blocks for bar in block.bars]
    return {bar.total for bar in bars if bar.dimension == column and bar.total}


def _bar(bar: Bar, x: float, y: float, width: float, *, total: bool) -> Markup:
    hint = element("title", bar.label)
    if bar.word:
        return element("g", hint, text_at(x, y + 13, bar.word, class_="tick"))
    of = f" of {bar.total}" if total else ""
    figures = joined(
        element("tspan", str(bar.kept), class_="is"), element("tspan", of) if of else None
    )
    figure = element("text", figures, x=x + width, y=y + 13, text_anchor="end", class_="figure")
    space = text_width(f"{bar.total}{of}") + 6
    return element("g", hint, figure, *_track(bar, x, y + 2, width - space))


def _track(bar: Bar, x: float, y: float, width: float) -> list[Markup]:
    if bar.dimension == "head" and 0 < bar.total <= MOST_CELLS:
        step = (width + 2) / bar.total
        classes = ["fill" if n < bar.kept else "track" for n in range(bar.total)]
        return [
            draw_bar(x + number * step, y, step - 2, BAR_PX, class_=class_)
            for number, class_ in enumerate(classes)
        ]
    filled = width * bar.share
    return [
        draw_bar(x, y, width, BAR_PX, rx=3, class_="track"),
        draw_bar(x, y, filled, BAR_PX, rx=min(3.0, filled / 2), class_="fill"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in this module's docstring and return its exit code."""
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
