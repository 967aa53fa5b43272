"""What a run prints at its end."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ..bench.report.buckets import bucket_table
from ..bench.report.cut import shipped_text
from ..bench.report.overview import Row, overview
from ..bench.report.run import load_run
from ..core.console import show, unit_count
from ..export.manifest import PARITY
from .run_folder import RunFolder


def show_final_table(folder: RunFolder) -> None:
    """Print the report's figures of each artifact, its buckets, and the path of the report."""
    table = Table(show_edge=False, pad_edge=False)
    for column in ("artifact", "params", "MACs", "top-1", "p50", "faster", "memory", "file"):
        table.add_column(column, justify="left" if column == "artifact" else "right", no_wrap=True)
    run = load_run(folder.path)
    view = overview(run)
    devices = view.devices
    rows = [row for device in devices for row in device.rows]
    for row in rows:
        table.add_row(*_cells(row))
    warnings = [
        escape(f"warning: {row.label}: {line}")
        for row in rows
        for line in (row.measurement.warnings if row.measurement else ())
        if line.startswith(PARITY)
    ]
    budget = None if run.report.latency is None else shipped_text(run.report.latency)
    outcome = [] if budget is None else [budget]
    outcome += [f"measured on {device.title}" for device in devices if device.remote]
    buckets = [part for each in view.buckets for part in ("", *bucket_table(each), "")]
    show(table, *buckets, *warnings, *outcome, f"report: {folder / 'report.html'}")


def _cells(row: Row) -> list[str]:
    memory = row.measurement.beyond_floor_rss_bytes if row.measurement else None
    faster = "" if row.speed_up is None else f"{row.speed_up.estimate:.2f}x"
    return [
        row.label,
        unit_count(row.params or 0),
        unit_count(row.macs or 0),
        "" if row.top1 is None else f"{100 * row.top1:.2f} %",
        "" if row.summary is None else f"{1e3 * row.summary.p50_s:.2f} ms",
        "1.00x" if row.series == 0 and row.summary else faster,
        "" if memory is None else f"{memory / 1e6:.1f} MB",
        "" if row.file_bytes is None else f"{row.file_bytes / 1e6:.2f} MB",
    ]
