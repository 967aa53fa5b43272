"""`vitrim targets`: the devices that are described, this one, and whether a model fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..targets.profile import list_targets, load_target
from ..terminal_lines import show as put

app = typer.Typer(
    no_args_is_help=True,
    help="The devices that are described, this machine, and whether a model fits one.\n\n"
    "  vitrim targets list\n\n  vitrim targets emulate\n\n  vitrim targets show x86-64\n\n  vitrim targets check cortex-a72 runs/quickstart/compact",
)
Name = Annotated[str, typer.Argument(help="A target's name, `host`, or the path of a target TOML.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]


@app.command("list")
def list_all() -> None:
    """One line for each described device."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("name", "device", "cores", "memory", "runtime", "precision"):
        table.add_column(column, justify="right" if column in ("cores", "memory") else "left", no_wrap=column == "name")
    for name in list_targets():
        target = load_target(name)
        table.add_row(
            name, target.title, str(target.cores), _bytes(target.memory.ram_bytes), target.preferred_runtime, target.preferred_precision
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
    name: Name,
    model: Annotated[Path, typer.Argument(help="A folder that vitrim saved (architecture.json).")],
    precision: Annotated[
        Literal["fp32", "fp16", "int8"], typer.Option("--precision", help="Precision of weights and activations.")
    ] = "fp32",
) -> None:
    """Does a model fit a device, and about how long would it take? Leaves with exit code 1 if it does not fit.

    [bold]Example[/bold]

      vitrim targets check x86-64 runs/quickstart/compact --precision int8
    """
    target = load_target(name)
    from ..compress.count import count_macs, count_params
    from ..compress.files import ARCHITECTURE, read_architecture
    from ..peak_activations import peak_activation_bytes
    from ..targets.check import check as hold

    architecture = read_architecture(model / ARCHITECTURE)
    fit = hold(
        target,
        params=count_params(architecture),
        macs=count_macs(architecture),
        peak_activation_bytes=peak_activation_bytes(architecture, precision),
        precision=precision,
    )
    typer.echo(str(fit))
    if not fit.fits:
        raise typer.Exit(1)


@app.command("emulate")
def emulate(
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="An aarch64 runtime to have in it: onnxruntime (the default) or tvm; may be given again.")
    ] = None,
) -> None:
    """Prepare the running of aarch64 artifacts on this machine: qemu, an arm64 user land with python3, and the runtimes' wheels.

    Takes a minute and 300 MB of the user's cache folder (VITRIM_EMULATION names another place). What is there already is kept. Emulated runs prove
    outputs and top-1; their times are never a device's.

    [bold]Example[/bold]

      vitrim targets emulate
    """
    import sys

    from ..bench.emulation import prepare
    from ..bench.emulation.steps import step_lines

    found = prepare(step_lines(sys.stderr), runtimes=runtime or ["onnxruntime"])
    typer.echo(f"ready: {found.name} with " + ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "qemu"))


def _print(name: str, as_json: bool) -> None:
    target = load_target(name)
    if as_json:
        typer.echo(json.dumps(target.model_dump(mode="json", by_alias=True), indent=1))
        return
    typer.echo(f"{target.name}: {target.title} ({target.vendor})")
    typer.echo(f"  {target.architecture}, {target.triple}; {', '.join(target.features) or 'no special instructions'}")
    typer.echo(f"  made for {target.preferred_runtime} in {target.preferred_precision}; widths in multiples of {target.round_to}")
    for key, value in target.numbers().items():
        typer.echo(f"  {key} = {value:g}  ({target.source_of(key)})")
    for note in target.notes:
        typer.echo(f"  {note}")


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
