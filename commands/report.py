"""`vitrim report`: Markdown and one HTML page from a run folder, or from measurements alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, folders that `vitrim bench --out` wrote, or single JSON files."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the report. Default: a single run folder itself, else report.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write report.md, report.json and a self-contained report.html, which reads on a phone and
    needs no network.

    One run folder gets its report in itself. Anything else is put side by side: devices, runtimes,
    threads and batches each get a table, and what an emulator timed is marked and drawn nowhere.

    [bold]Examples[/bold]

      vitrim report runs/quickstart

      vitrim report measurements/host measurements/pi --out both

      vitrim report runs/quickstart measurements/pi --out with-the-board
    """
    from ..bench.report import render, render_measurements
    from ..bench.report.run import is_run_folder

    for source in sources:
        if not source.exists():
            raise InputError(
                f"{source}: no such file or folder; name what `vitrim run` or `vitrim bench --out` wrote"
            )
    alone = len(sources) == 1 and out is None and is_run_folder(sources[0])
    written = render(sources[0]) if alone else render_measurements(sources, out or Path("report"))
    for path in written:
        typer.echo(str(path))
