"""report.md: the same figures as the page, for a terminal, a pull request or a diff."""

from __future__ import annotations

import re

from ..results.operator_table import OperatorTable
from . import estimates, wording
from .facts import environment_facts, run_facts
from .kept import Bar, kept_blocks
from .operators import by_kind
from .overview import Device, Overview, overview
from .run import Run
from .table import Cell, Line, side_by_side, table

_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")


def render_markdown(run: Run, view: Overview | None = None) -> str:
    """The whole file; `view` saves deriving the figures again."""
    view = view or overview(run)
    parts = [f"# {safe(view.title)}", f"**{safe(view.headline)}**"]
    if run.report.data:
        parts.append(safe(run.report.data))
    if len(view.devices) > 1:
        parts += [
            "## Devices side by side",
            _grid(["p50", *(device.title for device in view.devices)], side_by_side(view.devices)),
        ]
    for device in view.devices:
        parts += [
            f"## {safe(device.title)}",
            _grid(["", *(row.label for row in device.rows)], table(device)),
        ]
    parts += _operators(view)
    if run.report.estimates:
        entries = run.report.estimates
        parts += [
            f"## {estimates.HEADING}",
            estimates.WARNING,
            _grid(["device", *estimates.columns(entries)], estimates.lines(entries)),
        ]
        parts += [safe(bar) for bar in estimates.bars(entries)]
    if run.kept:
        parts += ["## What was kept in every block", *_kept(run)]
    if run.report.parity:
        lines = [
            Line(stage, (Cell(wording.relative_error(error)),))
            for stage, error in run.report.parity.items()
        ]
        parts += ["## Parity", _grid(["stage", "largest relative error"], lines)]
    for device in view.devices:
        parts += _environment(device)
    notes = [*view.warnings, *run.missing]
    if notes:
        parts += ["## Read with care", "\n".join(f"- {safe(note)}" for note in notes)]
    facts = run_facts(run)
    if facts or run.report.command:
        lines_ = [f"- {name}: {safe(value)}" for name, value in facts]
        if run.report.command:
            lines_.append(f"- Command: {code(run.report.command)}")
        parts += ["## How to make it again", "\n".join(lines_)]
    return "\n\n".join(parts) + "\n"


def safe(words: str) -> str:
    """Words that Markdown and the HTML inside it leave as they are, on one line."""
    flat = " ".join(words.split())
    return (
        _SPECIAL.sub(r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )


def code(words: str) -> str:
    """A code span that no back-tick inside can end."""
    flat = " ".join(words.split())
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {flat} {fence}" if longest else f"`{flat}`"


def _grid(heads: list[str], lines: list[Line]) -> str:
    rows = [
        "| " + " | ".join(safe(head) for head in heads) + " |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for line in lines:
        cells = [_cell(cell) for cell in line.cells]
        name = f"{safe(line.name)} ({safe(line.remark)})" if line.remark else safe(line.name)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(cell: Cell) -> str:
    figure = f"**{safe(cell.figure)}**" if cell.best else safe(cell.figure)
    return f"{figure} ({safe(cell.remark)})" if cell.remark else figure


def _kept(run: Run) -> list[str]:
    kept = kept_blocks(run.kept)
    said = []
    if kept.embed:
        said.append(
            f"The residual stream (embed) keeps {kept.embed.kept} of {kept.embed.total} channels, the same ones in every block."
        )
    names = {bar.dimension: bar.name for block in kept.blocks for bar in block.bars}
    totals = tuple(
        Bar(bar.dimension, bar.name, 0, 0, wording.share_of(bar.kept, bar.total))
        for bar in kept.totals
    )
    lines = [Line("all blocks", _row(totals, kept.columns))]
    lines += [Line(block.name, _row(block.bars, kept.columns)) for block in kept.blocks]
    said.append(_grid(["", *(names[column] for column in kept.columns)], lines))
    return said


def _operators(view: Overview) -> list[str]:
    parts = []
    for device in view.devices:
        for row in device.timed:
            if device.emulated or row.measurement is None or not row.measurement.operators:
                continue
            profile = OperatorTable(row.measurement.operators)
            lines = [
                Line(
                    part.name,
                    (
                        Cell(str(part.nodes)),
                        Cell(wording.duration(part.seconds)),
                        Cell(wording.percent(profile.share(part.seconds))),
                    ),
                )
                for part in by_kind(profile)
            ]
            parts += [
                f"## Where the time goes: {safe(row.label)}, {safe(device.title)}",
                _grid(["operator", "nodes", "time", "share"], lines),
            ]
    return parts


def _row(bars: tuple[Bar, ...], columns: tuple[str, ...]) -> tuple[Cell, ...]:
    known = {bar.dimension: bar for bar in bars}
    return tuple(
        Cell("–")
        if (bar := known.get(column)) is None
        else Cell(bar.word or f"{bar.kept} of {bar.total}")
        for column in columns
    )


def _environment(device: Device) -> list[str]:
    facts = environment_facts(device)
    if not facts:
        return []
    return [
        f"## Environment: {safe(device.title)}",
        "\n".join(f"- {name}: {safe(value)}" for name, value in facts),
    ]
