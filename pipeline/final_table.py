"""The end of a run on the terminal: one small table, with the figures of the report."""

from __future__ import annotations

from rich.table import Table

from ..bench.report.overview import Row, overview
from ..bench.report.run import load_run
from ..core.console import show, unit_count
from .run_folder import RunFolder


def final_table(folder: RunFolder) -> None:
    """What the report in the run folder says of each artifact, and where it is."""
    table = Table(show_edge=False, pad_edge=False)
    for column in ("artifact", "params", "MACs", "top-1", "p50", "faster", "memory", "file"):
        table.add_column(column, justify="left" if column == "artifact" else "right", no_wrap=True)
    for device in overview(load_run(folder.path)).devices:
        for row in device.rows:
            table.add_row(*_cells(row))
    show(table, f"report: {folder / 'report.html'}")


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
