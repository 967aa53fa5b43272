"""`vitrim report` and `vitrim compare`: what saved measurements show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.console import echo, show
from ..core.errors import InputError

Sources = Annotated[
    list[Path],
    typer.Argument(
        help="Run folders, folders that `vitrim bench --out` wrote, or single JSON files."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for the report. Default: a single run folder itself, else report.",
        show_default=False,
    ),
]
Measurements = Annotated[
    list[Path],
    typer.Argument(
        help="Measurement files, the one to compare with first; or one folder of them.",
        show_default=False,
    ),
]
FailIfSlower = Annotated[
    str | None,
    typer.Option(
        "--fail-if-slower",
        metavar="SHARE",
        help="Exit with 1 if one is significantly slower than the first by more than this, "
        "e.g. 5%.",
    ),
]


def report(sources: Sources, out: Out = None) -> None:
    """Write report.md, report.json and a self-contained report.html for phones and desktops.

    The report of a single run folder is written to that folder. Other sources are compared side by
    side: every combination of device, threads and batch size has a table. Measurements from an
    emulator are marked, and appear in no plot.

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
                f"{source}: no such file or folder; name one that `vitrim run` or "
                "`vitrim bench --out` wrote"
            )
    alone = len(sources) == 1 and out is None and is_run_folder(sources[0])
    written = render(sources[0]) if alone else render_measurements(sources, out or Path("report"))
    for path in written:
        echo(str(path))


def compare(measurements: Measurements, fail_if_slower: FailIfSlower = None) -> None:
    """Compare measurements with the first one, with a significance test of their latencies.

    [bold]Examples[/bold]

      vitrim compare before.json after.json --fail-if-slower 5%

      vitrim compare runs/quickstart/measurements
    """
    from ..bench.results.compare import compare as compare_two
    from ..bench.results.compare import parse_limit
    from ..bench.results.measurement import Measurement
    from .measurement_table import measurement_table

    limit = None if fail_if_slower is None else parse_limit(fail_if_slower)
    files: list[Path] = []
    for path in measurements:
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if len(files) < 2:
        raise InputError(
            "a comparison needs two measurements or more; name the JSON files that "
            "`vitrim bench --out` wrote"
        )
    loaded: dict[str, Measurement] = {}
    for file in files:
        measurement = Measurement.load(file)
        loaded[measurement.name if measurement.name not in loaded else str(file)] = measurement
    (_, first), *others = loaded.items()
    found = {name: compare_two(first, other) for name, other in others}
    show(measurement_table(loaded), *(str(comparison) for comparison in found.values()))
    show(*(f"{name}: {note}" for name, comparison in found.items() for note in comparison.notes))
    if any(comparison.exit_code(limit) for comparison in found.values()):
        raise typer.Exit(1)
