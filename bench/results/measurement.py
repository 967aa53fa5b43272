"""One artifact's run on one device: raw samples with their units, and the environment in which they
were taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...core.errors import InputError
from ...core.storage import replace_file
from .operator_table import OperatorRow
from .statistics import Interval, Summary, median_interval, summarise

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]
# What every table says beside a time that an emulator took.
NOT_LATENCY = "not a device's latency"


class Environment(BaseModel):
    """The machine at the time of the run; what it does not tell is None. Holds no host name, user
    name or path.
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


class Measurement(BaseModel):
    """Raw samples of one artifact. Statistics are derived by `summary()` and `interval()`, never
    stored.

    latency_s: the time of each inference call, in order; samples_per_turn: how many of them each
    turn took (they sum to the samples); session: equal in measurements whose turns were
    interleaved, turn by turn, on one machine; peak_rss_bytes includes floor_rss_bytes, the memory
    of the process with the runtime imported and no model loaded; operators: the runtime's own
    profile, where it was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["vitrim.measurement/1"] = Field("vitrim.measurement/1", alias="schema")
    name: str
    target: str = "host"
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
    # On a GPU: whether carrying the images there and the logits back was timed, and whether a
    # recorded graph was replayed.
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

    environment: Environment
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Measurement:
        if self.samples_per_turn and sum(self.samples_per_turn) != len(self.latency_s):
            raise ValueError(
                f"samples_per_turn sums to {sum(self.samples_per_turn)}, but latency_s holds {len(self.latency_s)}"
            )
        scored = (self.top1, self.correct, self.total)
        if any(value is not None for value in scored):
            if self.top1 is None or self.correct is None or self.total is None:
                raise ValueError("top1, correct and total come together or not at all")
            if self.correct > self.total or abs(self.top1 - self.correct / self.total) > 1e-9:
                raise ValueError(
                    f"top1 {self.top1} is not correct / total = {self.correct} / {self.total}"
                )
        return self

    @property
    def emulated(self) -> bool:
        """The processor was emulated: outputs and counts are the device's, the times are not."""
        return self.environment.emulator is not None

    @property
    def beyond_floor_rss_bytes(self) -> int | None:
        """The memory that the model itself asks for: peak minus the runtime's own floor."""
        if self.peak_rss_bytes is None or self.floor_rss_bytes is None:
            return None
        return max(0, self.peak_rss_bytes - self.floor_rss_bytes)

    def summary(self) -> Summary:
        """p50, p90, p99, mean, spread and throughput of the samples."""
        return summarise(self.latency_s, batch=self.batch)

    def interval(self, level: float = 0.95) -> Interval:
        """Confidence interval of the p50, in seconds."""
        return median_interval(self.latency_s, self.samples_per_turn or None, level=level)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with the key `schema`."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: Path | str) -> None:
        """Write JSON (schema vitrim.measurement/1), whole or not at all."""
        replace_file(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Measurement:
        """Read a saved measurement; InputError names the file and the key that is wrong."""
        path = Path(path)
        try:
            text = path.read_text()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); give the JSON file that `vitrim bench` wrote"
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
                f"{path}: schema is {found!r}, not 'vitrim.measurement/1'; give a file that `vitrim bench` wrote"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the measurement"
            raise InputError(
                f"{path}: {key}: {first['msg']}; measure again with `vitrim bench`"
            ) from None
