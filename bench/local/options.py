"""The options of every way of measuring, validated at construction, and the available providers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ...core.errors import InputError

CPU = "CPUExecutionProvider"
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and for how long.

    The rounds end when every ratio to the first artifact (or the single artifact's p50) is known to
    ± `half_width` at 95 %, after at least `least_rounds`; or after `most_rounds` or `time_limit_s`.

    Attributes:
        threads: Threads of the runtime.
        dataset: Data for top-1: an .npz with `labels` (N) and `images` (N, C, H, W), float32 as the
            model takes them or uint8, which the manifest's mean and std normalise; or a folder of
            images.npy and labels.npy. Without one top-1 is not counted.
        dataset_limit: Use only so many images of the data set; all by default.
        time_limit_s: Time limit of the rounds in seconds.
        half_width: Relative half width of the interval at which the rounds end.
        least_rounds: Smallest number of rounds.
        most_rounds: Largest number of rounds.
        batch: Batch size of models whose batch dimension is free.
        bucket: Number of patches that every image keeps, for artifacts with buckets: one of their
            counts. None: each bucket is measured, and top-1 is that of the images in it.
        pinning: CPU numbers that the runners are pinned to; no pinning by default.
        priority: "high" lets the runners run before other processes where that is permitted. The
            niceness that they got is recorded.
        spinning: Whether threads wait busily inside a call.
        arena: Whether the runtime keeps the memory that it allocated.
        providers: Execution providers of onnxruntime, preferred ones first.
        copies: On a GPU, whether the time includes copying images there and logits back.
        cuda_graph: On a GPU, whether a recorded CUDA graph is replayed.
        seed: Seed of the random images and of the order in a round.
        profile_runs: Inferences of the profile by operator; 0 for no profile.

    Raises:
        InputError: A number is out of range.
    """

    threads: int = 1
    dataset: Path | str | None = None
    dataset_limit: int | None = None
    time_limit_s: float = 60.0
    half_width: float = 0.01
    least_rounds: int = 20
    most_rounds: int = 1000
    batch: int | None = None
    bucket: int | None = None
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
                raise InputError(f"{label} = {value}: must be at least 1")
        if self.time_limit_s <= 0 or self.half_width <= 0:
            raise InputError(
                f"time_limit_s = {self.time_limit_s}, half_width = {self.half_width}: "
                "both must be above 0"
            )
        if self.profile_runs < 0:
            raise InputError(f"profile_runs = {self.profile_runs}: must be 0 or more")
        # Lists are accepted and become immutable.
        object.__setattr__(self, "pinning", tuple(self.pinning) if self.pinning else None)
        object.__setattr__(self, "providers", tuple(self.providers) or (CPU,))


@dataclass(frozen=True)
class DeviceOptions:
    """How to reach a device, and what to run there.

    Attributes:
        python: The interpreter on the device.
        runner: "python" (needs Python 3.9 with numpy and the runtime on the device), "native" (the
            C++ runner and the runtime's library are sent), or "auto": native where the device has
            no Python.
        runner_file: A native runner to send; by default it is built.
        runtime_library: ONNX Runtime's shared library to send; by default that of the wheel.
        ssh_options: Options of ssh, such as ("-i", "key").
        folder: The folder on the device that holds the files while they run; by default a folder
            of the user's cache.
        patience_s: How long to retry after the link is lost, in seconds.
        poll_s: Seconds between two looks at a run on the device.
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


def split_options(named: Mapping[str, Any]) -> tuple[MeasureOptions, DeviceOptions]:
    """Split named options into those of the measurement and those of the device.

    Raises TypeError for a name that neither of them has.
    """
    of_device = {field.name for field in fields(DeviceOptions)}
    device = {key: value for key, value in named.items() if key in of_device}
    measure = {key: value for key, value in named.items() if key not in of_device}
    return MeasureOptions(**measure), DeviceOptions(**device)


def why_no_gpu() -> str | None:
    """Return None where onnxruntime can use an NVIDIA GPU, else what is missing, in one line."""
    from ...runtimes.onnxruntime_engine import device_memory_used_bytes

    if device_memory_used_bytes() is None:
        return (
            "no GPU is measured here: the NVIDIA driver's management library finds none "
            "(libnvidia-ml.so.1); run this on a machine with a GPU and its driver"
        )
    try:
        import onnxruntime
    except ImportError:
        return "no GPU is measured here: onnxruntime is missing; pip install onnxruntime-gpu"
    if GPU_PROVIDERS[0] not in onnxruntime.get_available_providers():
        return (
            f"no GPU is measured here: this onnxruntime {onnxruntime.__version__} has no "
            f"{GPU_PROVIDERS[0]}; pip install onnxruntime-gpu in its place"
        )
    return None


def gpu_providers() -> list[str]:
    """Return the GPU providers of this onnxruntime, CUDA first."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [provider for provider in GPU_PROVIDERS if provider in available]
