"""`vitrim targets`: the devices that are described, this one, and whether a model fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..core.console import show as put
from ..targets.catalog import list_targets, load_target
from ..targets.profile import Precision, TargetProfile
from .emulate import emulate

if TYPE_CHECKING:
    from ..bench.estimate.prediction import Estimate
    from ..targets.check import Fit

app = typer.Typer(
    no_args_is_help=True,
    help="The devices that are described, this machine, and whether a model fits one.\n\n"
    "  vitrim targets list\n\n  vitrim targets emulate\n\n  vitrim targets show x86-64\n\n  vitrim targets check runs/quickstart/compact --target rpi4",
)
Name = Annotated[str, typer.Argument(help="A target's name, `host`, or the path of a target TOML.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]


@app.command("list")
def list_all() -> None:
    """One line for each described device."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("name", "device", "cores", "memory", "runtime", "precision"):
        table.add_column(
            column,
            justify="right" if column in ("cores", "memory") else "left",
            no_wrap=column == "name",
        )
    for name in list_targets():
        target = load_target(name)
        table.add_row(
            name,
            target.title,
            str(target.cores),
            _bytes(target.memory.ram_bytes),
            target.preferred_runtime,
            target.preferred_precision,
        )
    put(table)


@app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """A device with every number and where it comes from."""
    _print(name, as_json)


@app.command("detect")
def detect(as_json: AsJson = False) -> None:
    """This machine, as a target."""
    _print("host", as_json)


@app.command("check")
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that vitrim saved (architecture.json).",
            metavar="[TARGET] MODEL",
            show_default=False,
        ),
    ],
    second: Annotated[str | None, typer.Argument(hidden=True)] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="A target's name, `host` or a TOML. Absent: one line for every described device.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option("--precision", help="Precision of weights and activations."),
    ] = "fp32",
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="Runtime of the estimate. Default: the target's preferred one.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="Threads of the estimate. Default: the cores of its first cluster.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Does a model fit a device, and about how long would it take? Leaves with exit code 1 if it
    does not fit.

    The time is an estimate, with a bar that says how far estimates were from the truth on devices
    that were measured.

    [bold]Examples[/bold]

      vitrim targets check runs/quickstart/compact --target rpi4

      vitrim targets check runs/quickstart/compact --precision int8
    """
    from ..core.errors import InputError

    if second is not None:
        if target is not None:
            raise InputError(f"two targets: {model!r} and --target {target!r}; name one")
        target, model = model, second
    asked = (
        [load_target(target)]
        if target is not None
        else [load_target(name) for name in (*list_targets(), "host")]
    )
    network = _Network(Path(model))
    if target is None:
        _overview(network, asked, precision, runtime, threads)
        return
    fit = network.fit(asked[0], precision)
    typer.echo(
        "\n".join(
            (*fit.lines[:-1], network.time(asked[0], precision, runtime, threads), fit.lines[-1])
        )
    )
    if not fit.fits:
        raise typer.Exit(1)


class _Network:
    """A saved model as the checks see it."""

    def __init__(self, folder: Path) -> None:
        from ..compress.network.count import count_params
        from ..compress.network.files import ARCHITECTURE, read_architecture

        self.architecture = read_architecture(folder / ARCHITECTURE)
        self.params = count_params(self.architecture)

    def fit(self, target: TargetProfile, precision: Precision) -> Fit:
        from ..pipeline.estimates import peak_activation_bytes
        from ..targets.check import check as hold

        return hold(
            target,
            params=self.params,
            peak_activation_bytes=peak_activation_bytes(self.architecture, precision),
            precision=precision,
        )

    def time(
        self, target: TargetProfile, precision: Precision, runtime: str | None, threads: int | None
    ) -> str:
        """The estimate on one line, or why there is none."""
        found = self.estimate(target, precision, runtime, threads)
        return found if isinstance(found, str) else str(found)

    def estimate(
        self, target: TargetProfile, precision: Precision, runtime: str | None, threads: int | None
    ) -> Estimate | str:
        from ..bench.estimate.prediction import can_estimate, estimate
        from ..pipeline.estimates import network_workload

        if runtime is not None:
            _require_runtime(runtime)
        return can_estimate(target, precision) or estimate(
            network_workload(self.architecture),
            target,
            runtime=runtime,
            precision=precision,
            threads=threads,
        )


def _require_runtime(runtime: str) -> None:
    import difflib

    from ..bench.estimate.points import known_runtimes
    from ..core.errors import InputError
    from ..runtimes import engine_names

    known = sorted({*engine_names(), *known_runtimes()})
    if runtime not in known:
        near = difflib.get_close_matches(runtime, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise InputError(f"--runtime {runtime!r}: no such runtime; {hint}")


def _overview(
    network: _Network,
    targets: list[TargetProfile],
    precision: Precision,
    runtime: str | None,
    threads: int | None,
) -> None:
    from rich.table import Table

    from ..bench.estimate.prediction import time_text
    from ..targets.check import size_text

    table = Table(show_edge=False, pad_edge=False)
    for column in ("target", f"fits in {precision}", "estimate", "its bar", "rests on"):
        table.add_column(column, no_wrap=column in ("target", "its bar"))
    for target in targets:
        fit = network.fit(target, precision)
        wanting = (
            (fit.weight_excess_bytes, "weights"),
            (fit.activation_excess_bytes, "activations"),
        )
        words = (
            "yes"
            if fit.fits
            else "no: "
            + ", ".join(
                f"{what} {size_text(excess)} too large" for excess, what in wanting if excess
            )
        )
        found = network.estimate(
            target, precision, runtime, min(threads, target.cores) if threads else None
        )
        if isinstance(found, str):
            table.add_row(target.name, words, "none", "", found.split("; ")[1])
        else:
            bar = f"{time_text(found.low_s)} to {time_text(found.high_s)}"
            table.add_row(target.name, words, time_text(found.likely_s), bar, found.rests_on)
    put(table)
    put(
        "estimates, not measurements: the bar is how far they missed on four of five devices left out; measure on the device"
    )


app.command("emulate")(emulate)


def _print(name: str, as_json: bool) -> None:
    target = load_target(name)
    if as_json:
        typer.echo(json.dumps(target.model_dump(mode="json", by_alias=True), indent=1))
        return
    typer.echo(f"{target.name}: {target.title} ({target.vendor})")
    typer.echo(
        f"  {target.architecture}, {target.triple}; {', '.join(target.features) or 'no special instructions'}"
    )
    vector = target.vector
    typer.echo(
        f"  vectors: {vector.kind}, {vector.registers} registers of {vector.bits} bits"
        + (", int8 dot products" if vector.int8_dot else "")
    )
    typer.echo(f"  TVM target: {json.dumps(target.tvm_target)}")
    typer.echo(
        f"  made for {target.preferred_runtime} in {target.preferred_precision}; widths in multiples of {target.round_to}"
    )
    for key, value in target.numbers().items():
        typer.echo(f"  {key} = {value:g}  ({target.source_of(key)})")
    for note in target.notes:
        typer.echo(f"  {note}")


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
