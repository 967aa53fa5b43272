"""Latencies that were measured: on a machine by vitrim, or by others, who published them."""

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
    """What is alike: a runtime in floating point, or in int8."""
    return f"{runtime} int8" if precision == "int8" else runtime


@dataclass(frozen=True)
class Point:
    """One measured latency: `family` is the runtime (and int8, which is another matter than
    floating point), `source` says who measured it.
    """

    machine: Machine
    family: str
    workload: Workload
    latency_s: float
    source: str
    setting: str = ""

    @property
    def label(self) -> str:
        """Device, its setting and threads, in a few words."""
        return f"{self.machine.device}{f' {self.setting}' if self.setting else ''}, {self.machine.threads} thread{'s' * (self.machine.threads > 1)}"


class Plain(BaseModel):
    """Frozen data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Model(Plain):
    """Sizes of a plain ViT."""

    image: int
    patch: int
    embed: int
    depth: int
    heads: int
    classes: int = 1000
    channels: int = 3

    def vit(self) -> PlainVit:
        """With the usual FFN, four times the residual width."""
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
    """A device whose latencies are known: multiply-adds a cycle of one core at each precision, and
    where the numbers come from.
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
        """With `threads` threads at a precision."""
        rates = {
            "fp32": self.fp32_macs_per_cycle,
            "fp16": self.fp16_macs_per_cycle,
            "int8": self.int8_macs_per_cycle,
        }
        used = min(threads, self.cores)
        return Machine(
            device=device,
            architecture=self.architecture,
            threads=threads,
            precision=precision,
            clock_hz=self.clock_hz,
            peak_macs_per_s=used * self.clock_hz * (rates[precision] or self.fp32_macs_per_cycle),
            float_macs_per_s=used
            * self.clock_hz
            * ((rates[precision] if precision == "fp16" else None) or self.fp32_macs_per_cycle),
            vector_numbers_per_s=used * self.clock_hz * self.lanes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            last_cache_bytes=self.last_cache_bytes,
        )


class Latency(Plain):
    """One figure. `last_queries`: the graph computes the class token's row alone in the last
    block.
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
    """Models, processors and latencies that name both."""

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
                    f"latencies.{number}.processor: {latency.processor!r} is not among the processors"
                )
        return self

    def points(self) -> list[Point]:
        """Every latency with its machine and workload. A processor's name up to its first `/` is
        the device.
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
    """A TOML or JSON file of latencies. Errors: InputError with file and key."""
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
        raise InputError(f"{path}: cannot be understood ({error}); correct it") from None


def known_points() -> list[Point]:
    """Everything that the package knows: measured by vitrim, and published."""
    return [point for path in (MEASURED, PUBLISHED) for point in read_latencies(path).points()]


def device_titles() -> dict[str, str]:
    """What people call each device of `known_points`; settings of one device go by the first one's
    title.
    """
    titles: dict[str, str] = {}
    for path in (MEASURED, PUBLISHED):
        for name, processor in read_latencies(path).processors.items():
            titles.setdefault(name.split("/")[0], processor.title)
    return titles


def known_runtimes() -> set[str]:
    """Runtimes that some figure is of."""
    return {
        entry.runtime for path in (MEASURED, PUBLISHED) for entry in read_latencies(path).latencies
    }
