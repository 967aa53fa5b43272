"""Targets whose programs this machine cannot run natively.

Their artifacts are verified under emulation where that was prepared; elsewhere the manifest records
that they were not.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from ..core.errors import InputError
from ..runtimes import EngineError
from ..runtimes.subprocess_inference import infer_in_subprocess
from ..targets.catalog import load_target, of_this_architecture
from ..targets.instruction_sets import machine_name
from ..targets.profile import TargetProfile
from .capabilities import EIGHT_BITS, int8_saturates_here, other_processor
from .export_run import ExportRun
from .parity import relative_error
from .stage_line import stage

if TYPE_CHECKING:
    from ..targets.emulation import Emulator


@dataclass(frozen=True)
class CrossTarget:
    """A target of another architecture than this machine's.

    Attributes:
        profile: Its device profile.
        emulator: Runs its programs here, as its processor; None where nothing does.
        reason: Why there is no emulator, in one line.
    """

    profile: TargetProfile
    emulator: Emulator | None
    reason: str | None

    @property
    def command(self) -> tuple[str, ...] | None:
        """The command that runs a Python file on the emulated processor."""
        return None if self.emulator is None else tuple(self.emulator.command(["python3"]))


def cross_target(target: str, runtime: str = "onnxruntime") -> CrossTarget | None:
    """Return how a target's programs run here.

    Returns None where they run natively.
    """
    profile = load_target(target)
    machine = machine_name(profile.architecture)
    if of_this_architecture(profile):
        return None
    if machine != "aarch64":
        return CrossTarget(
            profile, None, f"programs for {profile.architecture} do not run on this machine"
        )
    # Emulation belongs to measuring; an export needs it only here.
    from ..targets.emulation import ready
    from ..targets.emulation.preparation import RUNTIMES

    prepared = ready()
    if prepared is None:
        return CrossTarget(
            profile, None, "emulation is not prepared on this machine (vitrim targets emulate)"
        )
    if runtime not in RUNTIMES or RUNTIMES[runtime][0][0] not in prepared.versions:
        return CrossTarget(profile, None, f"the emulation here has no aarch64 {runtime}")
    cores = [cluster.core for cluster in profile.clusters]
    return CrossTarget(profile, prepared.like(cores, profile.features), None)


def parity_note(target: str) -> str | None:
    """Return a note on parity that was computed here for another processor, or None."""
    if target == "host":
        return None
    profile = load_target(target)
    machine = machine_name(platform.machine())
    if profile.kind == "gpu":
        difference = "is no such GPU"
    elif machine_name(profile.architecture) != machine:
        difference = f"is {machine} and not {profile.architecture}"
    elif profile.features and (found := other_processor(profile)):
        difference = found
    else:
        return None
    return (
        f"parity was computed on this processor, which {difference}: the runtime may choose other "
        f"kernels on {target}, so verify top-1 there (vitrim bench --dataset)"
    )


def verify_on_target(run: ExportRun, file: Path, graph: onnx.ModelProto) -> None:
    """Run a finished file on the target's own processor, emulated, and record its parity.

    Args:
        run: The export; gets a stage and a note, or only a note where nothing runs the file.
        file: The file that the runtime opens.
        graph: The same graph, which this machine runs too.

    Raises:
        ParityError: The outputs differ by more than the tolerance.
        InputError: The file does not run on the target.
    """
    device, probe = run.request.device, run.probe
    found = cross_target(device.target, device.runtime)
    if found is None:
        if note := parity_note(device.target):
            run.notes.append(note)
        return
    if found.emulator is None:
        run.notes.append(f"parity was not run on {device.target}: {found.reason}")
        return
    name = found.emulator.name
    stage(f"parity under {name}")
    job = run.job(file, {}, emulated=True)
    try:
        logits, facts = infer_in_subprocess(job, probe.images, command=found.command)
    except EngineError as error:
        raise InputError(
            f"{device.target}: the artifact does not run under {name}: {error}; use another form, "
            "or name an empty folder in VITRIM_EMULATION to export it unverified"
        ) from None
    precision = run.request.numeric.precision
    here, chosen = run.outputs_of(graph)
    # Outputs that are equal for the same tokens prove that the target chose these, in fp32 only.
    run.check(
        f"{device.target} under {name}",
        logits,
        lambda _: None,
        precision=precision,
        chosen=chosen if precision == "fp32" else None,
    )
    difference = float(relative_error(here[: len(logits)], logits).max())
    saturates = precision in EIGHT_BITS and int8_saturates_here(device.target) is not None
    reason = ", whose eight-bit products saturate," if saturates else ""
    run.notes.append(
        f"{device.target}: verified under {name} in {facts['runtime']} {facts['version']}; its "
        f"outputs differ by {difference:.1e} of the largest logit from this machine's{reason} "
        f"for the same file (over {len(logits)} of {len(probe.images)} inputs)"
    )
