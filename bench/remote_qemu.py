"""`--on qemu-aarch64`: the device's runner, in Python or in C++, as an emulated processor; its times are no device's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..targets.profile import TargetProfile
from .conductor import Child, Here
from .emulated import measure_emulated
from .emulation import Emulator
from .measure import Measurable
from .measurement import Measurement
from .options import DeviceOptions, MeasureOptions
from .progress import Progress

# Times under emulation are nobody's, so they need not be known well.
LEAST_ROUNDS, TIME_LIMIT_S = 2, 20.0


class NativeEmulated(Here):
    """The place of emulated runners in C++; the facts of the machine come from the emulated Python all the same."""

    def __init__(self, emulator: Emulator, command: list[str]) -> None:
        super().__init__(emulator.command(["python3"]))
        self.native = emulator.command(command)

    def child(self, name: str, job: dict[str, Any], reply_limit_s: float) -> Child:
        """A runner that has loaded its model."""
        return Child(name, job, reply_limit_s, self.native)


def measure_under_qemu(
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    device: DeviceOptions | None = None,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Run artifacts under qemu-aarch64, interleaved; a few rounds, since only answers and counts are taken from them. Errors: InputError."""
    named = asdict(options)
    named["least_rounds"] = min(options.least_rounds, LEAST_ROUNDS)
    named["time_limit_s"] = min(options.time_limit_s, TIME_LIMIT_S)
    threads = named.pop("threads")
    del device
    return measure_emulated(artifacts, threads, target=target, quiet=quiet, progress=progress, **named)
