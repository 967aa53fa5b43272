"""The tables of report.html: figures, estimates, parity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import buckets, cut, estimates, wording
from .markup import Markup, element, joined, keep_units, section
from .overview import Device, Overview
from .plot import series_class
from .run import Run
from .table import NONE, Cell, Line, side_by_side, table

# Tables with more columns are narrower, so that eight of them fit on a desktop.
MANY = 6
CORNER = Markup("&nbsp;")
# Relative errors below this are an empty bar; 1 is a full one.
SMALLEST_ERROR = 1e-8


def figures_section(view: Overview) -> Markup | None:
    """A table of all figures for each device, and one that compares the devices."""
    several = len(view.devices) > 1
    tables = [_device_table(device, titled=several) for device in view.devices]
    if not tables:
        return None
    sentences = []
    if not several and view.devices[0].timed:
        sentences.append(f"Measured on {view.devices[0].title}.")
    if any(row.speed_up for device in view.devices for row in device.rows):
        sentences.append(
            "Below each speed-up is its 95 % interval. The memory floor is that of a process with "
            "the runtime and without a model."
        )
    compared = _side_by_side(view) if several else None
    stack = element("div", compared, *tables, class_="stack")
    return section("Measurements", " ".join(sentences), stack, id_="figures")


def _device_table(device: Device, *, titled: bool) -> Markup:
    heads = []
    for row in device.rows:
        key = element("span", class_=f"key {series_class(row.series)} shape{row.series % 4}")
        heads.append(_head(key, _two_lines(row.label)))
    grid = element("div", _grid(CORNER, heads, table(device)), class_="scroll")
    return element("div", element("h3", device.title) if titled else None, grid, class_="card")


def _side_by_side(view: Overview) -> Markup:
    heads = [_head(device.name, element("small", device.setting)) for device in view.devices]
    grid = element("div", _grid("p50", heads, side_by_side(view.devices)), class_="scroll")
    return element("div", element("h3", "Devices side by side"), grid, class_="card")


def buckets_section(view: Overview) -> Markup | None:
    """The buckets of artifacts whose images keep different numbers of patches."""
    if not view.buckets:
        return None
    cards = []
    for each in view.buckets:
        grid = _grid(CORNER, [_head(name) for name in buckets.COLUMNS], buckets.lines(each))
        text = element("p", buckets.remark(each), class_="soft")
        table_of = element("div", grid, class_="scroll")
        cards.append(element("div", element("h3", each.name), text, table_of, class_="card"))
    return section(buckets.HEADING, None, element("div", *cards, class_="stack"), id_="buckets")


def estimates_section(run: Run) -> Markup | None:
    """Estimates for devices that were not measured."""
    entries = run.report.estimates
    if not entries:
        return None
    heads = [_head(_two_lines(label)) for label in estimates.columns(entries)]
    grid = element("div", _grid(CORNER, heads, estimates.lines(entries)), class_="scroll")
    notes = [element("p", text, class_="soft") for text in estimates.error_bars(entries)]
    return section(
        estimates.HEADING,
        estimates.WARNING,
        element("div", grid, class_="card estimates"),
        element("div", *notes, class_="notes"),
        id_="estimates",
    )


def parity_section(run: Run) -> Markup | None:
    """The relative error of every stage of the export."""
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
    remark = (
        "The largest relative error of the outputs after each stage. The bar is logarithmic: empty "
        "at 10⁻⁸, full at 1."
    )
    card = element("div", element("div", inside, class_="scroll"), class_="card")
    return section("Parity", remark, card, id_="parity")


def cut_section(run: Run) -> Markup | None:
    """The predicted and measured error of every sub-layer of a cut without training."""
    errors = run.report.cut
    if errors is None:
        return None
    card = _card(cut.COLUMNS, cut.lines(errors))
    return section(cut.HEADING, cut.REMARK, card, id_="cut")


def latency_budget_section(run: Run) -> Markup | None:
    """The latency budget of a cut: table, prediction and measurement of every round."""
    budget = run.report.latency
    if budget is None:
        return None
    card = _card(cut.latency_columns(budget), cut.latency_lines(budget))
    return section(cut.LATENCY_HEADING, cut.latency_remark(budget), card, id_="latency-budget")


def zeros_section(run: Run) -> Markup | None:
    """The zeros of every sub-layer, and what they make dead."""
    zeros = run.report.zeros
    if zeros is None:
        return None
    card = _card(cut.ZEROS_COLUMNS, cut.zeros_lines(zeros))
    return section(cut.ZEROS_HEADING, cut.zeros_remark(zeros), card, id_="zeros")


def _card(columns: Sequence[str], lines: list[Line]) -> Markup:
    """A card with a table of these columns."""
    grid = _grid(CORNER, [_head(name) for name in columns], lines)
    return element("div", element("div", grid, class_="scroll"), class_="card")


def _log_bar(error: float | None) -> Markup:
    share = 0.0
    if error and math.isfinite(error):
        share = min(1.0, max(0.0, 1 - math.log10(error) / math.log10(SMALLEST_ERROR)))
    fill = element("i", style=f"width:{100 * share:.1f}%")
    return element("div", fill, class_="log", aria_hidden="true")


def _head(*children: str | Markup) -> Markup:
    return element("th", *children, scope="col", role="columnheader")


def _grid(corner: str, heads: list[Markup], lines: list[Line]) -> Markup:
    """A table whose lines become blocks on a phone; for screen readers it remains a table."""
    first = element("th", corner, class_="corner", role="columnheader")
    head = element("thead", element("tr", first, *heads, role="row"), role="rowgroup")
    rows = []
    for line in lines:
        name = element("th", line.name, _small(line.remark), scope="row", role="rowheader")
        rows.append(element("tr", name, *map(_cell, line.cells), role="row"))
    return element(
        "table",
        head,
        element("tbody", *rows, role="rowgroup"),
        class_="figures many" if len(heads) > MANY else "figures",
        role="table",
        style=f"--n:{len(heads)}",
    )


def _cell(cell: Cell) -> Markup:
    if cell is NONE:
        return element("td", cell.figure, class_="none", role="cell")
    best = "best" if cell.best else None
    return element("td", cell.figure, _small(cell.remark), class_=best, role="cell")


def _small(remark: str) -> Markup | None:
    return element("small", keep_units(remark)) if remark else None


def _two_lines(label: str) -> Markup:
    model, space, rest = label.partition(" ")
    return joined(model, element("br"), rest) if space else joined(label)
