"""Measure under qemu-aarch64: the very runner, engines and artifact of the device, on this machine.

Outputs, top-1 and that the artifact runs at all are the device's; times are not, and every
measurement from here says so. Memory is left out, since what the system tells is the emulator's
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...core.errors import InputError
from ...targets.catalog import load_target
from ...targets.profile import TargetProfile
from ..local.conductor import ConductorError, conduct
from ..local.measure import Measurable, assemble, make_plan
from ..local.options import MeasureOptions
from ..local.progress import Progress, progress_bar
from ..results.measurement import Measurement
from . import Emulator, ready
from .preparation import RUNTIMES

DEVICE = "qemu-aarch64"
# Times under emulation are nobody's, so they need not be known well.
LEAST_ROUNDS, TIME_LIMIT_S = 2, 20.0
# The target of a measurement for which nobody named one.
ANY = "aarch64"


def measure_emulated(
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    *,
    target: TargetProfile | str = "host",
    emulator: Emulator | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Run artifacts under emulation, interleaved, and return {name: Measurement}, each with
    `emulator` in its environment.

    target: the device whose processor is emulated; `host` for all that qemu can. Of the options'
    rounds and time only a few are taken, since only answers and counts are taken from them. Errors:
    InputError, one line: emulation not prepared, a target that is no aarch64, an artifact whose
    runtime has no aarch64 wheel here.
    """
    options = replace(
        options,
        least_rounds=min(options.least_rounds, LEAST_ROUNDS),
        time_limit_s=min(options.time_limit_s, TIME_LIMIT_S),
    )
    profile = (
        None
        if target in ("host", ANY)
        else target
        if isinstance(target, TargetProfile)
        else load_target(target)
    )
    emulator = for_target(emulator or required(), profile)
    plan, subjects = make_plan(artifacts, options)
    for name, subject in subjects.items():
        if subject.runtime not in RUNTIMES:
            raise InputError(
                f"{name}: no aarch64 runtime {subject.runtime!r} is prepared for emulation; there are {', '.join(RUNTIMES)}"
            )
        if RUNTIMES[subject.runtime][0][0] not in emulator.versions:
            raise InputError(
                f"{name}: the aarch64 runtime is not prepared; run `vitrim targets emulate --runtime {subject.runtime}`, then measure"
            )
    start = emulator.command(["python3"])
    for job in plan["jobs"].values():
        job["command"] = start
    plan |= {
        "command": start,
        "emulator": emulator.name,
        "warm_limit_s": 2.0,
        "reply_limit_s": 1800.0,
    }
    with progress_bar(quiet=quiet, replacement=progress) as tell:
        try:
            raw = conduct(plan, tell)
        except ConductorError as error:
            raise InputError(str(error)) from None
    found = assemble(raw, plan, subjects, target=profile.name if profile else ANY, device=DEVICE)
    memory = {"floor_rss_bytes": None, "peak_rss_bytes": None, "steady_rss_bytes": None}
    nobodys = {**memory, "cpu_share": None, "energy_per_inference_j": None, "energy_source": None}
    return {name: measured.model_copy(update=nobodys) for name, measured in found.items()}


def required() -> Emulator:
    """The emulator that was prepared. Errors: InputError with the command that prepares it."""
    found = ready()
    if found is None:
        raise InputError(
            "aarch64 emulation is not prepared on this machine; run `vitrim targets emulate` (half a minute, 210 MB), then measure again"
        )
    return found


def for_target(emulator: Emulator, profile: TargetProfile | None) -> Emulator:
    """The emulator as the processor of a device. Errors: InputError for one that is no aarch64."""
    if profile is None:
        return emulator
    if profile.architecture != "aarch64":
        raise InputError(
            f"target {profile.name!r} is {profile.architecture}, and qemu-aarch64 emulates aarch64; name a board (vitrim targets list)"
        )
    return emulator.like([cluster.core for cluster in profile.clusters], profile.features)
