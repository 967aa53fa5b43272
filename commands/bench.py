"""`vitrim bench`: run artifacts on this machine or on a device, and write down what was
measured.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..core.console import show
from ..core.errors import InputError

if TYPE_CHECKING:
    from ..bench.local.options import DeviceOptions, MeasureOptions
    from ..bench.results.measurement import Measurement

PROFILE_RUNS = 20
HOW, WHERE, MORE = "How it is measured", "Where it runs", "What else is told"


def bench(
    artifacts: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Artifact folders or .onnx files; several are measured in turns.",
            show_default=False,
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="ADDRESS",
            help="`host`, ssh://user@host[:port], adb://SERIAL, tvm-rpc://tracker:port/key, or qemu-aarch64 (emulated: answers, no times).",
            rich_help_panel=WHERE,
        ),
    ] = "host",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="What that machine is: a target's name or TOML (vitrim targets list).",
            rich_help_panel=WHERE,
        ),
    ] = "host",
    python: Annotated[
        str,
        typer.Option(
            "--python",
            help="The interpreter on the device, with numpy and the runtime.",
            rich_help_panel=WHERE,
        ),
    ] = "python3",
    runner: Annotated[
        Literal["auto", "python", "native"],
        typer.Option(
            "--runner",
            help="What runs on the device; auto: the C++ runner where there is no Python.",
            rich_help_panel=WHERE,
        ),
    ] = "auto",
    runner_file: Annotated[
        Path | None,
        typer.Option(
            "--runner-file",
            help="A native runner that you built for the device.",
            show_default=False,
            rich_help_panel=WHERE,
        ),
    ] = None,
    runtime_library: Annotated[
        Path | None,
        typer.Option(
            "--runtime-library",
            help="libonnxruntime.so for the device.",
            show_default=False,
            rich_help_panel=WHERE,
        ),
    ] = None,
    ssh_option: Annotated[
        list[str] | None,
        typer.Option(
            "--ssh-option",
            help="Passed on to ssh, such as -i key or -F config; may be repeated.",
            show_default=False,
            rich_help_panel=WHERE,
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Threads of the runtime.", rich_help_panel=HOW)
    ] = 1,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N[,N…]",
            help="Images a run; several are swept. Needs a free batch.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(
            "--pin",
            metavar="CPUS",
            help="CPUs to stay on, such as 0 or 4-7 or 0,2.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    spinning: Annotated[
        bool,
        typer.Option(
            "--spinning",
            help="Threads wait busily within a call: quicker, and costs energy.",
            rich_help_panel=HOW,
        ),
    ] = False,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            help="onnxruntime's execution provider, such as cuda; may be repeated, best first.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    copies: Annotated[
        bool,
        typer.Option(
            "--copies/--no-copies",
            help="On a GPU: time carrying the images there and the logits back.",
            rich_help_panel=HOW,
        ),
    ] = True,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="On a GPU: replay a recorded graph instead of launching each kernel.",
            rich_help_panel=HOW,
        ),
    ] = False,
    time_limit_s: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            help="Stop after so many seconds of timing, all together. Default: 60.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            help="An .npz with `images` and `labels`: top-1 by the very process that is timed.",
            show_default=False,
            rich_help_panel=MORE,
        ),
    ] = None,
    dataset_limit: Annotated[
        int | None,
        typer.Option(
            "--dataset-limit",
            min=1,
            help="At most so many of its images.",
            show_default=False,
            rich_help_panel=MORE,
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Also where the time goes, by operator and by block; a picture with --out.",
            rich_help_panel=MORE,
        ),
    ] = False,
    cost_table: Annotated[
        Path | None,
        typer.Option(
            "--cost-table",
            metavar="FILE",
            help="Instead of artifacts: measure one block over its widths, fit the costs that a latency budget reads, and tell their error.",
            show_default=False,
            rich_help_panel=MORE,
        ),
    ] = None,
    block: Annotated[
        str,
        typer.Option(
            "--block",
            help="The dense block of the cost table; smaller ones are measured below it.",
            rich_help_panel=MORE,
        ),
    ] = "tokens=50,embed=128,heads=4,head_width=32,ffn=512",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for NAME.json, one each. Absent: only the table.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace measurements of the same name.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Latency, memory and top-1 in a fresh process for each artifact, interleaved so that a busy
    machine is fair to all.

    The first artifact is what the others are compared with. Rounds go on until the ratios are known
    to ± 1 %, or the time is up. What could make the figures doubtful (a busy or throttled machine,
    too few samples) is said below the table, with what to do about it.

    [bold]On this machine[/bold]

      vitrim bench runs/quickstart/artifacts/* --out measurements/host

      vitrim bench small-int8 --threads 4 --pin 0-3 --dataset test.npz --profile

      vitrim bench small-dynamic --batch 1,4,16

    [bold]On a device[/bold] (the files go there, and nothing stays; give the same command again
    after a lost link)

      vitrim bench small-int8 --on ssh://pi@raspberry --target rpi5 --out measurements/pi

      vitrim bench small-int8 --on adb://R58M123 --runner-file vitrim_runner --runtime-library
      libonnxruntime.so

      vitrim bench small-tvm --on tvm-rpc://tracker:9190/rpi4

      vitrim bench small-int8 --on qemu-aarch64 --target rpi4

    [bold]Then[/bold]

      vitrim report measurements/host measurements/pi --out both

      vitrim bench --cost-table costs.json --block
      tokens=197,embed=192,heads=3,head_width=64,ffn=768
    """
    from ..bench.local.options import CPU, DeviceOptions, MeasureOptions

    options = MeasureOptions(
        threads=threads,
        dataset=dataset,
        dataset_limit=dataset_limit,
        time_limit_s=60.0 if time_limit_s is None else time_limit_s,
        pinning=_cpus(pin),
        spinning=spinning,
        providers=tuple(_provider(name) for name in provider) if provider else (CPU,),
        copies=copies,
        cuda_graph=cuda_graph,
        profile_runs=PROFILE_RUNS if profile else 0,
    )
    device = DeviceOptions(
        python=python,
        runner=runner,
        runner_file=runner_file,
        runtime_library=runtime_library,
        ssh_options=tuple(word for words in ssh_option or () for word in shlex.split(words)),
    )
    if cost_table is not None:
        if artifacts:
            raise InputError(
                f"{artifacts[0]}: a cost table measures blocks of its own; leave the artifacts away, or --cost-table"
            )
        _cost_table(
            cost_table,
            block,
            on,
            target,
            options,
            device,
            120.0 if time_limit_s is None else time_limit_s,
            overwrite,
            quiet,
        )
        return
    if not artifacts:
        raise InputError(
            "nothing to measure: name artifact folders or .onnx files (vitrim bench --help)"
        )
    sizes = _batches(batch)
    names = _names(artifacts)
    files = (
        {(name, size): out / _file(name, size, sizes) for name in names for size in sizes}
        if out is not None
        else {}
    )
    for file in files.values():
        if file.exists() and not overwrite:
            raise InputError(
                f"{file}: exists already; --overwrite replaces it, --out names another folder"
            )
    _run(names, sizes, files, on, target, options, device, quiet)
    if out is not None:
        show(f"saved: {', '.join(map(str, files.values()))}")


def _run(
    names: dict[str, Path],
    sizes: list[int | None],
    files: Mapping[tuple[str, int | None], Path],
    on: str,
    target: str,
    options: MeasureOptions,
    device: DeviceOptions,
    quiet: bool,
) -> None:
    from ..bench.remote.measure import measure_at
    from .measurement_table import measurement_table

    for size in sizes:
        measured = measure_at(
            on, names, replace(options, batch=size), device, target=target, quiet=quiet
        )
        for name, measurement in measured.items():
            if file := files.get((name, size)):
                measurement.save(file)
        shown = (
            measured
            if len(sizes) == 1
            else {f"{name}, batch {size}": measurement for name, measurement in measured.items()}
        )
        show(measurement_table(shown))
        for name, measurement in shown.items():
            _operators(name, measurement, files.get((measurement.name, size)))
        show(*_warnings(shown))


def _warnings(measured: Mapping[str, Measurement]) -> list[str]:
    """Each warning once, with the names of those that it concerns where that is not all of them."""
    found: dict[str, list[str]] = {}
    for name, measurement in measured.items():
        for warning in measurement.warnings:
            found.setdefault(warning, []).append(name)
    return [
        warning if len(names) == len(measured) else f"{', '.join(names)}: {warning}"
        for warning, names in found.items()
    ]


def _operators(name: str, measurement: Measurement, file: Path | None) -> None:
    from ..bench.results.operator_table import OperatorTable
    from .measurement_table import operator_table

    if not measurement.operators:
        return
    table = OperatorTable(measurement.operators)
    show("", f"{name}: where the time goes", operator_table(table))
    if file is not None:
        from ..bench.report.operators import operator_picture
        from ..core.storage import replace_file

        picture = file.with_name(f"{file.stem}-operators.svg")
        replace_file(picture, operator_picture(table, name))
        show(f"picture: {picture}")


def _cost_table(
    path: Path,
    block: str,
    on: str,
    target: str,
    options: MeasureOptions,
    device: DeviceOptions,
    time_limit_s: float,
    overwrite: bool,
    quiet: bool,
) -> None:
    from ..bench.local.cost_table import chosen_shapes, measure_cost_table
    from ..bench.local.progress import Progress
    from ..bench.remote.measure import measure_at

    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; --overwrite replaces it")

    def measure(
        models: dict[str, Path], how: MeasureOptions, progress: Progress
    ) -> dict[str, Measurement]:
        own = replace(
            options, time_limit_s=how.time_limit_s, seed=how.seed, profile_runs=0, dataset=None
        )
        return measure_at(on, models, own, device, target=target, progress=progress)

    table = measure_cost_table(
        chosen_shapes(**_block(block)),
        target=target,
        threads=options.threads,
        time_limit_s=time_limit_s,
        measure=measure,
        quiet=quiet,
    )
    table.save(path)
    held = [point for point in table.points if point.held_out]
    show(
        f"{len(table.points)} blocks measured with {table.runtime}, {len(held)} of them held out of the fit"
    )
    if table.median_error is not None and table.largest_error is not None:
        show(
            f"error on those: median {100 * table.median_error:.1f} %, largest {100 * table.largest_error:.1f} %"
        )
    show(f"saved: {path}")


def _block(words: str) -> dict[str, int]:
    known = ("tokens", "embed", "heads", "head_width", "ffn")
    found: dict[str, int] = {}
    for word in words.split(","):
        key, equals, value = (part.strip() for part in word.partition("="))
        if key not in known or not equals or not value.isdigit() or int(value) < 1:
            raise InputError(
                f"--block {words!r}: {word.strip()!r} is not understood; write {', '.join(f'{name}=N' for name in known)}"
            )
        found[key] = int(value)
    return found


def _batches(words: str | None) -> list[int | None]:
    if words is None:
        return [None]
    found = [word.strip() for word in words.split(",")]
    if not all(word.isdigit() and int(word) >= 1 for word in found):
        raise InputError(f"--batch {words!r}: whole numbers above 0 are wanted, such as 1,4,16")
    return list(dict.fromkeys(int(word) for word in found))


def _cpus(words: str | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    found: list[int] = []
    for word in words.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", word)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(
                f"--pin {words!r}: {word.strip()!r} is no CPU or range of CPUs; write 0 or 4-7 or 0,2"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def _provider(name: str) -> str:
    """onnxruntime's own name, also from the short one that everybody says."""
    short = {
        "cpu": "CPU",
        "cuda": "CUDA",
        "tensorrt": "Tensorrt",
        "openvino": "OpenVINO",
        "coreml": "CoreML",
        "xnnpack": "Xnnpack",
        "qnn": "QNN",
    }
    return f"{short[name.lower()]}ExecutionProvider" if name.lower() in short else name


def _file(name: str, size: int | None, sizes: list[int | None]) -> str:
    return f"{name}-batch{size}.json" if len(sizes) > 1 else f"{name}.json"


def _names(artifacts: list[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in artifacts:
        name = path.stem if path.suffix == ".onnx" else path.resolve().name
        if name in names:
            raise InputError(
                f"{path}: a second artifact called {name!r}; rename one, since measurements are told apart by name"
            )
        names[name] = path
    return names
