"""TVM: the network compiled to machine code for one target, as a shared library that a few megabytes of runtime call."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...targets.profile import TargetProfile, load_target
from ..foreign import elsewhere
from ..forms import Form
from ..versions import tool_versions
from .runtime import Role, Source, Written
from .tvm_link import Linker, is_here, linker_for
from .tvm_objects import OBJECTS, write_objects, write_program
from .tvm_program import NotStraight, straight_program
from .tvm_weights import FILE as WEIGHTS
from .tvm_weights import lift_weights, save_weights

if TYPE_CHECKING:
    from ...bench.emulation import Emulator
    from .tvm_schedule.built import Built

MODEL = "model.so"
# log: JSON lines of the tuner. static: `yes` keeps the objects too, for linking the model into a program.
# schedule: `default` for TVM's own pipeline, to compare with.
OPTIONS = ("log", "schedule", "static")


class TvmRuntime:
    """Relax through our schedule, or through TVM's own pipeline for what it does not cover."""

    name = "tvm"
    extra = "tvm"
    precisions: tuple[str, ...] = ("fp32",)
    # Kernels are written from the network itself; the front end reads torch's graph as it is.
    form: Form | None = None

    def missing(self) -> str | None:
        """Why TVM cannot be used here, in one line, or None."""
        from .tvm_schedule.targets import missing

        return missing()

    def write(self, source: Source, folder: Path) -> Written:
        """`model.so`, and `weights.bin` where the weights are large. Errors: InputError."""
        log, static = read_options(source.options)
        if source.batch == "dynamic":
            raise InputError("compiled code has fixed shapes; export for tvm with a batch, such as 1, or take another runtime")
        profile = load_target(source.target)
        built = self._built(source, profile, log)
        target = built.target
        device = "cuda" if target.kind.name == "cuda" else "cpu"
        triple = host_triple(target, profile)
        linker = linker_for(triple)
        entry, files, notes = write_code(built, linker, folder, straight=device == "cpu", static=static)
        asked_by, unasked = how_to_ask(source.target, profile, triple, device)
        notes = [*built.notes, *notes, f"compiled for {target_words(target)} with {built.threads} thread{'s' if built.threads > 1 else ''}, linked by {linker.name}"]
        if asked_by is not None:
            notes.append(f"{source.target} is not this machine: its answers are those of {asked_by.name}")
        return Written(
            main=MODEL,
            files=tuple(files),
            notes=tuple(notes),
            versions=tool_versions("apache-tvm", "apache-tvm-ffi"),
            session={
                "entry": entry, "triple": triple, "device": device, "threads": str(built.threads),
                "compiler": tool_versions("apache-tvm").get("apache-tvm", ""),
            },
            command=None if asked_by is None else tuple(asked_by.command(["python3"])),
            unasked=unasked,
        )

    @staticmethod
    def _built(source: Source, profile: TargetProfile, log: Path | None) -> Built:
        from .tvm_schedule.build import build_network
        from .tvm_schedule.default import default_network

        if source.compact is None or source.options.get("schedule") == "default" or (profile.tvm_target or {}).get("kind") == "cuda":
            return default_network(source.graph, profile, threads=source.threads)
        return build_network(source.compact, profile, batch=int(source.batch), threads=source.threads, log=log)


RUNTIME = TvmRuntime()


def write_code(built: Built, linker: Linker, folder: Path, *, straight: bool, static: bool) -> tuple[str, list[tuple[str, Role]], list[str]]:
    """Write `model.so` and what belongs to it: (its entry, the other files, notes). Errors: InputError."""
    notes: list[str] = []
    if straight:
        try:
            program = straight_program(built)
        except NotStraight as reason:
            notes.append(f"runs in TVM's virtual machine, for it is no straight program: {reason}")
        else:
            return "program", write_program(program, built.target, linker, folder, MODEL, keep=static), notes
    if static:
        raise InputError("option static=yes: this model runs in TVM's virtual machine and cannot be linked into a program; leave the option out")
    module, arrays = lift_weights(built.module)
    objects = write_objects(dataclasses.replace(built, module=module).compile(), folder / OBJECTS)
    linker.shared(objects, folder / MODEL)
    shutil.rmtree(folder / OBJECTS)
    if arrays:
        save_weights(arrays, folder / WEIGHTS)
    return "machine", [(WEIGHTS, "weights")] if arrays else [], notes


def read_options(options: Mapping[str, str]) -> tuple[Path | None, bool]:
    """(the tuner's log, whether the objects stay). Errors: InputError naming the option."""
    for key in options:
        if key not in OPTIONS:
            raise InputError(f"option {key!r} is none of tvm's; it has {', '.join(OPTIONS)}")
    static = options.get("static", "no")
    if static not in ("yes", "no"):
        raise InputError(f"option static={static}: say yes or no")
    if options.get("schedule", "ours") not in ("ours", "default"):
        raise InputError(f"option schedule={options['schedule']}: say ours or default")
    log = Path(options["log"]) if "log" in options else None
    if log is not None and not log.is_file():
        raise InputError(f"option log={log}: no such file; name the log that tuning wrote, or leave it out")
    return log, static == "yes"


def host_triple(target: Any, profile: TargetProfile) -> str:
    """The triple of the code that starts everything, which for a GPU is its host's."""
    host = target.host or target
    return str(dict(host.attrs).get("mtriple") or profile.triple)


def target_words(target: Any) -> str:
    """`llvm cortex-a72`: the parts of a target that people know it by."""
    attributes = dict(target.attrs)
    return " ".join([str(target.kind.name), *(str(attributes[key]) for key in ("mtriple", "mcpu", "arch") if attributes.get(key))])


def how_to_ask(name: str, profile: TargetProfile, triple: str, device: str) -> tuple[Emulator | None, str | None]:
    """(what runs this target's programs here, None for this machine itself; why nothing does)."""
    if device == "cuda" and not cuda_here():
        return None, "there is no CUDA device on this machine; `vitrim bench` on one tells its answers and its speed"
    if is_here(triple):
        lacking = lacking_features(profile)
        return None, f"this processor has no {', '.join(lacking)}, which the code for {name} uses" if lacking else None
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
    """Instructions that the profile names and this x86 processor does not; other kinds of processors are not asked."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    flags = set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))
    return [feature for feature in profile.features if feature not in flags] if flags else []
