"""Measured latencies: vitrim's own, and those that others published."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...core.errors import InputError
from ...targets.profile import Precision, Rate
from .machine import Machine
from .workload import PlainVit, Workload

PUBLISHED = Path(__file__).with_name("published.toml")
MEASURED = Path(__file__).with_name("measured.json")


def family_of(runtime: str, precision: Precision) -> str:
    """Return the family of similar measurements: a runtime in floating point, or in int8."""
    return f"{runtime} int8" if precision == "int8" else runtime


@dataclass(frozen=True)
class Point:
    """One measured latency.

    Attributes:
        machine: The machine with its threads and precision.
        family: The runtime, in floating point or int8; see `family_of`.
        workload: The model.
        latency_s: Seconds of one inference.
        source: Who measured it.
        setting: What distinguishes it from other measurements of the device.
    """

    machine: Machine
    family: str
    workload: Workload
    latency_s: float
    source: str
    setting: str = ""

    @property
    def label(self) -> str:
        """The device, its setting and its threads, for tables."""
        threads = self.machine.threads
        device = f"{self.machine.device} {self.setting}".rstrip()
        return f"{device}, {threads} thread{'s' * (threads > 1)}"


class Plain(BaseModel):
    """Frozen data that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Model(Plain):
    """The sizes of a plain ViT."""

    image: int
    patch: int
    embed: int
    depth: int
    heads: int
    classes: int = 1000
    channels: int = 3

    def vit(self) -> PlainVit:
        """Return the ViT, with an FFN of four times the residual width."""
        return PlainVit(
            self.image,
            self.patch,
            self.embed,
            self.depth,
            self.heads,
            4 * self.embed,
            self.classes,
            self.channels,
        )


class Processor(Plain):
    """A device with measured latencies; multiply-adds per cycle are those of one core.

    `source` states where the numbers come from.
    """

    title: str
    architecture: str
    cores: int = Field(ge=1)
    clock_hz: Rate
    lanes: int = Field(ge=1)
    fp32_macs_per_cycle: Rate
    fp16_macs_per_cycle: Rate | None = None
    int8_macs_per_cycle: Rate | None = None
    bandwidth_bytes_per_s: Rate | None = None
    last_cache_bytes: int = 0
    source: str

    def machine(self, device: str, threads: int, precision: Precision) -> Machine:
        """Return the machine with `threads` threads at a precision."""
        rates = {
            "fp32": self.fp32_macs_per_cycle,
            "fp16": self.fp16_macs_per_cycle,
            "int8": self.int8_macs_per_cycle,
        }
        used = min(threads, self.cores)
        float_rate = rates["fp16"] if precision == "fp16" else None
        return Machine(
            device=device,
            architecture=self.architecture,
            threads=threads,
            precision=precision,
            clock_hz=self.clock_hz,
            peak_macs_per_s=used * self.clock_hz * (rates[precision] or self.fp32_macs_per_cycle),
            float_macs_per_s=used * self.clock_hz * (float_rate or self.fp32_macs_per_cycle),
            vector_numbers_per_s=used * self.clock_hz * self.lanes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            last_cache_bytes=self.last_cache_bytes,
        )


class Latency(Plain):
    """One published or measured latency.

    `last_queries`: in the last block the graph computes only the class token's row.
    """

    processor: str
    model: str
    runtime: str
    precision: Precision
    threads: int = Field(ge=1)
    latency_s: Annotated[float, Field(gt=0)]
    source: str
    setting: str = ""
    last_queries: bool = False


class Collection(Plain):
    """Models, processors, and latencies that refer to both."""

    schema_: Literal["vitrim.latencies/1"] = Field(alias="schema")
    models: dict[str, Model]
    processors: dict[str, Processor]
    latencies: tuple[Latency, ...]

    @model_validator(mode="after")
    def _names_are_known(self) -> Collection:
        for number, latency in enumerate(self.latencies):
            if latency.model not in self.models:
                raise ValueError(
                    f"latencies.{number}.model: {latency.model!r} is not among the models"
                )
            if latency.processor not in self.processors:
                raise ValueError(
                    f"latencies.{number}.processor: {latency.processor!r} is not among the "
                    "processors"
                )
        return self

    def points(self) -> list[Point]:
        """Return every latency with its machine and workload.

        The device is the processor's name up to its first `/`.
        """
        return [
            Point(
                machine=self.processors[entry.processor].machine(
                    entry.processor.split("/")[0], entry.threads, entry.precision
                ),
                family=family_of(entry.runtime, entry.precision),
                workload=self.models[entry.model]
                .vit()
                .workload(entry.model, last_queries=entry.last_queries),
                latency_s=entry.latency_s,
                source=entry.source,
                setting=entry.setting,
            )
            for entry in self.latencies
        ]


def read_latencies(path: Path) -> Collection:
    """Read a TOML or JSON file of latencies; raises InputError with the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
        data: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return Collection.model_validate(data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file of latencies"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be parsed ({error}); correct it") from None


def known_points() -> list[Point]:
    """Return all points in the package: measured by vitrim, and published."""
    return [point for path in (MEASURED, PUBLISHED) for point in read_latencies(path).points()]


def device_titles() -> dict[str, str]:
    """Return the title of each device of `known_points`; the first of its settings gives it."""
    titles: dict[str, str] = {}
    for path in (MEASURED, PUBLISHED):
        for name, processor in read_latencies(path).processors.items():
            titles.setdefault(name.split("/")[0], processor.title)
    return titles


def known_runtimes() -> set[str]:
    """Return the runtimes with at least one latency."""
    return {
        entry.runtime for path in (MEASURED, PUBLISHED) for entry in read_latencies(path).latencies
    }
