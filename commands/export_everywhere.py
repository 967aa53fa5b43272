"""`vitrim export --runtime all`: an artifact for every runtime that is here, measured in turns, and
which is fastest for this model on this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..core.console import show

if TYPE_CHECKING:
    from ..bench.results.measurement import Measurement
    from ..export.artifact import Artifact

MEASUREMENTS = "measurements"


def export_everywhere(
    model: Any, out: Path, *, threads: int, time_limit_s: float, **options: Any
) -> None:
    """Write OUT/RUNTIME for each, OUT/measurements/RUNTIME.json, and print the table. Errors:
    InputError.
    """
    from ..bench.local.measure import measure_interleaved
    from ..export.resized_model import IMAGE_SIZE
    from ..export.every_runtime import export_everywhere as write

    made, absent = write(
        model,
        out,
        threads=threads,
        tell=lambda name: typer.echo(f"writing for {name}", err=True),
        **options,
    )
    measured = measure_interleaved(made, threads, time_limit_s=time_limit_s)
    for name, measurement in measured.items():
        measurement.save(out / MEASUREMENTS / f"{name}.json")
    ranked = sorted(measured, key=lambda name: measured[name].summary().p50_s)
    first = measured[ranked[0]]
    show(
        _table(ranked, made, measured),
        f"fastest here: {ranked[0]} ({first.runtime_version}), {out / ranked[0]}",
    )
    for name, reason in absent.items():
        typer.echo(f"{name}: {reason}")
    for note in made["onnxruntime"].manifest.notes:
        if note.startswith(IMAGE_SIZE):
            typer.echo(note)


def _table(ranked: list[str], made: dict[str, Artifact], measured: dict[str, Measurement]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in ("runtime", "p50", "95 %", "times as long", "memory", "file", "parity"):
        table.add_column(column, justify="left" if column == "runtime" else "right", no_wrap=True)
    best_s = measured[ranked[0]].summary().p50_s
    for name in ranked:
        found, p50_s = measured[name], measured[name].summary().p50_s
        spread, memory = found.interval(), found.beyond_floor_rss_bytes
        table.add_row(
            f"{name} {found.runtime_version}",
            f"{1e3 * p50_s:.3f} ms",
            f"{1e3 * spread.low:.3f} - {1e3 * spread.high:.3f}",
            f"{p50_s / best_s:.2f}",
            "" if memory is None else f"{memory / 1e6:.1f} MB",
            f"{made[name].bytes / 1e6:.2f} MB",
            f"{made[name].manifest.parity[-1].max_relative_error:.1e}",
        )
    return table
