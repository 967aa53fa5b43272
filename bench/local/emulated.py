"""Measure under qemu-aarch64: the device's runner, engines and artifact, on this machine.

Outputs and top-1 are the device's; times are not, and every measurement is marked as emulated.
Memory is left out, since the system reports that of the emulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...core.errors import InputError
from ...core.progress import Progress, progress_bar
from ...targets.catalog import load_target
from ...targets.emulation import Emulator, ready
from ...targets.emulation.preparation import RUNTIMES
from ...targets.profile import TargetProfile
from ..results.measurement import Measurement
from .conductor import ConductorError, conduct
from .measure import Measurable, assemble, make_plan
from .options import MeasureOptions

DEVICE = "qemu-aarch64"
# Emulated times have no meaning, so they need no precision.
LEAST_ROUNDS, TIME_LIMIT_S = 2, 20.0
# The target of a measurement without a named one.
ANY = "aarch64"
# Fields of a measurement that would describe the emulator and not the device.
MEANINGLESS = (
    *("floor_rss_bytes", "peak_rss_bytes", "steady_rss_bytes", "cpu_share"),
    *("energy_per_inference_j", "energy_source"),
)


def measure_emulated(
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    *,
    target: TargetProfile | str = "host",
    emulator: Emulator | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Run artifacts under emulation, interleaved.

    Args:
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        options: What is measured; rounds and time are limited to a few, since times have no
            meaning here.
        target: The device whose processor is emulated; `host` for every instruction of qemu's.
        emulator: The emulation, by default the prepared one.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        {name: measurement}, with the emulator in its environment.

    Raises:
        InputError: The emulation or a runtime is not prepared, the target is not aarch64, or a
            runner failed.
    """
    options = replace(
        options,
        least_rounds=min(options.least_rounds, LEAST_ROUNDS),
        time_limit_s=min(options.time_limit_s, TIME_LIMIT_S),
    )
    profile: TargetProfile | None = None
    if target not in ("host", ANY):
        profile = target if isinstance(target, TargetProfile) else load_target(target)
    emulator = for_target(emulator or required_emulator(), profile)
    plan, facts = make_plan(artifacts, options)
    for name, about in facts.items():
        _require_runtime(name, about.runtime, emulator)
    start = emulator.command(["python3"])
    for job in plan["jobs"].values():
        job["command"] = start
    plan |= {
        "command": start,
        "emulator": emulator.name,
        "warm_limit_s": 2.0,
        "reply_limit_s": 1800.0,
    }
    with progress_bar(quiet=quiet, replacement=progress) as report:
        try:
            raw = conduct(plan, report)
        except ConductorError as error:
            raise InputError(str(error)) from None
    found = assemble(raw, plan, facts, target=profile.name if profile else ANY, device=DEVICE)
    meaningless = dict.fromkeys(MEANINGLESS)
    return {name: measured.model_copy(update=meaningless) for name, measured in found.items()}


def _require_runtime(name: str, runtime: str, emulator: Emulator) -> None:
    if runtime not in RUNTIMES:
        raise InputError(
            f"{name}: no aarch64 runtime {runtime!r} is prepared for emulation; "
            f"there are {', '.join(RUNTIMES)}"
        )
    if RUNTIMES[runtime][0][0] not in emulator.versions:
        raise InputError(
            f"{name}: the aarch64 runtime is not prepared; "
            f"run `vitrim targets emulate --runtime {runtime}`, then measure"
        )


def required_emulator() -> Emulator:
    """Return the prepared emulation; raises InputError with the command that prepares it."""
    found = ready()
    if found is None:
        raise InputError(
            "aarch64 emulation is not prepared on this machine; "
            "run `vitrim targets emulate` (half a minute, 210 MB), then measure again"
        )
    return found


def for_target(emulator: Emulator, profile: TargetProfile | None) -> Emulator:
    """Return an emulator of a device's processor; raises InputError for other architectures."""
    if profile is None:
        return emulator
    if profile.architecture != "aarch64":
        raise InputError(
            f"target {profile.name!r} is {profile.architecture}, and qemu-aarch64 emulates "
            "aarch64; name a board (vitrim targets list)"
        )
    return emulator.like([cluster.core for cluster in profile.clusters], profile.features)
