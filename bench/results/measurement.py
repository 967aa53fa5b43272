"""The measurement of one artifact on one device: raw samples, memory, top-1 and environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...core.errors import InputError
from ...core.storage import replace_file
from ...core.written_kinds import json_kind
from ...targets.catalog import present_name
from .operator_table import OperatorRow
from .statistics import Interval, Summary, median_interval, summarise

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]
MEASUREMENT = json_kind("a measurement", "vitrim.measurement/1")
# The note of every table on a time that was taken under an emulator.
NOT_LATENCY = "not a device's latency"


class Environment(BaseModel):
    """The machine during the measurement; what it does not report is None.

    It contains no host name, user name or path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_model: str | None = None
    cpu_model: str | None = None
    architecture: str | None = None
    cpu_features: tuple[str, ...] = ()
    cores: int | None = None
    frequency_hz: float | None = None
    frequency_max_hz: float | None = None
    frequency_limit_hz: float | None = None
    governor: str | None = None
    virtual_machine: str | None = None
    emulator: str | None = None
    accelerator: str | None = None
    load_before: float | None = None
    load_after: float | None = None
    busy_cores_before: float | None = None
    busy_cores_after: float | None = None
    temperature_before_c: float | None = None
    temperature_after_c: float | None = None
    throttled: str | None = None
    stolen_share: float | None = None
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    os: str | None = None
    kernel: str | None = None
    python: str | None = None
    libraries: dict[str, str] = {}


class Bucket(BaseModel):
    """The bucket of an artifact that keeps other numbers of patches of other images.

    Attributes:
        patches: Number of patches that every image kept while this was measured.
        counts: The numbers of all buckets, increasing; the last one bounds the latency.
        share: Share of the images that get this number by their scores; None where it is unknown.
        images: Number of images that the share rests on, if known.
        source: What images these are: those of the data set that was scored, or those that the
            buckets were calibrated on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patches: int = Field(ge=1)
    counts: tuple[int, ...] = Field(min_length=2)
    share: float | None = Field(None, ge=0, le=1)
    images: int | None = Field(None, ge=1)
    source: Literal["data set", "calibration"] | None = None

    @model_validator(mode="after")
    def _one_of_the_counts(self) -> Bucket:
        if self.patches not in self.counts or list(self.counts) != sorted(set(self.counts)):
            raise ValueError(
                f"patches {self.patches} must be one of increasing counts {list(self.counts)}"
            )
        if (self.share is None) != (self.source is None):
            raise ValueError("share and source need each other")
        return self


def of_earlier_version(data: Any) -> bool:
    """Whether this is a measurement's file whose target has the name of an earlier version."""
    return isinstance(data, dict) and "schema" in data and "target_features" not in data


class Measurement(BaseModel):
    """Raw samples of one artifact; statistics are derived by `summary()` and `interval()`.

    Attributes:
        name: Title of the artifact.
        target: Name of the device profile.
        target_features: Its instruction sets, where it is a shipped one. Files of earlier versions
            lack the key; the names of their targets have their former meaning.
        device: How the device was reached: host, ssh, adb, ...
        started_at: UTC time, ISO 8601.
        session: Identifier shared by measurements that were interleaved turn by turn.
        artifact_sha256: Digest of the artifact.
        file_bytes: Size of its files.
        precision: As stated in the manifest.
        runtime: Name of the runtime.
        runtime_version: Its version.
        provider: The execution provider or device that ran the model.
        provider_nodes: How many nodes each provider ran.
        copies_timed: On a GPU, whether copies of images and logits are part of the time.
        cuda_graph: On a GPU, whether a recorded graph was replayed.
        input_shape: (batch, channels, height, width).
        input_type: Type of the input.
        batch: Images per inference.
        threads: Threads of the runtime.
        pinning: CPUs that the process was pinned to.
        niceness: Niceness of the process.
        spinning: Whether threads waited busily inside a call.
        arena: Whether the runtime kept the memory that it allocated.
        latency_s: Seconds of each inference, in order.
        samples_per_turn: How many of the samples each turn took.
        first_inference_s: Seconds of the first inference.
        load_s: Seconds of loading the model.
        warm_up_count: Inferences of the warm-up.
        warm_up_stable: Whether its last two windows agreed.
        floor_rss_bytes: Memory of the process with the runtime imported and no model loaded.
        peak_rss_bytes: Peak memory of the process, the floor included.
        steady_rss_bytes: Memory of the process after the last turn.
        peak_rss_exact: False where the peak may include the import of the runtime.
        arena_bytes: Memory that the runtime's allocator held.
        device_memory_peak_bytes: Peak of the GPU's memory.
        cpu_share: Share of the timed calls in which the process had the processor.
        energy_per_inference_j: Joules of one inference.
        energy_source: The energy meter and its scope.
        top1: Share of correctly classified images.
        correct: Number of correctly classified images.
        total: Number of classified images.
        operators: The runtime's own profile, where it was requested.
        bucket: The bucket that was measured, of an artifact with buckets. With a share, top-1 is
            that of the images that get it.
        environment: The machine during the measurement.
        warnings: What makes the figures doubtful, and what to do about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["vitrim.measurement/1"] = Field("vitrim.measurement/1", alias="schema")
    name: str
    target: str = "host"
    target_features: tuple[str, ...] | None = None
    device: str = "host"
    started_at: str
    session: str

    artifact_sha256: str
    file_bytes: Bytes
    precision: str | None = None
    runtime: str
    runtime_version: str
    provider: str
    provider_nodes: dict[str, int] | None = None
    copies_timed: bool | None = None
    cuda_graph: bool = False
    input_shape: tuple[int, ...]
    input_type: str
    batch: int = Field(1, ge=1)

    threads: int = Field(ge=1)
    pinning: tuple[int, ...] | None = None
    niceness: int | None = None
    spinning: bool = False
    arena: bool = True

    latency_s: tuple[Seconds, ...] = Field(min_length=1)
    samples_per_turn: tuple[int, ...] = ()
    first_inference_s: Seconds
    load_s: Seconds
    warm_up_count: int = Field(ge=0)
    warm_up_stable: bool
    floor_rss_bytes: Bytes | None = None
    peak_rss_bytes: Bytes | None = None
    steady_rss_bytes: Bytes | None = None
    peak_rss_exact: bool = True
    arena_bytes: Bytes | None = None
    device_memory_peak_bytes: Bytes | None = None
    cpu_share: float | None = None
    energy_per_inference_j: float | None = None
    energy_source: str | None = None

    top1: float | None = Field(None, ge=0, le=1)
    correct: int | None = Field(None, ge=0)
    total: int | None = Field(None, ge=1)

    operators: tuple[OperatorRow, ...] = ()
    bucket: Bucket | None = None

    environment: Environment
    warnings: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _present_target(cls, data: Any) -> Any:
        if not of_earlier_version(data) or not isinstance(data.get("target"), str):
            return data
        return {**data, "target": present_name(data["target"])}

    @model_validator(mode="after")
    def _consistent(self) -> Measurement:
        if self.samples_per_turn and sum(self.samples_per_turn) != len(self.latency_s):
            raise ValueError(
                f"samples_per_turn sums to {sum(self.samples_per_turn)}, "
                f"but latency_s holds {len(self.latency_s)}"
            )
        scored = (self.top1, self.correct, self.total)
        if any(value is not None for value in scored):
            if self.top1 is None or self.correct is None or self.total is None:
                raise ValueError("top1, correct and total must be given jointly")
            if self.correct > self.total or abs(self.top1 - self.correct / self.total) > 1e-9:
                raise ValueError(
                    f"top1 {self.top1} is not correct / total = {self.correct} / {self.total}"
                )
        return self

    @property
    def emulated(self) -> bool:
        """Whether the processor was emulated: the outputs are the device's, the times are not."""
        return self.environment.emulator is not None

    @property
    def of_all_images(self) -> bool:
        """Whether top-1 is that of the whole data set, not of the images of one bucket."""
        return self.bucket is None or self.bucket.share is None

    @property
    def beyond_floor_rss_bytes(self) -> int | None:
        """Memory of the model itself: the peak minus the floor."""
        if self.peak_rss_bytes is None or self.floor_rss_bytes is None:
            return None
        return max(0, self.peak_rss_bytes - self.floor_rss_bytes)

    def summary(self) -> Summary:
        """Return p50, p90, p99, mean, spread and throughput of the samples."""
        return summarise(self.latency_s, batch=self.batch)

    def interval(self, level: float = 0.95) -> Interval:
        """Return the confidence interval of the p50, in seconds."""
        return median_interval(self.latency_s, self.samples_per_turn or None, level=level)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, with the key `schema`."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: Path | str) -> None:
        """Write JSON (schema vitrim.measurement/1), atomically.

        Raises:
            InputError: The file exists and is no measurement, or cannot be written.
        """
        replace_file(path, json.dumps(self.to_dict(), indent=1) + "\n", MEASUREMENT)

    @classmethod
    def load(cls, path: Path | str) -> Measurement:
        """Read a saved measurement; raises InputError with the file and the wrong key."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); "
                "give the JSON file that `vitrim bench` wrote"
            ) from None
        except UnicodeDecodeError:
            raise InputError(
                f"{path}: not a text file; give the JSON file that `vitrim bench` wrote"
            ) from None
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(
                f"{path}: not JSON ({error}); measure again with `vitrim bench`"
            ) from None
        if not isinstance(data, dict) or data.get("schema") != "vitrim.measurement/1":
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise InputError(
                f"{path}: schema is {found!r}, not 'vitrim.measurement/1'; "
                "give a file that `vitrim bench` wrote"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the measurement"
            raise InputError(
                f"{path}: {key}: {first['msg']}; measure again with `vitrim bench`"
            ) from None
