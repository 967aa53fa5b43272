"""`vitrim report`: Markdown and one HTML page from a run folder, or from measurements alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError


def report(
    sources: Annotated[list[Path], typer.Argument(help="One run folder, or measurement files of one device or several.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report of measurement files. Default: report.", show_default=False)
    ] = None,
) -> None:
    """Write report.md and a self-contained report.html.

    [bold]Examples[/bold]

      vitrim report runs/quickstart

      vitrim report laptop/*.json board/*.json --out both
    """
    from ..bench.report import render, render_measurements

    folders = [source for source in sources if source.is_dir()]
    if folders and len(sources) > 1:
        raise InputError(f"{folders[0]}: name one run folder, or any number of measurement files, not both")
    if folders and out is not None:
        raise InputError("--out: the report of a run folder lies in that folder; leave --out away")
    written = render(folders[0]) if folders else render_measurements(sources, out or Path("report"))
    for path in written:
        typer.echo(str(path))
