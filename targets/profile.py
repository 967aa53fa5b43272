"""A device as data: one TOML file, validated key by key.

Every number has a source, or the mark `unverified`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .vector import VectorUnit, vector_unit

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["fp32", "fp16", "int8"]
# The argument of `tvm.target.Target` since TVM 0.27, which refuses the command-line form
# ("llvm -mcpu=...").
TvmTarget = dict[str, str | int | list[str]]
UNVERIFIED = "unverified"


class Plain(BaseModel):
    """Frozen data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Cluster(Plain):
    """Cores of one kind.

    Attributes:
        core: The core's name.
        cores: How many there are.
        frequency_hz: Their highest sustained clock.
    """

    core: str
    cores: Count
    frequency_hz: Rate


class Memory(Plain):
    """Sizes in bytes, bandwidth in bytes a second; caches are those of one core.

    `flash_bytes` is present where weights stay in flash and are read from there (microcontrollers).
    """

    ram_bytes: Count
    flash_bytes: Count | None = None
    bandwidth_bytes_per_s: Rate | None = None
    l1d_bytes: Count | None = None
    l2_bytes: Count | None = None
    l3_bytes: Count | None = None


class Peak(Plain):
    """Theoretical peak of the unit that the preferred runtime uses, in multiply-adds a second.

    The sum over all cores; not a measured rate.
    """

    fp32_macs_per_s: Rate | None = None
    fp16_macs_per_s: Rate | None = None
    int8_macs_per_s: Rate | None = None

    def of(self, precision: Precision) -> float | None:
        """The peak at a precision, or None where it is unknown or the device has no such unit."""
        return {
            "fp32": self.fp32_macs_per_s,
            "fp16": self.fp16_macs_per_s,
            "int8": self.int8_macs_per_s,
        }[precision]


class TargetProfile(Plain):
    """A device, its limits, and how to prepare a model for it.

    Attributes:
        name: The name by which commands and recipes refer to it.
        triple: The triple of its machine code, such as `aarch64-linux-gnu`.
        features: Instruction sets, as /proc/cpuinfo names them.
        preferred_runtime: The runtime that artifacts are exported for by default.
        preferred_precision: The precision that artifacts are exported in by default.
        round_to: Widths in multiples of this are fast.
        tvm_target: Options of `tvm.target.Target`, None where TVM generates no code.
        sources: From a dotted key, or the table that contains it, to the source of its numbers: an
            address, `measured` and how, `derived` and from what, or `unverified`.
    """

    schema_: Literal["vitrim.target/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]
    title: str
    vendor: str
    kind: Literal["cpu", "gpu", "board", "phone", "microcontroller"]
    architecture: str
    triple: str
    features: tuple[str, ...] = ()
    accelerator: str | None = None
    preferred_runtime: str
    preferred_precision: Precision
    round_to: Count
    tvm_target: TvmTarget | None = None
    notes: tuple[str, ...] = ()
    clusters: tuple[Cluster, ...] = Field(min_length=1)
    memory: Memory
    peak: Peak = Peak()
    sources: dict[str, str]

    @model_validator(mode="after")
    def _every_number_has_a_source(self) -> TargetProfile:
        for key in self.numbers():
            if self.source_of(key) is None:
                table = key.rsplit(".", 1)[0]
                raise ValueError(
                    f"the number {key} has no source; "
                    f"add {table!r} to [sources], with {UNVERIFIED!r} where there is none"
                )
        return self

    @field_validator("tvm_target", mode="before")
    @classmethod
    def _as_options(cls, value: Any) -> Any:
        # Profiles written for older TVMs contain the command-line form.
        if not isinstance(value, str):
            return value
        kind, *options = value.split() or [""]
        found: dict[str, str | list[str]] = {"kind": kind}
        for option in options:
            name, equals, setting = option.lstrip("-").partition("=")
            if not equals:
                raise ValueError(
                    f"{option!r} is no option of a TVM target; "
                    'write a table, { kind = "llvm", mcpu = "cortex-a72" }'
                )
            found[name] = setting.split(",") if name == "mattr" else setting
        return found

    @property
    def vector(self) -> VectorUnit:
        """Width and registers of the widest vector instructions that the features name."""
        return vector_unit(self.architecture, self.features)

    @property
    def cores(self) -> int:
        """CPU cores of all clusters."""
        return sum(cluster.cores for cluster in self.clusters)

    def numbers(self) -> dict[str, float]:
        """Every number of the profile by its dotted key, clusters counted from 0."""
        not_facts = {"sources", "round_to", "tvm_target"}
        return dict(_numbers(self.model_dump(exclude=not_facts, exclude_none=True)))

    def source_of(self, key: str) -> str | None:
        """The source of a number: the longest entry of [sources] that is the key or contains it."""
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            if (found := self.sources.get(".".join(parts[:length]))) is not None:
                return found
        return None


def _numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{prefix}.{index}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield prefix, float(value)
