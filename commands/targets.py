"""`vitrim targets`: the described devices, this machine, and whether a model fits a device."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from ..core.console import echo, show
from ..core.errors import InputError
from ..targets.catalog import load_target, shipped_targets, targets_here
from ..targets.detect import detect_host, missing_features
from ..targets.profile import Precision, TargetProfile
from .option_groups import with_option_groups

if TYPE_CHECKING:
    from ..bench.estimate.prediction import Estimate
    from ..targets.check import Fit

HELP = """The described devices, this machine, and whether a model fits one.

  vitrim targets list

  vitrim targets emulate

  vitrim targets show x86-64

  vitrim targets check runs/quickstart/compact --target rpi4"""

app = typer.Typer(no_args_is_help=True, help=HELP)

Name = Annotated[str, typer.Argument(help="A target's name, `host`, or the path of a target TOML.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]
# The target may also be the first argument, `check rpi4 MODEL`.
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A folder that vitrim saved (architecture.json).",
        metavar="[TARGET] MODEL",
        show_default=False,
    ),
]
SecondArgument = Annotated[str | None, typer.Argument(hidden=True)]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="A target's name, `host` or a TOML. Absent: one line for every described device.",
        show_default=False,
    ),
]
PrecisionName = Annotated[
    Literal["fp32", "fp16", "int8"],
    typer.Option("--precision", help="Precision of weights and activations."),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="Runtime of the estimate. Default: the target's preferred one.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads of the estimate. Default: the cores of its first cluster.",
        show_default=False,
    ),
]
EmulatedRuntimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        help="An aarch64 runtime to install: onnxruntime (the default) or tvm; may be repeated.",
    ),
]


@app.command("list")
def list_all() -> None:
    """List the described devices, one per line."""
    table = Table(show_edge=False, pad_edge=False)
    for column in ("name", "device", "cores", "memory", "runtime", "precision", "runs here"):
        table.add_column(
            column,
            justify="right" if column in ("cores", "memory") else "left",
            no_wrap=column == "name",
        )
    able = targets_here()
    for target in shipped_targets():
        table.add_row(
            target.name,
            target.title,
            str(target.cores),
            _size_text(target.memory.ram_bytes),
            target.preferred_runtime,
            target.preferred_precision,
            "yes" if target.name in able else "",
        )
    show(table)


@app.command("show")
def show_target(name: Name, as_json: AsJson = False) -> None:
    """Show a device with every number and its source."""
    _print(name, as_json)


@app.command("detect")
def detect(as_json: AsJson = False) -> None:
    """Show this machine as a target."""
    _print("host", as_json)


@dataclass(frozen=True)
class EstimateOptions:
    """The setting of an estimate."""

    precision: PrecisionName = "fp32"
    runtime: Runtime = None
    threads: Threads = None


@app.command("check")
@with_option_groups
def check(
    *,
    model: ModelArgument,
    second: SecondArgument = None,
    target: Target = None,
    setting: EstimateOptions,
) -> None:
    """Check whether a model fits a device, and estimate its latency.

    The exit code is 1 if it does not fit.

    The error bar of the latency shows how far estimates were off on devices that were measured.

    [bold]Examples[/bold]

      vitrim targets check runs/quickstart/compact --target rpi4

      vitrim targets check runs/quickstart/compact --precision int8

    Args:
        model: The folder of the model, or the target where `second` is the model.
        second: The folder of the model after a target.
        target: The device; by default all of them, one line each.
        setting: The setting of the estimate.
    """
    if second is not None:
        if target is not None:
            raise InputError(f"two targets: {model!r} and --target {target!r}; name one")
        target, model = model, second
    profiles = [load_target(target)] if target is not None else [*shipped_targets(), detect_host()]
    network = _Network(Path(model))
    if target is None:
        _show_overview(network, profiles, setting)
        return
    fit = network.fit(profiles[0], setting.precision)
    echo("\n".join((*fit.lines[:-1], network.time(profiles[0], setting), fit.lines[-1])))
    if not fit.fits:
        raise typer.Exit(1)


@app.command("emulate")
def emulate(runtime: EmulatedRuntimes = None) -> None:
    """Install an emulator for aarch64 artifacts: qemu, an arm64 user space, python3 and runtimes.

    This takes half a minute and 200 MB in the user's cache folder (VITRIM_EMULATION names another
    folder). Installed parts are kept. Emulated runs verify outputs and top-1; their times are not
    those of a device.

    [bold]Example[/bold]

      vitrim targets emulate
    """
    from ..core.progress import step_lines
    from ..targets.emulation import prepare

    found = prepare(step_lines(sys.stderr), runtimes=runtime or ["onnxruntime"])
    versions = [f"{name} {version}" for name, version in found.versions.items() if name != "qemu"]
    echo(f"ready: {found.name} with {', '.join(versions)}")


class _Network:
    """A saved model; its weights are not read."""

    def __init__(self, folder: Path) -> None:
        from ..compress.network.count import count_params
        from ..compress.network.files import ARCHITECTURE, read_architecture

        self.architecture = read_architecture(folder / ARCHITECTURE)
        self.params = count_params(self.architecture)

    def fit(self, target: TargetProfile, precision: Precision) -> Fit:
        from ..pipeline.estimates import peak_activation_bytes
        from ..targets.check import check

        return check(
            target,
            params=self.params,
            peak_activation_bytes=peak_activation_bytes(self.architecture, precision),
            precision=precision,
        )

    def time(self, target: TargetProfile, setting: EstimateOptions) -> str:
        """The estimate on one line, or why there is none."""
        found = self.estimate(target, setting, setting.threads)
        return found if isinstance(found, str) else str(found)

    def estimate(
        self, target: TargetProfile, setting: EstimateOptions, threads: int | None
    ) -> Estimate | str:
        """The estimate, or why there is none."""
        from ..bench.estimate.prediction import can_estimate, estimate
        from ..pipeline.estimates import network_workload

        if setting.runtime is not None:
            _require_runtime(setting.runtime)
        if reason := can_estimate(target, setting.precision):
            return reason
        return estimate(
            network_workload(self.architecture),
            target,
            runtime=setting.runtime,
            precision=setting.precision,
            threads=threads,
        )


def _require_runtime(runtime: str) -> None:
    from ..bench.estimate.points import known_runtimes
    from ..runtimes import engine_names

    known = sorted({*engine_names(), *known_runtimes()})
    if runtime not in known:
        near = difflib.get_close_matches(runtime, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise InputError(f"--runtime {runtime!r}: no such runtime; {hint}")


def _show_overview(
    network: _Network, targets: list[TargetProfile], setting: EstimateOptions
) -> None:
    from ..bench.estimate.prediction import time_text

    table = Table(show_edge=False, pad_edge=False)
    heads = ("target", f"fits in {setting.precision}", "estimate", "error bar", "based on")
    for column in heads:
        table.add_column(column, no_wrap=column in ("target", "error bar"))
    for target in targets:
        fits = _fit_text(network.fit(target, setting.precision))
        threads = min(setting.threads, target.cores) if setting.threads else None
        found = network.estimate(target, setting, threads)
        if isinstance(found, str):
            table.add_row(target.name, fits, "none", "", found.split("; ")[1])
        else:
            bar = f"{time_text(found.low_s)} to {time_text(found.high_s)}"
            table.add_row(target.name, fits, time_text(found.likely_s), bar, found.rests_on)
    show(table)
    show(
        "estimates, not measurements: the error bar covers four of five devices that were left out "
        "of the calibration; measure on the device"
    )


def _fit_text(fit: Fit) -> str:
    from ..targets.check import size_text

    if fit.fits:
        return "yes"
    excess = {"weights": fit.weight_excess_bytes, "activations": fit.activation_excess_bytes}
    parts = [f"{name} {size_text(count)} too large" for name, count in excess.items() if count]
    return f"no: {', '.join(parts)}"


def _print(name: str, as_json: bool) -> None:
    target = load_target(name)
    if as_json:
        echo(json.dumps(target.model_dump(mode="json", by_alias=True), indent=1))
        return
    vector, features = target.vector, ", ".join(target.features) or "no special instructions"
    dot = ", int8 dot products" if vector.int8_dot else ""
    lines = [
        f"{target.name}: {target.title} ({target.vendor})",
        f"  {target.architecture}, {target.triple}; {features}",
        f"  vectors: {vector.kind}, {vector.registers} registers of {vector.bits} bits{dot}",
        f"  TVM target: {json.dumps(target.tvm_target)}",
        f"  preferred: {target.preferred_runtime} in {target.preferred_precision}; "
        f"widths in multiples of {target.round_to}",
    ]
    if lacking := missing_features(target):
        lines.append(f"  this processor has no {', '.join(lacking)}")
    for key, value in target.numbers().items():
        lines.append(f"  {key} = {value:g}  ({target.source_of(key)})")
    lines += [f"  {note}" for note in target.notes]
    echo("\n".join(lines))


def _size_text(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
