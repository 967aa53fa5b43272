"""TVM: the network compiled to machine code for one target, as a shared library that a few
megabytes of runtime call.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rich.console import Console
from rich.progress import Progress

from ...compress.network.modules.model import CompactModel
from ...core.errors import InputError
from ...targets.catalog import load_target
from ...targets.profile import TargetProfile
from ..cross_target import elsewhere
from ..forms import Form
from ..quantization.quantize import CALIBRATION_IMAGES
from ..tvm_kernels.compiled_program import NotStraight, straight_program
from ..tvm_kernels.first_kernel import first_kernel
from ..tvm_kernels.link import Linker, is_here, linker_for
from ..tvm_kernels.objects import OBJECTS, write_objects, write_program
from ..tvm_kernels.weights import FILE as WEIGHTS
from ..tvm_kernels.weights import lift_weights, save_weights
from ..versions import tool_versions
from .runtime import Role, Source, Written

if TYPE_CHECKING:
    from ...bench.emulation import Emulator
    from ..tvm_kernels.built import Built
    from ..tvm_kernels.codes import Range
    from ..tvm_kernels.precision import Name

MODEL = "model.so"
# log: JSON lines of the tuner, read, and written where it tunes. tune_s: measure tiles here for so
# many seconds first. schedule: `ours`, or `default` for TVM's own pipeline. static: `yes` keeps the
# objects too, for linking the model into a program.
OPTIONS = ("log", "tune_s", "schedule", "static")


class TvmRuntime:
    """Relax through our schedule, or through TVM's own pipeline for what it does not cover."""

    name = "tvm"
    extra = "tvm"
    precisions: tuple[str, ...] = ("fp32", "int8", "int8-static")
    # Compiled code has fixed shapes.
    dynamic_batch = False
    # Kernels are written from the network itself; the front end reads torch's graph as it is.
    form: Form | None = None

    def missing(self) -> str | None:
        """Why TVM cannot be used here, in one line, or None."""
        from ..tvm_kernels.targets import missing

        return missing()

    def write(self, source: Source, folder: Path) -> Written:
        """`model.so`, and `weights.bin` where the weights are large. Errors: InputError."""
        settings = read_options(source.options)
        profile = load_target(source.target)
        built = self._built(source, profile, settings)
        target = built.target
        device = "cuda" if target.kind.name == "cuda" else "cpu"
        triple = host_triple(target, profile)
        linker = linker_for(triple)
        entry, files, notes = write_code(
            built, linker, folder, straight=device == "cpu", static=settings.static
        )
        asked_by, unasked = how_to_ask(source.target, profile, triple, device)
        threads = "1 thread" if built.threads == 1 else f"{built.threads} threads"
        notes = [
            *built.notes,
            *notes,
            f"compiled for {target_words(target)} with {threads}, linked by {linker.name}",
        ]
        if asked_by is not None:
            notes.append(
                f"{source.target} is not this machine: its answers are those of {asked_by.name}"
            )
        return Written(
            main=MODEL,
            files=tuple(files),
            notes=tuple(notes),
            versions=tool_versions("apache-tvm", "apache-tvm-ffi"),
            session={
                "entry": entry,
                "triple": triple,
                "device": device,
                "threads": str(built.threads),
                "compiler": tool_versions("apache-tvm").get("apache-tvm", ""),
            },
            command=None if asked_by is None else tuple(asked_by.command(["python3"])),
            unasked=unasked,
            where=first_kernel if entry == "program" else None,
        )

    @staticmethod
    def _built(source: Source, profile: TargetProfile, settings: Settings) -> Built:
        from ..tvm_kernels.build import build_network
        from ..tvm_kernels.default import default_network

        batch = int(source.batch)
        if (
            source.compact is None
            or not settings.ours
            or (profile.tvm_target or {}).get("kind") == "cuda"
        ):
            if source.precision != "fp32":
                raise InputError(
                    f"{source.precision} is computed by our own kernels, and this network, target or schedule has none of them; take fp32"
                )
            if settings.tune_s is not None or settings.log is not None:
                raise InputError(
                    "tuning measures our own kernels, and this network, target or schedule has none of them; leave tune_s and log out"
                )
            return default_network(source.graph, profile, threads=source.threads)
        numbers = _numbers(source, source.compact)
        if settings.tune_s is None:
            return build_network(
                source.compact,
                profile,
                batch=batch,
                threads=source.threads,
                log=settings.log,
                **numbers,
            )
        from ..tvm_kernels.tune import tune

        with (
            tempfile.TemporaryDirectory(prefix="vitrim-tune-") as folder,
            Progress(console=Console(stderr=True), transient=True) as bar,
        ):
            log = settings.log or Path(folder) / "tiles.jsonl"
            task = bar.add_task("tuning", total=1.0)
            tuned = tune(
                source.compact, profile, log, batch=batch, threads=source.threads, time_limit_s=settings.tune_s,
                report=lambda shape, share: bar.update(task, description=f"tuning {shape}", completed=share), **numbers,
            )  # fmt: skip
            built = build_network(
                source.compact, profile, batch=batch, threads=source.threads, log=log, **numbers
            )
        note = f"tuned here: {tuned.trials} tiles of {tuned.shapes} of {tuned.of} shapes, {tuned.usual_s * 1e3:.3f} ms became {tuned.best_s * 1e3:.3f} ms"
        return dataclasses.replace(built, notes=(*built.notes, note))


RUNTIME = TvmRuntime()


class Numbers(TypedDict):
    """What the kernels compute in."""

    precision: Name
    ranges: Sequence[Range] | None


def _numbers(source: Source, compact: CompactModel) -> Numbers:
    """The precision, and for int8-static the ranges found on the images."""
    from ..tvm_kernels.coverage import reason_against

    name: Name = source.precision  # type: ignore[assignment]  # one of `precisions`: the exporter has checked
    # What no kernel covers is refused with its reason when the network is built.
    if name != "int8-static" or reason_against(compact.architecture) is not None:
        return Numbers(precision=name, ranges=None)
    assert source.images is not None
    from ..tvm_kernels.ranges import find_ranges

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("finding ranges", total=None)
        found = find_ranges(
            compact,
            source.images[:CALIBRATION_IMAGES],
            lambda done, of: bar.update(task, completed=done, total=of),
        )
    return Numbers(precision=name, ranges=found)


def write_code(
    built: Built, linker: Linker, folder: Path, *, straight: bool, static: bool
) -> tuple[str, list[tuple[str, Role]], list[str]]:
    """Write `model.so` and what belongs to it: (its entry, the other files, notes). Errors:
    InputError.
    """
    notes: list[str] = []
    if straight:
        try:
            program = straight_program(built)
        except NotStraight as reason:
            notes.append(f"runs in TVM's virtual machine, for it is no straight program: {reason}")
        else:
            return (
                "program",
                write_program(program, built.target, linker, folder, MODEL, keep=static),
                notes,
            )
    if static:
        raise InputError(
            "option static=yes: this model runs in TVM's virtual machine and cannot be linked into a program; leave the option out"
        )
    module, arrays = lift_weights(built.module)
    objects = write_objects(dataclasses.replace(built, module=module).compile(), folder / OBJECTS)
    linker.shared(objects, folder / MODEL)
    shutil.rmtree(folder / OBJECTS)
    if arrays:
        save_weights(arrays, folder / WEIGHTS)
    return "machine", [(WEIGHTS, "weights")] if arrays else [], notes


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options, checked."""

    log: Path | None
    tune_s: float | None
    static: bool
    ours: bool = True


def read_options(options: Mapping[str, str]) -> Settings:
    """What the caller wants besides the code. Errors: InputError naming the option."""
    for key in options:
        if key not in OPTIONS:
            raise InputError(f"option {key!r} is none of tvm's; it has {', '.join(OPTIONS)}")
    static = options.get("static", "no")
    if static not in ("yes", "no"):
        raise InputError(f"option static={static}: say yes or no")
    if options.get("schedule", "ours") not in ("ours", "default"):
        raise InputError(f"option schedule={options['schedule']}: say ours or default")
    seconds: float | None = None
    if "tune_s" in options:
        try:
            seconds = float(options["tune_s"])
        except ValueError:
            seconds = 0.0
        if not 0.0 < seconds <= 86_400.0:
            raise InputError(
                f"option tune_s={options['tune_s']}: give the seconds that tuning may take, such as 60"
            )
    log = Path(options["log"]) if "log" in options else None
    if log is not None and seconds is None and not log.is_file():
        raise InputError(
            f"option log={log}: no such file; name the log that tuning wrote, or let it be written with tune_s=60"
        )
    return Settings(log, seconds, static == "yes", options.get("schedule", "ours") == "ours")


def host_triple(target: Any, profile: TargetProfile) -> str:
    """The triple of the code that starts everything, which for a GPU is its host's."""
    host = target.host or target
    return str(dict(host.attrs).get("mtriple") or profile.triple)


def target_words(target: Any) -> str:
    """`llvm cortex-a72`: the parts of a target that people know it by."""
    attributes = dict(target.attrs)
    return " ".join(
        [
            str(target.kind.name),
            *(str(attributes[key]) for key in ("mtriple", "mcpu", "arch") if attributes.get(key)),
        ]
    )


def how_to_ask(
    name: str, profile: TargetProfile, triple: str, device: str
) -> tuple[Emulator | None, str | None]:
    """(what runs this target's programs here, None for this machine itself; why nothing does)."""
    if device == "cuda" and not cuda_here():
        return (
            None,
            "there is no CUDA device on this machine; `vitrim bench` on one tells its answers and its speed",
        )
    if is_here(triple):
        lacking = lacking_features(profile)
        return (
            None,
            f"this processor has no {', '.join(lacking)}, which the code for {name} uses"
            if lacking
            else None,
        )
    found = elsewhere(name, "tvm")
    if found is None:
        return None, f"programs for {triple} do not run on this machine"
    return found.emulator, found.why_not


def cuda_here() -> bool:
    """Whether TVM finds a GPU of NVIDIA's."""
    import tvm

    try:
        return bool(tvm.cuda(0).exist)
    except Exception:  # a runtime without CUDA says so in its own way
        return False


def lacking_features(profile: TargetProfile) -> list[str]:
    """Instructions that the profile names and this x86 processor does not; other kinds of
    processors are not asked.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    flags = set(
        next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    )
    return [feature for feature in profile.features if feature not in flags] if flags else []
