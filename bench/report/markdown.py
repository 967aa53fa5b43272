"""report.md: the figures of the page, for a terminal, a pull request or a diff."""

from __future__ import annotations

import re

from ..results.operator_table import OperatorTable
from . import buckets, cut, estimates, waterfall, wording
from .facts import environment_facts, run_facts
from .kept import Bar, kept_blocks
from .operators import by_kind
from .overview import Device, Overview, Row, overview
from .run import Run
from .table import Cell, Line, side_by_side, table

# Identifies the file, so that no other report.md is replaced.
WRITTEN_BY_VITRIM = "<!-- Written by vitrim. -->"
_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")


def render_markdown(run: Run, view: Overview | None = None) -> str:
    """The whole file; `view` avoids computing the figures again."""
    view = view or overview(run)
    parts = [f"# {safe(view.title)}", f"**{safe(view.headline)}**"]
    if run.report.data:
        parts.append(safe(run.report.data))
    parts += _figures(view)
    parts += _buckets(view)
    parts += _operators(view)
    parts += _estimates(run)
    if run.kept:
        parts += ["## Kept units per block", *_kept(run)]
    if run.report.cut is not None:
        grid = _grid(["sub-layer", *cut.COLUMNS], cut.lines(run.report.cut))
        parts += [f"## {cut.HEADING}", cut.REMARK, grid]
    if run.report.latency is not None:
        budget = run.report.latency
        grid = _grid(["", *cut.latency_columns(budget)], cut.latency_lines(budget))
        parts += [f"## {cut.LATENCY_HEADING}", safe(cut.latency_remark(budget)), grid]
    if run.waterfall is not None:
        steps = waterfall.cells(run.waterfall)
        rows = [Line(name, tuple(map(Cell, rest))) for name, *rest in steps]
        heading, machine = f"## {waterfall.HEADING}", safe(run.waterfall.machine)
        parts += [heading, waterfall.REMARK, machine, _grid(list(waterfall.COLUMNS), rows)]
    if run.report.zeros is not None:
        zeros = run.report.zeros
        grid = _grid(["sub-layer", *cut.ZEROS_COLUMNS], cut.zeros_lines(zeros))
        parts += [f"## {cut.ZEROS_HEADING}", safe(cut.zeros_remark(zeros)), grid]
    parts += _parity(run)
    for device in view.devices:
        parts += _environment(device)
    notes = [*view.warnings, *run.missing]
    if notes:
        parts += ["## Warnings", _items([safe(note) for note in notes])]
    items = [f"{name}: {safe(value)}" for name, value in run_facts(run)]
    if run.report.command:
        items.append(f"Command: {code(run.report.command)}")
    if items:
        parts += ["## How to reproduce", _items(items)]
    return "\n\n".join([*parts, WRITTEN_BY_VITRIM]) + "\n"


def safe(text: str) -> str:
    """Escape a text for Markdown and the HTML in it, and put it on one line."""
    flat = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """A code span that no back-tick in the text ends."""
    flat = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {flat} {fence}" if longest else f"`{flat}`"


def _figures(view: Overview) -> list[str]:
    parts = []
    if len(view.devices) > 1:
        heads = ["p50", *(device.title for device in view.devices)]
        parts += ["## Devices side by side", _grid(heads, side_by_side(view.devices))]
    for device in view.devices:
        heads = ["", *(row.label for row in device.rows)]
        parts += [f"## {safe(device.title)}", _grid(heads, table(device))]
    return parts


def _buckets(view: Overview) -> list[str]:
    parts = []
    for found in view.buckets:
        grid = _grid(["", *buckets.COLUMNS], buckets.lines(found))
        parts += [f"## {buckets.HEADING}: {safe(found.name)}", safe(buckets.remark(found)), grid]
    return parts


def _operators(view: Overview) -> list[str]:
    parts = []
    for device in view.devices:
        for row in device.timed:
            if not device.emulated and row.measurement and row.measurement.operators:
                profile = OperatorTable(row.measurement.operators)
                parts += _profile(row, device, profile)
    return parts


def _profile(row: Row, device: Device, profile: OperatorTable) -> list[str]:
    lines = []
    for part in by_kind(profile):
        share = wording.percent(profile.share(part.seconds))
        figures = (str(part.nodes), wording.duration(part.seconds), share)
        lines.append(Line(part.name, tuple(map(Cell, figures))))
    title = f"## Time by operator: {safe(row.label)}, {safe(device.title)}"
    return [title, _grid(["operator", "nodes", "time", "share"], lines)]


def _estimates(run: Run) -> list[str]:
    entries = run.report.estimates
    if not entries:
        return []
    grid = _grid(["device", *estimates.columns(entries)], estimates.lines(entries))
    bars = [safe(bar) for bar in estimates.error_bars(entries)]
    return [f"## {estimates.HEADING}", estimates.WARNING, grid, *bars]


def _kept(run: Run) -> list[str]:
    kept = kept_blocks(run.kept)
    names = {bar.dimension: bar.name for block in kept.blocks for bar in block.bars}
    totals = tuple(
        Bar(bar.dimension, bar.name, 0, 0, wording.share_of(bar.kept, bar.total))
        for bar in kept.totals
    )
    lines = [Line("all blocks", _kept_cells(totals, kept.columns))]
    lines += [Line(block.name, _kept_cells(block.bars, kept.columns)) for block in kept.blocks]
    grid = _grid(["", *(names[column] for column in kept.columns)], lines)
    return [kept.stream_text, grid] if kept.embed else [grid]


def _kept_cells(bars: tuple[Bar, ...], columns: tuple[str, ...]) -> tuple[Cell, ...]:
    known = {bar.dimension: bar for bar in bars}
    return tuple(
        Cell("–")
        if (bar := known.get(column)) is None
        else Cell(bar.word or f"{bar.kept} of {bar.total}")
        for column in columns
    )


def _parity(run: Run) -> list[str]:
    if not run.report.parity:
        return []
    lines = [
        Line(stage, (Cell(wording.relative_error(error)),))
        for stage, error in run.report.parity.items()
    ]
    return ["## Parity", _grid(["stage", "largest relative error"], lines)]


def _environment(device: Device) -> list[str]:
    facts = environment_facts(device)
    if not facts:
        return []
    items = [f"{name}: {safe(value)}" for name, value in facts]
    return [f"## Environment: {safe(device.title)}", _items(items)]


def _items(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _grid(heads: list[str], lines: list[Line]) -> str:
    rows = [
        "| " + " | ".join(safe(head) for head in heads) + " |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for line in lines:
        name = f"{safe(line.name)} ({safe(line.remark)})" if line.remark else safe(line.name)
        rows.append(f"| {name} | " + " | ".join(map(_cell, line.cells)) + " |")
    return "\n".join(rows)


def _cell(cell: Cell) -> str:
    figure = f"**{safe(cell.figure)}**" if cell.best else safe(cell.figure)
    return f"{figure} ({safe(cell.remark)})" if cell.remark else figure
