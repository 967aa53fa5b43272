"""`vitrim bench`: run artifacts on this machine and write down what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..terminal_lines import show


def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifact folders or .onnx files; several are measured in turns.")],
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")] = 1,
    target: Annotated[str, typer.Option("--target", help="What this machine is: a target's name or TOML, or `host`.")] = "host",
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="An .npz with `images` and `labels`: top-1 by the very process that is timed.", show_default=False),
    ] = None,
    dataset_limit: Annotated[
        int | None, typer.Option("--dataset-limit", min=1, help="At most so many of its images.", show_default=False)
    ] = None,
    time_limit_s: Annotated[float, typer.Option("--time-limit", help="Stop after so many seconds of timing, all together.")] = 60.0,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Images a run, for a dynamic batch.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json, one each. Absent: only the table.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace measurements of the same name.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Latency, memory and top-1 in a fresh process for each artifact, interleaved so that a busy machine is fair to all.

    [bold]Examples[/bold]

      vitrim bench runs/quickstart/artifacts/*

      vitrim bench small-int8 --threads 4 --dataset test.npz --out measurements
    """
    from ..bench.measure import measure_interleaved
    from ..measurement_table import measurement_table

    names = _names(artifacts)
    files = {name: out / f"{name}.json" for name in names} if out is not None else {}
    for file in files.values():
        if file.exists() and not overwrite:
            raise InputError(f"{file}: exists already; --overwrite replaces it, --out names another folder")
    measured = measure_interleaved(
        names,
        threads,
        target=target,
        dataset=dataset,
        dataset_limit=dataset_limit,
        time_limit_s=time_limit_s,
        batch=batch,
        quiet=quiet,
    )
    for name, file in files.items():
        measured[name].save(file)
    show(measurement_table(measured))
    for name, measurement in measured.items():
        show(*(f"{name}: {warning}" for warning in measurement.warnings))
    if out is not None:
        show(f"saved: {', '.join(map(str, files.values()))}")


def _names(artifacts: list[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in artifacts:
        name = path.stem if path.suffix == ".onnx" else path.resolve().name
        if name in names:
            raise InputError(f"{path}: a second artifact called {name!r}; rename one, since measurements are told apart by name")
        names[name] = path
    return names
