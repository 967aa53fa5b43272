"""`vitrim compare`: which of two or more measurements is faster, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.console import show
from ..core.errors import InputError


def compare(
    measurements: Annotated[
        list[Path],
        typer.Argument(
            help="Measurement files, the one to compare with first; or one folder of them.",
            show_default=False,
        ),
    ],
    fail_if_slower: Annotated[
        str | None,
        typer.Option(
            "--fail-if-slower",
            metavar="SHARE",
            help="Exit with 1 if one is surely slower than the first by more than this, e.g. 5%.",
        ),
    ] = None,
) -> None:
    """Hold measurements against the first one: latency, memory, size, top-1, and the verdict of a
    test on all samples.

    [bold]Examples[/bold]

      vitrim compare before.json after.json --fail-if-slower 5%

      vitrim compare runs/quickstart/measurements
    """
    from ..bench.results.compare import compare as hold
    from ..bench.results.compare import parse_limit
    from ..bench.results.measurement import Measurement
    from .measurement_table import measurement_table

    limit = None if fail_if_slower is None else parse_limit(fail_if_slower)
    files = [
        file
        for path in measurements
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    if len(files) < 2:
        raise InputError(
            "a comparison needs two measurements or more; name the JSON files that `vitrim bench --out` wrote"
        )
    loaded: dict[str, Measurement] = {}
    for file in files:
        measurement = Measurement.load(file)
        loaded[measurement.name if measurement.name not in loaded else str(file)] = measurement
    (_, first), *others = loaded.items()
    found = {name: hold(first, other) for name, other in others}
    show(measurement_table(loaded), *(str(comparison) for comparison in found.values()))
    show(*(f"{name}: {note}" for name, comparison in found.items() for note in comparison.notes))
    if any(comparison.exit_code(limit) for comparison in found.values()):
        raise typer.Exit(1)
