"""`vitrim compare`: which of two or more measurements is faster, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..terminal_lines import show

if TYPE_CHECKING:
    from ..bench.measurement import Measurement


def compare(
    measurements: Annotated[list[Path], typer.Argument(help="Measurement files, the one to compare with first; or one folder of them.")],
) -> None:
    """Hold measurements against the first one: latency, memory, size, top-1, and the speed-up with its 95 % interval.

    [bold]Examples[/bold]

      vitrim compare before.json after.json

      vitrim compare runs/quickstart/measurements
    """
    from ..bench.measurement import Measurement
    from ..measurement_table import measurement_table

    files = [file for path in measurements for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if len(files) < 2:
        raise InputError("a comparison needs two measurements or more; name the JSON files that `vitrim bench --out` wrote")
    loaded = {}
    for file in files:
        measurement = Measurement.load(file)
        name = measurement.name if measurement.name not in loaded else str(file)
        loaded[name] = measurement
    show(measurement_table(loaded), *_remarks(loaded))


def _remarks(loaded: dict[str, Measurement]) -> list[str]:
    """Why the numbers may not be comparable; nothing if they are."""
    remarks = []
    first, *others = loaded.items()
    for name, other in others:
        if other.session != first[1].session:
            remarks.append(f"{name} and {first[0]} were measured at different times; measure them in one `vitrim bench` for a fair ratio")
        if other.threads != first[1].threads:
            remarks.append(f"{name} ran on {other.threads} threads, {first[0]} on {first[1].threads}")
        if other.batch != first[1].batch:
            remarks.append(f"{name} ran with batch {other.batch}, {first[0]} with {first[1].batch}; p50 is of a whole batch")
        if other.device != first[1].device or other.environment.cpu_model != first[1].environment.cpu_model:
            remarks.append(f"{name} and {first[0]} ran on different machines; the ratio is between machines too")
    return remarks
