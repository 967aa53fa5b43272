"""The plots of report.html; each is drawn twice, for wide and for narrow windows."""

from __future__ import annotations

from ..results.operator_table import OperatorTable
from . import wording
from .curves import Panel, Phase, draw, panels, phases
from .distribution import Strip, distributions
from .kept import MOST_CELLS, Bar, Kept, kept_blocks
from .markup import Markup, element, joined, section
from .operators import bars, by_block, by_kind
from .overview import Device, Overview, Row, baseline_name
from .plot import series_class
from .run import Run
from .scatter import Point, latency_points, scatter, size_points

NARROW_PX = 330.0
HALF_PX = 480.0
FULL_PX = 1000.0


def fronts_section(view: Overview) -> Markup | None:
    """Accuracy against latency on each device, and against the size of the files."""
    devices = _real(view)
    figures: list[Markup | None] = []
    for number, device in enumerate(devices):
        place = _place(device, devices)
        points = latency_points(device.rows)
        figures.append(_front(points, f"latency{place}", "p50 latency, ms"))
        if number == 0:
            # Files have the same size on every device.
            points = size_points(device.rows)
            figures.append(_front(points, f"size{place}", "files, MB"))
    shown = [figure for figure in figures if figure is not None]
    if not shown:
        reason = "Not shown: no artifact has both a top-1 and a cost."
        return section("Accuracy and cost", reason, id_="fronts")
    sentences = []
    if any(len(device.rows) > 1 for device in devices):
        sentences.append(
            "The dotted line is the Pareto front: no artifact is above and left of it."
        )
    if any(row.top1_interval for device in view.devices for row in device.rows):
        sentences.append("Whiskers are the 95 % interval for the number of test images.")
    grid = element("div", *shown, class_="grid2")
    return section("Accuracy and cost", " ".join(sentences), grid, id_="fronts")


def _front(points: list[Point], cost: str, cost_title: str) -> Markup | None:
    if not points:
        return None
    hints = "; ".join(f"{point.label} {point.hint}" for point in points)
    label = f"Top-1 against {cost}: {hints}"
    plots = [
        scatter(
            points,
            cost_title=cost_title,
            label=label,
            width=width,
            height=height,
            class_=f"plot {name}",
        )
        for name, width, height in (("wide", HALF_PX, 300), ("narrow", NARROW_PX, 270))
    ]
    return element("figure", element("h3", f"Accuracy against {cost}"), *plots, class_="card")


def latency_section(view: Overview) -> Markup | None:
    """The latency distributions on each device."""
    devices = _real(view)
    figures = [_distribution(device, titled=len(devices) > 1) for device in devices if device.timed]
    if not figures:
        reason = "Not shown: no artifact of this run was measured."
        return section("Latency distributions", reason, id_="latency")
    remark = (
        "The bar ends at the median. The curve is the density of all samples, and the short lines "
        "are p90 and p99."
    )
    stack = element("div", *figures, class_="stack")
    return section("Latency distributions", remark, stack, id_="latency")


def _distribution(device: Device, *, titled: bool) -> Markup:
    strips = [
        Strip(row.label, row.series, row.measurement.latency_s)
        for row in device.timed
        if row.measurement
    ]
    quantiles = [
        f"{row.label} p50 {wording.duration(row.summary.p50_s)}, "
        f"p99 {wording.duration(row.summary.p99_s)}"
        for row in device.timed
        if row.summary
    ]
    label = f"Latency distributions on {device.title}: {'; '.join(quantiles)}"
    plots = [
        distributions(strips, label=label, width=width, class_=f"plot {name}")
        for name, width in (("wide", FULL_PX), ("narrow", NARROW_PX))
    ]
    title = element("h3", device.title) if titled else None
    return element("figure", title, *plots, class_="card")


def operators_section(view: Overview) -> Markup | None:
    """The profile of every artifact that was profiled."""
    devices = _real(view)
    figures = [
        _profile(row, OperatorTable(row.measurement.operators), _place(device, devices))
        for device in devices
        for row in device.timed
        if row.measurement is not None and row.measurement.operators
    ]
    if not figures:
        return None
    remark = (
        "From the runtime's profiler, which takes time itself: shares are more reliable than times."
    )
    grid = element("div", *figures, class_="grid2")
    return section("Time by operator", remark, grid, id_="operators")


def _profile(row: Row, profile: OperatorTable, place: str) -> Markup:
    drawn: list[Markup] = []
    for head, parts in (("by kind of operator", by_kind(profile)), ("by block", by_block(profile))):
        if parts:
            label = f"{row.label}{place}, {head}"
            drawn.append(element("p", head.capitalize(), class_="soft"))
            for name, width in (("wide", HALF_PX), ("narrow", NARROW_PX)):
                drawn.append(bars(parts, label=label, width=width, class_=f"plot {name}"))
    return element("figure", element("h3", f"{row.label}{place}"), *drawn, class_="card")


def kept_section(run: Run) -> Markup | None:
    """The kept units of every block."""
    if not run.kept:
        return None
    kept = kept_blocks(run.kept)
    rows = [_kept_row("all blocks", kept.totals, kept, total=True)]
    rows += [_kept_row(block.name, block.bars, kept) for block in kept.blocks]
    stream = None
    if kept.embed:
        stream = element(
            "div",
            element("p", kept.stream_text, class_="soft", style="margin:0 0 4px"),
            _track(kept.embed),
            class_="card kept",
            style="margin-bottom:12px",
        )
    remark = "The filled part is kept. The widths of q·k and v are those of one head."
    columns = max(1, len(kept.columns))
    blocks = element("ul", *rows, class_="blocks", style=f"--n:{columns}")
    card = element("div", blocks, class_="card")
    return section("Kept units per block", remark, stream, card, id_="kept")


def _kept_row(name: str, bars: tuple[Bar, ...], kept: Kept, *, total: bool = False) -> Markup:
    known = {bar.dimension: bar for bar in bars}
    cells = [
        _kept_cell(known[column], total) if column in known else element("div", class_="kept")
        for column in kept.columns
    ]
    head = element("div", name, class_="name")
    return element("li", head, *cells, class_="block all" if total else "block")


def _kept_cell(bar: Bar, total: bool) -> Markup:
    if total:
        figure = joined(wording.share_of(bar.kept, bar.total))
    elif bar.word:
        figure = joined(bar.word)
    else:
        figure = joined(str(bar.kept), element("span", f" of {bar.total}"))
    caption = element("div", element("span", bar.name), element("b", figure), class_="caption")
    return element(
        "div",
        caption,
        _track(bar, whole=total),
        class_="kept",
        data_dimension=bar.dimension,
        data_kept=bar.kept,
        data_total=bar.total,
    )


def _track(bar: Bar, *, whole: bool = False) -> Markup:
    if bar.word:
        return element("div", class_="track gone", role="img", aria_label=bar.label)
    if bar.dimension == "head" and not whole and bar.total <= MOST_CELLS:
        numbers = range(bar.total)
        cells = [element("i", class_="on" if number < bar.kept else None) for number in numbers]
        return element("div", *cells, class_="track cells", role="img", aria_label=bar.label)
    fill = element("i", style=f"width:{100 * bar.share:.2f}%")
    return element("div", fill, class_="track", role="img", aria_label=bar.label)


def curves_section(run: Run) -> Markup | None:
    """The training curves."""
    if not run.history:
        return None
    dense = run.report.models[baseline_name(run)]
    spans = phases(run.history)
    figures = [_panel(one, spans) for one in panels(run.history, dense.params, dense.macs)]
    remark = f"{wording.plural(len(run.history), 'epoch')} on the horizontal axis"
    seconds = sum(epoch.seconds or 0.0 for epoch in run.history)
    remark += f", {wording.long_duration(seconds)} in total." if seconds else "."
    return section("Training", remark, element("div", *figures, class_="grid2"), id_="training")


def _panel(panel: Panel, spans: list[Phase]) -> Markup:
    keys = []
    for curve in panel.curves:
        style = f"stroke {series_class(curve.series)}" + (" dashed" if curve.dashed else "")
        keys.append(element("span", element("i", class_=style), curve.name))
    title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
    return element(
        "figure",
        element("h3", title),
        element("div", *keys, class_="legend") if len(keys) > 1 else None,
        draw(panel, spans, width=HALF_PX, height=250, class_="plot wide"),
        draw(panel, spans, width=NARROW_PX, height=220, class_="plot narrow"),
        class_="card",
    )


def _real(view: Overview) -> list[Device]:
    """The devices that are not emulated: no plot shows emulated time."""
    return [device for device in view.devices if not device.emulated]


def _place(device: Device, devices: list[Device]) -> str:
    return f", {device.title}" if len(devices) > 1 else ""
