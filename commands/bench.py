"""`vitrim bench`: measure artifacts on this machine or on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.console import show
from ..core.errors import InputError
from ..core.storage import replace_file, require_output_file, require_separate
from .bench_options import How, Table, What, Where, measure_options
from .cost_tables import show_cost_table
from .option_groups import Quiet, with_option_groups

if TYPE_CHECKING:
    from ..bench.local.options import MeasureOptions
    from ..bench.results.measurement import Measurement

Artifacts = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Artifact folders or .onnx files; several are measured interleaved.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for one NAME.json per artifact. Absent: print the table only.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace measurements of the same name.")
]


@dataclass(frozen=True)
class Output:
    """Where measurements are saved, and what is printed."""

    out: Out = None
    overwrite: Overwrite = False
    quiet: Quiet = False


@with_option_groups
def bench(
    *,
    artifacts: Artifacts = None,
    where: Where,
    how: How,
    what: What,
    table: Table,
    output: Output,
) -> None:
    """Measure latency, memory and top-1, each artifact in a fresh process.

    Artifacts are measured interleaved, so that other load on the machine affects all of them alike.
    The others are compared with the first one. The measurement ends when the ratios are known to
    ± 1 %, or at the time limit. Warnings below the table name what makes the figures unreliable
    (a busy or throttled machine, too few samples) and what to do about it.

    [bold]On this machine[/bold]

      vitrim bench runs/quickstart/artifacts/* --out measurements/host

      vitrim bench small-int8 --threads 4 --pin 0-3 --dataset test.npz --profile

      vitrim bench small-dynamic --batch 1,4,16

    Of an artifact with [bold]buckets[/bold] all are measured, and a second table has the slowest
    one, which bounds the latency of every image, and the mean over the images (--bucket N: one).

    [bold]On a device[/bold] (files are copied there and removed; repeat the command after a lost
    connection)

      vitrim bench small-int8 --on ssh://pi@raspberry --target rpi5 --out measurements/pi

      vitrim bench small-int8 --on adb://R58M123 --runtime-library libonnxruntime.so

      vitrim bench small-tvm --on tvm-rpc://tracker:9190/rpi4

      vitrim bench small-int8 --on qemu-aarch64 --target rpi4

    [bold]Afterwards[/bold]

      vitrim report measurements/host measurements/pi --out both

    [bold]Costs for latency budgets[/bold]

      vitrim bench --cost-table costs.json --like runs/quickstart/baseline --time-limit 300

      vitrim bench --cost-table costs.json --runtime tvm --precision int8 \
        --block tokens=197,embed=192,heads=3,head_width=64,ffn=768,depth=12,patch=16,channels=3

    Args:
        artifacts: What to measure.
        where: The machine that runs the artifacts.
        how: How they are timed.
        what: What else is measured.
        table: The cost table that is measured in place of artifacts.
        output: Where the measurements are saved.
    """
    options = measure_options(how, what)
    if table.cost_table is not None:
        if artifacts:
            raise InputError(
                f"{artifacts[0]}: a cost table measures generated networks; "
                "remove the artifacts or --cost-table"
            )
        inputs = _inputs(where, what)
        show_cost_table(table, where, how, options, output, inputs)
        return
    if not artifacts:
        raise InputError(
            "nothing to measure: name artifact folders or .onnx files (vitrim bench --help)"
        )
    sizes, paths = how.batch_sizes(), _by_name(artifacts)
    names = [] if output.out is None else _names(paths, how.bucket)
    files = {size: _measurement_files(names, size, len(sizes), output) for size in sizes}
    if output.out is not None:
        require_separate(output.out, _inputs(where, what, artifacts))
        for path in (path for named in files.values() for path in named.values()):
            _require_outputs(path, output, pictures=what.profile)
    for size in sizes:
        suffix = f", batch {size}" if len(sizes) > 1 else ""
        measured = _measure(paths, where, replace(options, batch=size), output.quiet)
        for name, file in files[size].items():
            measured[name].save(file)
        _show_measurements(measured, suffix, files[size])
    if output.out is not None:
        saved = [str(file) for named in files.values() for file in named.values()]
        show(f"saved: {', '.join(saved)}")


def _by_name(artifacts: list[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in artifacts:
        name = path.stem if path.suffix.lower() == ".onnx" else path.resolve().name
        if name in names:
            raise InputError(
                f"{path}: a second artifact named {name!r}; rename one, since measurements are "
                "distinguished by name"
            )
        names[name] = path
    return names


def _names(paths: Mapping[str, Path], bucket: int | None) -> list[str]:
    """The names of the measurements: one for each artifact, or for each of its buckets."""
    from ..bench.local.bucket_jobs import measured_names

    found = measured_names(paths, bucket)
    return [name for each in found.values() for name in each]


def _measurement_files(
    names: Iterable[str], size: int | None, sizes: int, output: Output
) -> dict[str, Path]:
    """The file of each measurement at a batch size, one of `sizes`; empty without --out."""
    if output.out is None:
        return {}
    suffix = f"-batch{size}" if sizes > 1 else ""
    return {name: output.out / f"{name}{suffix}.json" for name in names}


def _inputs(where: Where, what: What, artifacts: Iterable[Path] = ()) -> dict[str, Path | None]:
    """The files and folders that are read, by what they are."""
    return {
        **{f"the artifact {path.name}": path for path in artifacts},
        "the data set": what.dataset,
        "the runner": where.runner_file,
        "the runtime": where.runtime_library,
        "the target": Path(where.target) if "/" in where.target else None,
    }


def _require_outputs(path: Path, output: Output, *, pictures: bool) -> None:
    """Validate that a measurement and the picture of its profile can be written."""
    from ..bench.report.writing import PICTURE
    from ..bench.results.measurement import MEASUREMENT

    files = {path: MEASUREMENT, **({_picture(path): PICTURE} if pictures else {})}
    for file, kind in files.items():
        require_output_file(file, kind, overwrite=output.overwrite)


def _picture(measurement: Path) -> Path:
    return measurement.with_name(f"{measurement.stem}-operators.svg")


def _measure(
    paths: Mapping[str, Path], where: Where, options: MeasureOptions, quiet: bool
) -> dict[str, Measurement]:
    from ..bench.remote.measure import measure_at

    return measure_at(where.on, paths, options, where.device(), target=where.target, quiet=quiet)


def _show_measurements(
    measured: Mapping[str, Measurement], suffix: str, files: Mapping[str, Path]
) -> None:
    from ..bench.report.buckets import bucket_table
    from ..bench.results.buckets import bucket_tables
    from .measurement_table import measurement_table

    rows = {f"{name}{suffix}": measurement for name, measurement in measured.items()}
    show(measurement_table(rows))
    for found in bucket_tables(measured.values()):
        show("", *bucket_table(found))
    for name, measurement in measured.items():
        _show_profile(f"{name}{suffix}", measurement, files.get(name))
    show(*_warnings(rows))


def _warnings(measured: Mapping[str, Measurement]) -> list[str]:
    """Each warning once, with the names of its artifacts unless it concerns all of them."""
    found: dict[str, list[str]] = {}
    for name, measurement in measured.items():
        for warning in measurement.warnings:
            found.setdefault(warning, []).append(name)
    return [
        warning if len(names) == len(measured) else f"{', '.join(names)}: {warning}"
        for warning, names in found.items()
    ]


def _show_profile(name: str, measurement: Measurement, file: Path | None) -> None:
    from ..bench.results.operator_table import OperatorTable
    from .measurement_table import operator_table

    if not measurement.operators:
        return
    table = OperatorTable(measurement.operators)
    show("", f"{name}: time by operator", operator_table(table))
    if file is not None:
        from ..bench.report.operators import operator_picture
        from ..bench.report.writing import PICTURE

        picture = _picture(file)
        replace_file(picture, operator_picture(table, name), PICTURE)
        show(f"picture: {picture}")
