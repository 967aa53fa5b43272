"""report.html: one file without script or request, built from escaped values; it reads on a phone
and on a desk, in light and in dark.
"""

from __future__ import annotations

import math
import re

from ..results.operator_table import OperatorTable
from . import estimates, wording
from .curves import draw, panels, phases
from .distribution import Strip, distributions
from .facts import environment_facts, run_facts
from .fronts import latency_points, size_points
from .kept import MOST_CELLS, Bar, Kept, kept_blocks
from .markup import Markup, element, joined
from .operators import bars, by_block, by_kind
from .overview import Change, Device, Overview, baseline_name, overview
from .plot import series_class
from .run import Run
from .scatter import scatter
from .style import page_style
from .table import NONE, Cell, Line, side_by_side, table

# From here on columns come closer, so that a desk's width holds eight.
MANY = 6
# Nothing may be loaded and no script may run, whatever a label holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_UNIT = re.compile(r"(?<=\d) (?=(?:[GMk]?B|[GMk]|ms|s|µs)\b|%)")
NARROW_PX = 330.0
HALF_PX = 480.0
FULL_PX = 1000.0


def render_html(run: Run, view: Overview | None = None) -> str:
    """The whole page; `view` saves deriving the figures again."""
    view = view or overview(run)
    body = element(
        "main",
        _head(run, view),
        _tables(view),
        _fronts(view),
        _latencies(view),
        _operators(view),
        _estimates(run),
        _kept(run),
        _curves(run),
        _parity(run),
        _environment(view),
        _warnings(run, view),
        _reproduce(run),
        element(
            "footer",
            "Made by vitrim. Every statistic on this page is derived from the raw samples in the run's measurement files.",
        ),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="vitrim"),
        element("title", f"{view.title}: {view.headline}"),
        element("style", Markup(page_style())),
    )
    return f"<!doctype html>\n{element('html', head, element('body', body), lang='en')}\n"


def _head(run: Run, view: Overview) -> Markup:
    said = [element("b", "vitrim"), element("span", view.title)]
    if run.report.created_at:
        said.append(element("span", run.report.created_at[:10]))
    lead = run.report.data
    if view.chosen:
        lead = f"Figures of {view.chosen}, against the {baseline_name(run)} on the same device." + (
            f" {lead}." if lead else ""
        )
    tiles = [_tile(change) for change in view.changes]
    return element(
        "header",
        element("div", *said, class_="eyebrow"),
        element("h1", *_headline(view.headline)),
        element("p", lead, class_="lead") if lead else None,
        element("ul", *tiles, class_="tiles") if tiles else None,
    )


def _headline(words: str) -> list[Markup]:
    # Each part stays on one line where the window is wide enough for it, and a number never leaves
    # its unit.
    parts = _UNIT.sub("\u00a0", words).split(", ")
    last = len(parts) - 1
    return [
        joined(element("span", part + ("" if number == last else ",")), " ")
        for number, part in enumerate(parts)
    ]


def _tile(change: Change) -> Markup:
    meter = None
    if change.share is not None:
        fill = element("i", style=f"width:{100 * min(1.0, change.share):.1f}%")
        meter = element(
            "div",
            fill,
            class_="meter",
            role="img",
            aria_label=f"{100 * change.share:.0f} percent of the baseline's",
        )
    return element(
        "li",
        element("span", change.name, class_="what"),
        element("span", change.after, class_="after"),
        element("span", f"from {change.before}", class_="before") if change.before else None,
        meter,
        element("span", change.remark, class_="remark"),
        class_="card tile",
    )


def _section(title: str, remark: str | None, *content: Markup | None, id_: str) -> Markup:
    return element(
        "section",
        element("h2", title, id=id_),
        element("p", remark, class_="soft") if remark else None,
        *content,
        aria_labelledby=id_,
    )


def _tables(view: Overview) -> Markup | None:
    tables = [_device_table(device, titled=len(view.devices) > 1) for device in view.devices]
    if not tables:
        return None
    first = view.devices[0]
    remark = f"Measured on {first.title}." if len(view.devices) == 1 and first.timed else None
    compared = any(row.speed_up for device in view.devices for row in device.rows)
    words = (
        "Speed-ups stand over their 95 % interval; the memory floor is the process with the runtime and no model."
        if compared
        else None
    )
    together = _side_by_side(view) if len(view.devices) > 1 else None
    return _section(
        "The figures",
        " ".join(part for part in (remark, words) if part),
        element("div", together, *tables, class_="stack"),
        id_="figures",
    )


def _device_table(device: Device, *, titled: bool) -> Markup:
    heads = [
        element(
            "th",
            element("span", class_=f"key {series_class(row.series)} shape{row.series % 4}"),
            _two_lines(row.label),
            scope="col",
            role="columnheader",
        )
        for row in device.rows
    ]
    return element(
        "div",
        element("h3", device.title) if titled else None,
        element("div", _grid(Markup("&nbsp;"), heads, table(device)), class_="scroll"),
        class_="card",
    )


def _grid(corner: str, heads: list[Markup], lines: list[Line]) -> Markup:
    """A table whose lines become blocks on a phone; the roles say that it is a table still."""
    body = [
        element(
            "tr",
            element("th", line.name, _small(line.remark), scope="row", role="rowheader"),
            *(_cell(cell) for cell in line.cells),
            role="row",
        )
        for line in lines
    ]
    return element(
        "table",
        element(
            "thead",
            element(
                "tr",
                element("th", corner, class_="corner", role="columnheader"),
                *heads,
                role="row",
            ),
            role="rowgroup",
        ),
        element("tbody", *body, role="rowgroup"),
        class_="figures many" if len(heads) > MANY else "figures",
        role="table",
        style=f"--n:{len(heads)}",
    )


def _small(remark: str) -> Markup | None:
    return element("small", _UNIT.sub("\u00a0", remark)) if remark else None


def _two_lines(label: str) -> Markup:
    model, space, rest = label.partition(" ")
    return joined(model, element("br"), rest) if space else joined(label)


def _cell(cell: Cell) -> Markup:
    if cell is NONE:
        return element("td", cell.figure, class_="none", role="cell")
    return element(
        "td", cell.figure, _small(cell.remark), class_="best" if cell.best else None, role="cell"
    )


def _side_by_side(view: Overview) -> Markup:
    heads = [
        element(
            "th", device.name, element("small", device.setting), scope="col", role="columnheader"
        )
        for device in view.devices
    ]
    inside = _grid("p50", heads, side_by_side(view.devices))
    return element(
        "div",
        element("h3", "Devices side by side"),
        element("div", inside, class_="scroll"),
        class_="card",
    )


def _real(view: Overview) -> list[Device]:
    """The devices whose times are their own: no picture shows emulated time."""
    return [device for device in view.devices if not device.emulated]


def _fronts(view: Overview) -> Markup | None:
    figures: list[Markup] = []
    devices = _real(view)
    for number, device in enumerate(devices):
        place = f", {device.title}" if len(devices) > 1 else ""
        pictures = [(latency_points(device.rows), "latency", "p50 latency, ms")]
        if number == 0:
            # A file is as large on every device.
            pictures.append((size_points(device.rows), "size", "files, MB"))
        for points, against, cost_title in pictures:
            if not points:
                continue
            label = f"Top-1 against {against}{place}: " + "; ".join(
                f"{point.label} {point.hint}" for point in points
            )
            wide = scatter(
                points,
                cost_title=cost_title,
                label=label,
                width=HALF_PX,
                height=300,
                class_="plot wide",
            )
            narrow = scatter(
                points,
                cost_title=cost_title,
                label=label,
                width=NARROW_PX,
                height=270,
                class_="plot narrow",
            )
            figures.append(
                element(
                    "figure",
                    element("h3", f"Accuracy against {against}{place}"),
                    wide,
                    narrow,
                    class_="card",
                )
            )
    if not figures:
        return _section(
            "Accuracy and cost", "Not shown: no artifact has both a top-1 and a cost.", id_="fronts"
        )
    whiskers = any(row.top1_interval for device in view.devices for row in device.rows)
    several = any(len(device.rows) > 1 for device in _real(view))
    remark = (
        "The dotted line is the front: nothing measured lies above and left of it. "
        if several
        else ""
    )
    remark += (
        "Whiskers are the 95 % interval that the number of test images allows." if whiskers else ""
    )
    return _section(
        "Accuracy and cost", remark, element("div", *figures, class_="grid2"), id_="fronts"
    )


def _latencies(view: Overview) -> Markup | None:
    figures = []
    for device in _real(view):
        strips = [
            Strip(row.label, row.series, row.measurement.latency_s)
            for row in device.timed
            if row.measurement
        ]
        if not strips:
            continue
        told = "; ".join(
            f"{row.label} p50 {wording.duration(row.summary.p50_s)}, p99 {wording.duration(row.summary.p99_s)}"
            for row in device.timed
            if row.summary
        )
        label = f"Latency distributions on {device.title}: {told}"
        pictures = [
            distributions(strips, label=label, width=width, class_=f"plot {name}")
            for name, width in (("wide", FULL_PX), ("narrow", NARROW_PX))
        ]
        figures.append(
            element(
                "figure",
                element("h3", device.title) if len(_real(view)) > 1 else None,
                *pictures,
                class_="card",
            )
        )
    if not figures:
        return _section(
            "Latency distributions",
            "Not shown: no artifact of this run was measured.",
            id_="latency",
        )
    remark = "Bars reach the median; the shapes are all samples, smoothed; the short strokes are p90 and p99."
    return _section(
        "Latency distributions", remark, element("div", *figures, class_="stack"), id_="latency"
    )


def _operators(view: Overview) -> Markup | None:
    figures = []
    for device in _real(view):
        for row in device.timed:
            if row.measurement is None or not row.measurement.operators:
                continue
            profile = OperatorTable(row.measurement.operators)
            place = f", {device.title}" if len(_real(view)) > 1 else ""
            drawn = []
            for head, parts in (
                ("by kind of operator", by_kind(profile)),
                ("by block", by_block(profile)),
            ):
                if parts:
                    label = f"{row.label}{place}, {head}"
                    wide = bars(parts, label=label, width=HALF_PX, class_="plot wide")
                    drawn += [
                        element("p", head.capitalize(), class_="soft"),
                        wide,
                        bars(parts, label=label, width=NARROW_PX, class_="plot narrow"),
                    ]
            figures.append(
                element("figure", element("h3", f"{row.label}{place}"), *drawn, class_="card")
            )
    if not figures:
        return None
    remark = "As the runtime's own profiler told; it costs time itself, so shares are to be trusted more than times."
    return _section(
        "Where the time goes", remark, element("div", *figures, class_="grid2"), id_="operators"
    )


def _estimates(run: Run) -> Markup | None:
    entries = run.report.estimates
    if not entries:
        return None
    heads = [
        element("th", _two_lines(label), scope="col", role="columnheader")
        for label in estimates.columns(entries)
    ]
    inside = element(
        "div", _grid(Markup("&nbsp;"), heads, estimates.lines(entries)), class_="scroll"
    )
    notes = element(
        "div",
        *(element("p", bar, class_="soft") for bar in estimates.bars(entries)),
        class_="notes",
    )
    return _section(
        estimates.HEADING,
        estimates.WARNING,
        element("div", inside, class_="card estimates"),
        notes,
        id_="estimates",
    )


def _kept(run: Run) -> Markup | None:
    if not run.kept:
        return None
    kept = kept_blocks(run.kept)
    rows = [
        _kept_row("all blocks", kept.totals, kept, total=True),
        *(_kept_row(block.name, block.bars, kept) for block in kept.blocks),
    ]
    stream = None
    if kept.embed:
        words = f"The residual stream (embed) keeps {kept.embed.kept} of {kept.embed.total} channels, the same ones in every block."
        stream = element(
            "div",
            element("p", words, class_="soft", style="margin:0 0 4px"),
            _track(kept.embed),
            class_="card kept",
            style="margin-bottom:12px",
        )
    remark = "Filled is kept, pale is gone. Widths of q·k and v are those of one head."
    content = element(
        "div",
        element("ul", *rows, class_="blocks", style=f"--n:{max(1, len(kept.columns))}"),
        class_="card",
    )
    return _section("What was kept in every block", remark, stream, content, id_="kept")


def _kept_row(name: str, bars: tuple[Bar, ...], kept: Kept, *, total: bool = False) -> Markup:
    known = {bar.dimension: bar for bar in bars}
    cells = []
    for column in kept.columns:
        bar = known.get(column)
        if bar is None:
            cells.append(element("div", class_="kept"))
            continue
        if total:
            figure = joined(wording.share_of(bar.kept, bar.total))
        else:
            figure = (
                joined(bar.word)
                if bar.word
                else joined(str(bar.kept), element("span", f" of {bar.total}"))
            )
        say = element("div", element("span", bar.name), element("b", figure), class_="say")
        cells.append(
            element(
                "div",
                say,
                _track(bar, whole=total),
                class_="kept",
                data_dimension=bar.dimension,
                data_kept=bar.kept,
                data_total=bar.total,
            )
        )
    return element(
        "li", element("div", name, class_="name"), *cells, class_="block all" if total else "block"
    )


def _track(bar: Bar, *, whole: bool = False) -> Markup:
    label = f"{bar.name}: {bar.word or f'{bar.kept} of {bar.total} kept'}"
    if bar.word:
        return element("div", class_="track gone", role="img", aria_label=label)
    if bar.dimension == "head" and not whole and bar.total <= MOST_CELLS:
        cells = [
            element("i", class_="on" if number < bar.kept else None) for number in range(bar.total)
        ]
        return element("div", *cells, class_="track cells", role="img", aria_label=label)
    return element(
        "div",
        element("i", style=f"width:{100 * bar.share:.2f}%"),
        class_="track",
        role="img",
        aria_label=label,
    )


def _curves(run: Run) -> Markup | None:
    if not run.history:
        return None
    dense = run.report.models[baseline_name(run)]
    spans = phases(run.history)
    figures = []
    for panel in panels(run.history, dense.params, dense.macs):
        keys = [
            element(
                "span",
                element(
                    "i",
                    class_=f"stroke {series_class(curve.series)}"
                    + (" dashed" if curve.dashed else ""),
                ),
                curve.name,
            )
            for curve in panel.curves
        ]
        title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
        figures.append(
            element(
                "figure",
                element("h3", title),
                element("div", *keys, class_="legend") if len(keys) > 1 else None,
                draw(panel, spans, width=HALF_PX, height=250, class_="plot wide"),
                draw(panel, spans, width=NARROW_PX, height=220, class_="plot narrow"),
                class_="card",
            )
        )
    remark = f"{wording.plural(len(run.history), 'epoch')} on the horizontal axis"
    seconds = sum(epoch.seconds or 0.0 for epoch in run.history)
    remark += f", {wording.long_duration(seconds)} in all." if seconds else "."
    return _section("Training", remark, element("div", *figures, class_="grid2"), id_="training")


def _parity(run: Run) -> Markup | None:
    if not run.report.parity:
        return None
    lines = [
        element(
            "tr",
            element("th", stage, scope="row"),
            element("td", _log_bar(error)),
            element("td", wording.relative_error(error)),
        )
        for stage, error in run.report.parity.items()
    ]
    inside = element("table", element("tbody", *lines), class_="parity")
    remark = "The largest relative difference that each stage made to the outputs. The bar is logarithmic: empty at 10⁻⁸, full at 1."
    return _section(
        "Parity",
        remark,
        element("div", element("div", inside, class_="scroll"), class_="card"),
        id_="parity",
    )


def _log_bar(error: float | None) -> Markup:
    share = (
        0.0
        if not error or not math.isfinite(error)
        else min(1.0, max(0.0, 1 + math.log10(error) / 8))
    )
    return element(
        "div", element("i", style=f"width:{100 * share:.1f}%"), class_="log", aria_hidden="true"
    )


def _environment(view: Overview) -> Markup | None:
    cards = []
    for device in view.devices:
        facts = environment_facts(device)
        if facts:
            cards.append(
                element(
                    "div",
                    element("h3", device.title) if len(view.devices) > 1 else None,
                    _facts(facts),
                    class_="card",
                )
            )
    if not cards:
        return None
    return _section("Environment", None, element("div", *cards, class_="stack"), id_="environment")


def _facts(facts: list[tuple[str, str]]) -> Markup:
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts)
    )


def _warnings(run: Run, view: Overview) -> Markup | None:
    lines = [element("li", warning) for warning in view.warnings] + [
        element("li", note, class_="note") for note in run.missing
    ]
    return (
        _section("Read with care", None, element("ul", *lines, class_="warnings"), id_="warnings")
        if lines
        else None
    )


def _reproduce(run: Run) -> Markup | None:
    facts = run_facts(run)
    command = run.report.command or (
        f"vitrim run {run.report.recipe}" if run.report.recipe else None
    )
    command = command or ("vitrim run recipe.toml" if run.recipe_toml else None)
    if not command and not facts:
        return None
    return _section(
        "How to make it again",
        None,
        element(
            "div",
            element("pre", command, tabindex="0") if command else None,
            _facts(facts) if facts else None,
            element(
                "details",
                element("summary", "The recipe, every value written out"),
                element("pre", run.recipe_toml),
            )
            if run.recipe_toml
            else None,
            class_="card",
        ),
        id_="reproduce",
    )
