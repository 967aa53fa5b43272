"""A target whose programs this machine cannot run itself: asked under emulation where that was
prepared, else said to be unasked.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..runtimes import EngineError
from ..runtimes.subprocess_inference import infer_in_subprocess
from ..targets.profile import TargetProfile
from .capabilities import profile_of
from .manifest import Array, Parity
from .parity import Probe, relative_error, require
from .request import ExportRequest
from .stage_line import stage

if TYPE_CHECKING:
    from ..bench.emulation import Emulator

# Emulated inference is hundreds of times slower: as many images as fit into this, at least one
# batch.
EMULATED_S = 30.0
SAME = {"amd64": "x86-64", "x86_64": "x86-64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Elsewhere:
    """A target of another architecture. emulator: what runs its programs here, as its processor; or
    why_not, one line.
    """

    profile: TargetProfile
    emulator: Emulator | None
    why_not: str | None

    @property
    def command(self) -> tuple[str, ...] | None:
        """What runs a Python file on the emulated processor."""
        return None if self.emulator is None else tuple(self.emulator.command(["python3"]))


def elsewhere(target: str, runtime: str = "onnxruntime") -> Elsewhere | None:
    """How a target can be asked from here; None where its programs run on this machine, or nobody
    knows its architecture.
    """
    profile = profile_of(target)
    here = _architecture(platform.machine())
    if profile is None or _architecture(profile.architecture) == here:
        return None
    if _architecture(profile.architecture) != "aarch64":
        return Elsewhere(
            profile, None, f"programs for {profile.architecture} do not run on this machine"
        )
    # Emulation belongs to measuring; an export needs it only here.
    from ..bench.emulation import ready
    from ..bench.emulation.preparation import RUNTIMES

    prepared = ready()
    if prepared is None:
        return Elsewhere(
            profile, None, "emulation is not prepared on this machine (vitrim targets emulate)"
        )
    if runtime not in RUNTIMES or RUNTIMES[runtime][0][0] not in prepared.versions:
        return Elsewhere(profile, None, f"the emulation here has no aarch64 {runtime}")
    return Elsewhere(
        profile,
        prepared.like([cluster.core for cluster in profile.clusters], profile.features),
        None,
    )


def ask_elsewhere(
    main: Path,
    order: ExportRequest,
    probe: Probe,
    local: Callable[[Array], Array],
    stages: list[Parity],
    notes: list[str],
) -> None:
    """Let the target's own processor answer for a finished file; stages and notes grow.

    local: this machine's answers of the same file, images (n, ...) to logits (n, classes). Errors:
    ParityError where the target answers otherwise than it may, InputError where it does not answer.
    """
    found = elsewhere(order.target, order.runtime)
    if found is None:
        return
    if found.emulator is None:
        notes.append(f"parity was not run on {order.target}: {found.why_not}")
        return
    stage(f"parity under {found.emulator.name}")
    batch = 1 if order.batch == "dynamic" else order.batch
    job = {
        "runtime": order.runtime,
        "model": str(main.resolve()),
        "threads": order.threads,
        "input": {"name": "images", "shape": [batch, *order.shape], "type": "float32"},
        "time_limit_s": EMULATED_S,
    }
    try:
        logits, told = infer_in_subprocess(job, probe.images, command=found.command)
    except EngineError as error:
        raise InputError(
            f"{order.target}: the artifact gave no answer under {found.emulator.name}: {error}; take another form, or name an empty folder in "
            "VITRIM_EMULATION to export it unproven"
        ) from None
    asked = replace(probe, images=probe.images[: len(logits)], logits=probe.logits[: len(logits)])
    parity = asked.compare(
        f"{order.target} under {found.emulator.name}",
        logits,
        tolerance=order.allowed[order.precision],
    )
    stages.append(require(parity, lambda tolerance: None))
    apart = float(relative_error(local(asked.images), logits).max())
    notes.append(
        f"{order.target}: asked under {found.emulator.name} in {told['runtime']} {told['version']}; its answers are {apart:.1e} of the largest "
        f"logit from this machine's for the same file (over {len(logits)} of {len(probe.images)} inputs)"
    )


def _architecture(name: str) -> str:
    low = name.lower()
    return SAME.get(low, low)
