"""TVM: the network compiled to machine code for one target, as a shared library."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rich.console import Console
from rich.progress import Progress

from ...compress.network.modules.model import CompactModel
from ...core.cross_compiler import runs_here
from ...core.errors import InputError
from ...runtimes.cpu_features import fitting_target, missing_features
from ...targets.catalog import load_target
from ...targets.profile import TargetProfile
from ..cross_target import cross_target
from ..forms import Form
from ..manifest import tool_versions
from ..quantization.quantize import CALIBRATION_IMAGES
from ..tvm_kernels.build import (
    build_bucket_network,
    build_network,
    default_network,
    missing_tvm,
)
from ..tvm_kernels.coverage import UNCOVERED_PARTS, uncovered_part
from ..tvm_kernels.execution_plan import NoExecutionPlan, execution_plan
from ..tvm_kernels.first_difference import first_difference
from ..tvm_kernels.link import Linker, linker_for
from ..tvm_kernels.objects import OBJECTS, write_library, write_objects
from ..tvm_kernels.weights import FILE as WEIGHTS
from ..tvm_kernels.weights import lift_weights, save_weights
from .limits import Limit, Planned
from .runtime import Role, RuntimeFiles, Source, require_options

if TYPE_CHECKING:
    from ...targets.emulation import Emulator
    from ..tvm_kernels.build import TvmNetwork
    from ..tvm_kernels.precision import Name
    from ..tvm_kernels.quantization import Range

MODEL = "model.so"
_LONGEST_TUNING_S = 86_400.0


@dataclasses.dataclass(frozen=True)
class TvmOptions:
    """The runtime's options.

    Attributes:
        log: The log of a tuning; read, and written if tuning is requested (option log).
        tune_s: For how many seconds tiles are measured first; None: not at all (option tune_s).
        keep_objects: Keep the objects, for linking the model into a program (option static=yes).
        our_kernels: Use our own kernels, not TVM's pipeline (option schedule: ours or default).
    """

    log: Path | None
    tune_s: float | None
    keep_objects: bool
    our_kernels: bool = True


OPTIONS = ("log", "tune_s", "schedule", "static")


def _uncovered(planned: Planned) -> str | None:
    if planned.precision == "fp32":
        return None
    part = planned.unread
    if planned.architecture is not None:
        part = uncovered_part(planned.architecture)
    return part and f"{planned.precision} is computed by our own kernels, which do not cover {part}"


UNCOVERED = Limit(
    f"eight bits in networks that its kernels do not cover: {', '.join(UNCOVERED_PARTS)}",
    "use fp32",
    _uncovered,
)


class TvmRuntime:
    """A network of our own kernels, or of TVM's own pipeline where they do not cover it."""

    name = "tvm"
    extra = "tvm"
    precisions: tuple[str, ...] = ("fp32", "int8", "int8-static")
    options: tuple[str, ...] = OPTIONS
    # Compiled code has fixed shapes.
    dynamic_batch = False
    # Kernels are written from the architecture; TVM's front end reads torch's graph unchanged.
    form: Form | None = None
    limits: tuple[Limit, ...] = (UNCOVERED,)

    def missing(self) -> str | None:
        """Why TVM cannot be used here; see `Runtime.missing`."""
        return missing_tvm()

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Write `model.so`, and `weights.bin` for large weights; see `Runtime.write`."""
        options = read_options(source.options)
        profile = load_target(source.target)
        network = _network(source, profile, options)
        device = "cuda" if network.target.kind.name == "cuda" else "cpu"
        triple = host_triple(network.target, profile)
        linker = linker_for(triple)
        code = write_code(network, linker, folder, options, device)
        needs = network.needs
        emulator, parity_skipped = execution_host(source.target, needs, triple, device)
        threads = "1 thread" if network.threads == 1 else f"{network.threads} threads"
        target = target_text(network.target)
        notes = [*network.notes, *code.notes]
        notes.append(f"compiled for {target} with {threads}, linked by {linker.name}")
        if emulator is not None:
            notes.append(
                f"{source.target} is not this machine: its outputs are those of {emulator.name}"
            )
        watched = code.entry == "program"
        if network.branches is not None and not watched:
            raise InputError(
                "runtime tvm: this network has no static execution plan, which buckets need; "
                "export it for onnxruntime"
            )
        return RuntimeFiles(
            main=MODEL,
            files=code.files,
            notes=tuple(notes),
            versions=tool_versions("apache-tvm", "apache-tvm-ffi"),
            session={
                "entry": code.entry,
                "triple": triple,
                "device": device,
                "threads": str(network.threads),
                "compiler": tool_versions("apache-tvm").get("apache-tvm", ""),
            },
            needs=needs,
            command=None if emulator is None else tuple(emulator.command(["python3"])),
            parity_skipped=parity_skipped,
            engine_choices=watched and network.route == "kernels",
            first_difference=(first_difference if watched and network.branches is None else None),
        )


RUNTIME = TvmRuntime()


def read_options(options: Mapping[str, str]) -> TvmOptions:
    """Validate the options.

    Raises:
        InputError: An option is unknown or has an invalid value.
    """
    require_options("tvm", options, OPTIONS)
    static, schedule = options.get("static", "no"), options.get("schedule", "ours")
    if static not in ("yes", "no"):
        raise InputError(f"option static={static}: use yes or no")
    if schedule not in ("ours", "default"):
        raise InputError(f"option schedule={schedule}: use ours or default")
    tune_s = _tuning_seconds(options["tune_s"]) if "tune_s" in options else None
    log = Path(options["log"]) if "log" in options else None
    if log is not None and tune_s is None and not log.is_file():
        raise InputError(
            f"option log={log}: no such file; "
            "name the log that tuning wrote, or have it written with tune_s=60"
        )
    return TvmOptions(log, tune_s, static == "yes", schedule == "ours")


def _tuning_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= _LONGEST_TUNING_S:
        raise InputError(f"option tune_s={text}: give the seconds that tuning may take, such as 60")
    return seconds


def _network(source: Source, profile: TargetProfile, options: TvmOptions) -> TvmNetwork:
    """The network that is compiled, tuned first if requested."""
    compact = source.compact
    if source.buckets is not None:
        _require_kernels(options)
        return build_bucket_network(
            source.buckets,
            profile,
            threads=source.threads,
            log=options.log,
            precision=_precision(source, source.buckets.network)["precision"],
        )
    gpu = (profile.tvm_target or {}).get("kind") == "cuda"
    if compact is None or not options.our_kernels or gpu:
        _require_no_kernels(source, options)
        return default_network(source.graph, profile, threads=source.threads)
    batch, threads = int(source.batch), source.threads
    precision = _precision(source, compact)
    if options.tune_s is None:
        return build_network(
            compact,
            profile,
            batch=batch,
            threads=threads,
            log=options.log,
            outputs=source.outputs,
            **precision,
        )
    from ..tvm_kernels.tuner import tune

    with (
        tempfile.TemporaryDirectory(prefix="vitrim-tune-") as folder,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        log = options.log or Path(folder) / "tiles.jsonl"
        task = bar.add_task("tuning", total=1.0)

        def report(shape: str, share: float) -> None:
            bar.update(task, description=f"tuning {shape}", completed=share)

        tuned = tune(
            compact,
            profile,
            log,
            batch=batch,
            threads=threads,
            time_limit_s=options.tune_s,
            report=report,
            outputs=source.outputs,
            **precision,
        )
        network = build_network(
            compact,
            profile,
            batch=batch,
            threads=threads,
            log=log,
            outputs=source.outputs,
            **precision,
        )
    note = (
        f"tuned here: {tuned.trials} tiles of {tuned.shapes} of {tuned.all_shapes} shapes, "
        f"{tuned.default_s * 1e3:.3f} ms reduced to {tuned.best_s * 1e3:.3f} ms"
    )
    return dataclasses.replace(network, notes=(*network.notes, note))


def _require_no_kernels(source: Source, options: TvmOptions) -> None:
    """Raise InputError for what only our own kernels provide."""
    none = "this network, target or schedule has none of them"
    if source.precision != "fp32":
        raise InputError(f"{source.precision} is computed by our own kernels, and {none}; use fp32")
    if options.tune_s is not None or options.log is not None:
        raise InputError(f"tuning measures our own kernels, and {none}; leave tune_s and log out")


def _require_kernels(options: TvmOptions) -> None:
    """Raise InputError for options that a network with buckets does not have."""
    if not options.our_kernels:
        raise InputError("option schedule=default: buckets are run by our own kernels; use ours")
    if options.tune_s is not None:
        raise InputError(
            "option tune_s: a network with buckets is not tuned; tune BucketedModel.fixed(count), "
            "and give its log"
        )


class _PrecisionArguments(TypedDict):
    """Arguments of `build_network` and `tune`."""

    precision: Name
    ranges: Sequence[Range] | None


def _precision(source: Source, compact: CompactModel) -> _PrecisionArguments:
    """The precision, and for int8-static the ranges of the calibration images."""
    # The exporter has validated that it is one of `precisions`.
    name: Name = source.precision  # type: ignore[assignment]
    # A network that no kernel covers is refused with its reason when it is built.
    if name != "int8-static" or uncovered_part(compact.architecture) is not None:
        return _PrecisionArguments(precision=name, ranges=None)
    assert source.images is not None
    from ..tvm_kernels.calibration import find_ranges

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("finding ranges", total=None)
        ranges = find_ranges(
            compact,
            source.images[:CALIBRATION_IMAGES],
            lambda done, total: bar.update(task, completed=done, total=total),
            source.outputs,
        )
    return _PrecisionArguments(precision=name, ranges=ranges)


@dataclasses.dataclass(frozen=True)
class Code:
    """The compiled network.

    Attributes:
        entry: `program` (a static execution plan), or `machine` (TVM's virtual machine).
        files: (path, role) of the files besides `model.so`.
        notes: One line each, for the manifest.
    """

    entry: str
    files: tuple[tuple[str, Role], ...] = ()
    notes: tuple[str, ...] = ()


def write_code(
    network: TvmNetwork, linker: Linker, folder: Path, options: TvmOptions, device: str
) -> Code:
    """Write `model.so` and the files that it needs.

    Args:
        network: The network.
        linker: A linker for its target.
        folder: Where the files are written.
        options: The runtime's options.
        device: cpu or cuda; only a CPU runs a static execution plan.

    Raises:
        InputError: Compiling failed, or objects are requested of a network without a plan.
    """
    notes: tuple[str, ...] = ()
    if device == "cpu":
        try:
            plan = execution_plan(network)
        except NoExecutionPlan as reason:
            notes = (
                f"runs in TVM's virtual machine, because it has no static execution plan: {reason}",
            )
        else:
            files = write_library(
                plan,
                network.target,
                linker,
                folder / MODEL,
                keep_objects=options.keep_objects,
            )
            return Code("program", tuple(files))
    if options.keep_objects:
        raise InputError(
            "option static=yes: this model runs in TVM's virtual machine "
            "and cannot be linked into a program; leave the option out"
        )
    module, arrays = lift_weights(network.module)
    executable = dataclasses.replace(network, module=module).compile()
    objects = write_objects(executable, folder / OBJECTS)
    linker.link_shared(objects, folder / MODEL)
    shutil.rmtree(folder / OBJECTS)
    if not arrays:
        return Code("machine", notes=notes)
    save_weights(arrays, folder / WEIGHTS)
    return Code("machine", ((WEIGHTS, "weights"),), notes)


def host_triple(target: Any, profile: TargetProfile) -> str:
    """The triple of the code that runs on the CPU; for a GPU, that of its host."""
    host = target.host or target
    return str(dict(host.attrs).get("mtriple") or profile.triple)


def target_text(target: Any) -> str:
    """A target as text: `llvm aarch64-linux-gnu cortex-a72`."""
    attributes = dict(target.attrs)
    known = [str(attributes[key]) for key in ("mtriple", "mcpu", "arch") if attributes.get(key)]
    return " ".join([str(target.kind.name), *known])


def execution_host(
    name: str, needs: Sequence[str], triple: str, device: str
) -> tuple[Emulator | None, str | None]:
    """What runs a target's programs on this machine.

    Args:
        name: The target's name.
        needs: The instruction sets that its code uses.
        triple: The triple of its code.
        device: cpu or cuda.

    Returns:
        (emulator, reason): the emulator, or None for this machine; and why the programs cannot run
        here, or None.
    """
    if device == "cuda" and not has_cuda():
        return (
            None,
            "there is no CUDA device on this machine; run `vitrim bench` on one that has it",
        )
    if runs_here(triple):
        missing = missing_features(needs)
        if not missing:
            return None, None
        return None, (
            f"this processor has no {', '.join(missing)}, which the code for {name} uses; "
            f"use target {fitting_target()} or host for a processor like this one"
        )
    found = cross_target(name, "tvm")
    if found is None:
        return None, f"programs for {triple} do not run on this machine"
    return found.emulator, found.reason


def has_cuda() -> bool:
    """Whether TVM finds an NVIDIA GPU."""
    import tvm

    try:
        return bool(tvm.cuda(0).exist)
    except Exception:  # a runtime without CUDA raises errors of several types
        return False
