"""A device as data: one TOML file each, checked key by key, every number with its source or the
mark `unverified`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .vector import VectorUnit, vector_unit

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["fp32", "fp16", "int8"]
# What `tvm.target.Target` takes since TVM 0.27, which refuses the command-line form ("llvm
# -mcpu=...").
TvmTarget = dict[str, str | int | list[str]]
UNVERIFIED = "unverified"


class Plain(BaseModel):
    """Frozen data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Cluster(Plain):
    """Equal cores: the core's name, how many there are, and their highest sustained clock in
    hertz.
    """

    core: str
    cores: Count
    frequency_hz: Rate


class Memory(Plain):
    """Bytes and bytes a second. flash_bytes is given where weights stay in flash and are read from
    there (microcontrollers).
    """

    ram_bytes: Count
    flash_bytes: Count | None = None
    bandwidth_bytes_per_s: Rate | None = None
    l1d_bytes: Count | None = None
    l2_bytes: Count | None = None
    l3_bytes: Count | None = None


class Peak(Plain):
    """Multiply-adds a second of the unit that the preferred runtime uses, all its cores together;
    the theoretical peak, not a speed.
    """

    fp32_macs_per_s: Rate | None = None
    fp16_macs_per_s: Rate | None = None
    int8_macs_per_s: Rate | None = None

    def of(self, precision: Precision) -> float | None:
        """The peak at a precision, or None where the device has no such unit or nobody says."""
        return {
            "fp32": self.fp32_macs_per_s,
            "fp16": self.fp16_macs_per_s,
            "int8": self.int8_macs_per_s,
        }[precision]


class TargetProfile(Plain):
    """A device: what it is, what it can do at most, and how a model should be made for it.

    round_to: widths in multiples of this are quick there. sources: a dotted key, or the table that
    holds it, to where its numbers come from: an address, `measured` and how, `derived` and from
    what, or `unverified`.
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
                raise ValueError(
                    f"the number {key} has no source; add {key.rsplit('.', 1)[0]!r} to [sources], or say {UNVERIFIED!r} there"
                )
        return self

    @field_validator("tvm_target", mode="before")
    @classmethod
    def _as_tvm_wants_it(cls, value: Any) -> Any:
        # Profiles written for older TVMs hold the command-line form.
        if not isinstance(value, str):
            return value
        kind, *options = value.split() or [""]
        found: dict[str, str | list[str]] = {"kind": kind}
        for option in options:
            name, equals, setting = option.lstrip("-").partition("=")
            if not equals:
                raise ValueError(
                    f'{option!r} is no option of a TVM target; write a table, {{ kind = "llvm", mcpu = "cortex-a72" }}'
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
        return dict(
            _numbers(
                self.model_dump(exclude={"sources", "round_to", "tvm_target"}, exclude_none=True)
            )
        )

    def source_of(self, key: str) -> str | None:
        """Where a number comes from: the longest entry of [sources] that is the key or a table
        around it.
        """
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
