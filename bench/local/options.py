"""How to measure, said once: the options of every way of measuring, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ...core.errors import InputError

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured and for how long. The rounds end when every ratio to the first artifact (or
    the one artifact's p50) is known to ± `half_width` at 95 %, after at least `least_rounds`, or
    when `time_limit_s` of rounds have passed.

    dataset: an .npz with `images` (N, C, H, W) float32 as the model takes them, or bytes that the
    manifest's mean and std normalise, and `labels` (N); batch: for a model whose batch is free;
    pinning: CPU numbers; priority: "high" lets the runners go before other work where that is
    permitted (the niceness they got is recorded); spinning: threads wait busily inside a call;
    arena: the runtime keeps its memory; providers: onnxruntime's, best first; copies: on a GPU,
    time carrying the images there and the logits back; cuda_graph: replay a recorded graph there;
    profile_runs: inferences of the per-operator profile, 0 for none. Errors: InputError, one line,
    with the number that is out of range.
    """

    threads: int = 1
    dataset: Path | str | None = None
    dataset_limit: int | None = None
    time_limit_s: float = 60.0
    half_width: float = 0.01
    least_rounds: int = 20
    most_rounds: int = 1000
    batch: int | None = None
    pinning: tuple[int, ...] | None = None
    priority: Literal["high", "normal"] = "high"
    spinning: bool = False
    arena: bool = True
    providers: tuple[str, ...] = (CPU,)
    copies: bool = True
    cuda_graph: bool = False
    seed: int = 0
    profile_runs: int = 0

    def __post_init__(self) -> None:
        counts = {
            "threads": self.threads,
            "batch": self.batch or 1,
            "least_rounds": self.least_rounds,
            "most_rounds": self.most_rounds,
        }
        for label, value in counts.items():
            if value < 1:
                raise InputError(f"{label} = {value}: at least 1 is wanted")
        if self.time_limit_s <= 0 or self.half_width <= 0:
            raise InputError(
                f"time_limit_s = {self.time_limit_s}, half_width = {self.half_width}: both must be above 0"
            )
        if self.profile_runs < 0:
            raise InputError(f"profile_runs = {self.profile_runs}: 0 or more is wanted")
        # Lists are taken too; what is kept cannot be changed.
        object.__setattr__(self, "pinning", tuple(self.pinning) if self.pinning else None)
        object.__setattr__(self, "providers", tuple(self.providers) or (CPU,))


@dataclass(frozen=True)
class DeviceOptions:
    """How to reach a device and what to run there.

    python: the interpreter there; runner: "python" (needs Python 3.9 with numpy and the runtime
    there), "native" (the C++ runner and the runtime's library are sent) or "auto": native where
    there is no Python; runner_file, runtime_library: take these instead of what is built here;
    folder: where the files lie there while it runs; patience_s: how long a lost link is tried
    again, every `poll_s`.
    """

    python: str = "python3"
    runner: Literal["auto", "python", "native"] = "auto"
    runner_file: Path | None = None
    runtime_library: Path | None = None
    ssh_options: tuple[str, ...] = ()
    folder: str | None = None
    patience_s: float = 300.0
    poll_s: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ssh_options", tuple(self.ssh_options))


def told_apart(named: Mapping[str, Any]) -> tuple[MeasureOptions, DeviceOptions]:
    """Options given by name, sorted into the two. Errors: TypeError for a name that is in
    neither.
    """
    of_device = {field.name for field in fields(DeviceOptions)}
    device = {key: value for key, value in named.items() if key in of_device}
    return MeasureOptions(
        **{key: value for key, value in named.items() if key not in of_device}
    ), DeviceOptions(**device)
