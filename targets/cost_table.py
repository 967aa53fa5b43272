"""The latency of networks on a device by sub-layer: measured points, and costs fitted to them.

A network costs the sum over its sub-layers and its ends (the call, the stem, the head). Inside a
sub-layer the sizes multiply: each part counts the work of one kind of operator. Products count the
columns that the kernels compute, which are whole tiles: `ceil(width / tile) * tile`. A sub-layer
that is gone costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core import strict_json
from ..core.errors import InputError
from ..core.storage import replace_file
from ..core.written_kinds import json_kind
from .catalog import present_name
from .cost_parts import (
    ATTENTION_PARTS,
    END_PARTS,
    FFN_PARTS,
    PARTS,
    SELECT_PARTS,
    AttentionShape,
    FfnShape,
    NetworkShape,
    Numbers,
    Plain,
    Sizes,
    attention_parts,
    end_parts,
    ffn_parts,
    network_parts,
    select_parts,
)

SCHEMA: Literal["vitrim.cost-table/2"] = "vitrim.cost-table/2"
EARLIER_SCHEMA = "vitrim.cost-table/1"
COST_TABLE = json_kind("a cost table", SCHEMA)
# Parts of a table of the earlier schema, in seconds, and the parts that they became.
_EARLIER_PARTS = {
    "block": (("attention", 0.5), ("ffn", 0.5)),
    "projections": (("projections", 1.0),),
    "attention products": (("attention products", 1.0),),
    "output": (("output", 1.0),),
    "ffn": (("ffn products", 1.0),),
    "norms": (("attention norms", 1.0), ("ffn norms", 1.0)),
    "softmax": (("softmax", 1.0),),
    "activation": (("activation", 1.0),),
    "weights": (("attention weights", 1.0), ("ffn weights", 1.0)),
}
# Measured networks are drawn below the sizes of a dense one, and none has all of them.
REACH = 1.15
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Role = Literal["fit", "held-out", "check", "solved"]


class MeasuredNetwork(Plain):
    """A measured network: its latency, and what the point is for.

    `fit`: the costs are fitted to it; `held-out`: it gives the error of the fit; `check`: a compact
    network of mixed widths, which gives the error of a sum of sub-layers, and the correction;
    `solved`: one that the solver chose for a latency by the costs. Of all networks it finds those
    that the costs underestimate, so that random ones do not show by how much it is wrong; the first
    half of them are fitted, and the others give the excess.
    `reference_ms` is the latency of the dense network that was measured together with it.
    """

    network: NetworkShape
    latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    role: Role = "fit"
    reference_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Errors(Plain):
    """Relative errors of predictions: how many, their median, 95th percentile and largest."""

    count: int = Field(ge=1)
    median: Cost
    p95: Cost
    largest: Cost

    @classmethod
    def of(cls, predicted: npt.ArrayLike, measured: npt.ArrayLike) -> Errors:
        """The errors of predictions of measured latencies, both (count,)."""
        errors = np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
        return cls(
            count=len(errors),
            median=float(np.median(errors)),
            p95=float(np.quantile(errors, 0.95)),
            largest=float(errors.max()),
        )

    def text(self) -> str:
        """The errors in percent, as words."""
        return (
            f"median {100 * self.median:.1f} %, 95th percentile {100 * self.p95:.1f} %, "
            f"largest {100 * self.largest:.1f} %"
        )


class Correction(Plain):
    """What whole networks take beside the sum of their parts: scale * sum + offset_ms."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    offset_ms: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class CostTable(Plain):
    """Measured networks of one target, runtime and precision, and the costs fitted to them.

    Attributes:
        target: Name of the device profile.
        target_features: Its instruction sets, where it is a shipped one.
        runtime: Name of the runtime.
        runtime_version: Its version.
        precision: Of the artifacts.
        threads: Threads of the runtime.
        batch: Images in an inference; latencies are those of the batch.
        tile: Columns that the kernels compute at once, found by the fit.
        costs_ms: Milliseconds per unit of each of `PARTS`; parts that are missing cost nothing.
        points: The measured networks.
        held_out: Errors of the networks held out of the fit; None without any.
        whole: Errors of whole compact networks, corrected, each by the others; None without any.
        uncorrected: The same without the correction.
        correction: What whole networks take beside the sum of their parts.
        excess: Share by which nine of ten networks of the solver are at most slower than predicted,
            each by the correction of the others; None without any.
        environment: The machine while it was measured.
        power_w: Mean power of the device during the measurements; None where no meter was read.
        estimated: What the costs follow from where nothing was measured: the budget is then called
            an estimate. None: they were measured.
    """

    schema_: Literal["vitrim.cost-table/2"] = Field(SCHEMA, alias="schema")
    target: str
    target_features: tuple[str, ...] | None = None
    runtime: str
    runtime_version: str = ""
    precision: str = "fp32"
    threads: int = Field(1, ge=1)
    batch: int = Field(1, ge=1)
    tile: int = Field(1, ge=1)
    costs_ms: dict[str, Cost]
    points: tuple[MeasuredNetwork, ...] = ()
    held_out: Errors | None = None
    whole: Errors | None = None
    uncorrected: Errors | None = None
    correction: Correction = Correction()
    excess: Annotated[float, Field(gt=-1, allow_inf_nan=False)] | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    power_w: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    estimated: str | None = None

    @model_validator(mode="after")
    def _known_parts(self) -> CostTable:
        for part in self.costs_ms:
            if part not in PARTS:
                raise ValueError(f"costs_ms: {part!r} is no part; known are {', '.join(PARTS)}")
        return self

    @property
    def title(self) -> str:
        """What was measured, as a message names it."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        batch = "" if self.batch == 1 else f", batch {self.batch}"
        source = ""
        if self.estimated is not None:
            source = f", estimated: {self.estimated}"
        elif processor := self.environment.get("cpu_model"):
            source = f", measured on {processor}"
        return f"{self.runtime} {self.precision} on {self.target}, {threads}{batch}{source}"

    def energy_latency_ms(self, energy_mj: float, option: str) -> float:
        """Return the milliseconds that take an energy at the power of the measurements.

        Args:
            energy_mj: Millijoules of an inference.
            option: The name of the budget in an error.

        Raises:
            InputError: The power is not known.
        """
        if self.power_w is None:
            raise InputError(
                f"{option} = {energy_mj:g}: no energy meter was read while the cost table of "
                f"{self.title} was measured; give a latency alone, or measure the table on a "
                "device with a meter"
            )
        return energy_mj / self.power_w

    def covers(self, network: NetworkShape) -> bool:
        """Whether a network is about as large as those that were measured; always if estimated.

        Args:
            network: Its sizes.
        """
        if self.estimated is not None:
            return True
        return not self._exceeded(network).any()

    def beyond(self, network: NetworkShape) -> str | None:
        """The sizes of a network beyond the measured ones, as words; None if there are none.

        Costs are extrapolated to such a network. The sizes of a table without points are not known.

        Args:
            network: Its sizes.
        """
        if self.estimated is not None or not self.points:
            return None
        given, measured = _extent(network), self._measured_extent
        found = [
            f"{size:g} {name} (measured: up to {most:g})"
            for name, size, most, more in zip(
                _EXTENTS, given, measured, self._exceeded(network), strict=True
            )
            if more
        ]
        return " and ".join(found) or None

    def _exceeded(self, network: NetworkShape) -> npt.NDArray[np.bool_]:
        return np.asarray(_extent(network) > REACH * self._measured_extent)

    @property
    def largest_ms(self) -> float:
        """The latency of the slowest measured network, in milliseconds; 0 without any."""
        return max((point.latency_ms for point in self.points), default=0.0)

    @cached_property
    def _measured_extent(self) -> Numbers:
        networks = [_extent(point.network) for point in self.points]
        found: Numbers = np.max([_NOTHING, *networks], axis=0)
        return found

    @property
    def prices_selections(self) -> bool:
        """Whether selections of tokens have costs, so that networks with some have a latency."""
        return any(self.costs_ms.get(part) for part in SELECT_PARTS)

    def require_selections(self) -> None:
        """Raise InputError if selections of tokens have no costs."""
        if not self.prices_selections:
            raise InputError(
                f"the cost table of {self.title} has no costs of selections of tokens; measure one "
                "with `vitrim bench --cost-table FILE --like MODEL`, of a model that selects"
            )

    @cached_property
    def _costs(self) -> Numbers:
        return np.array([self.costs_ms.get(part, 0.0) for part in PARTS])

    def attention_ms(
        self,
        embed: Sizes,
        tokens_in: Sizes,
        tokens_out: Sizes,
        heads: Sizes,
        qk: Sizes,
        v: Sizes,
    ) -> Numbers:
        """Return the milliseconds of an attention; arrays of sizes are broadcast.

        Args:
            embed: Channels of the residual stream.
            tokens_in: Tokens that it reads.
            tokens_out: Tokens that it computes.
            heads: Heads; 0: the attention is gone, and costs nothing.
            qk: Width of each head's queries and keys.
            v: Width of each head's values.

        Returns:
            Milliseconds, in the shape of the arrays.
        """
        sizes = (embed, tokens_in, tokens_out, heads, qk, v)
        costs = self._costs[: len(ATTENTION_PARTS)]
        return _priced(attention_parts(*sizes, tile=self.tile), costs, present=heads)

    def ffn_ms(self, embed: Sizes, tokens: Sizes, hidden: Sizes) -> Numbers:
        """Return the milliseconds of an FFN; arrays are broadcast, and 0 hidden units cost 0."""
        start = len(ATTENTION_PARTS)
        costs = self._costs[start : start + len(FFN_PARTS)]
        return _priced(ffn_parts(embed, tokens, hidden, tile=self.tile), costs, present=hidden)

    def ends_ms(self, embed: Sizes, tokens: Sizes, pixels: Sizes, classes: Sizes) -> Numbers:
        """Return the milliseconds outside the sub-layers: the call, the stem and the head.

        Args:
            embed: Channels of the residual stream.
            tokens: Tokens behind the stem.
            pixels: Multiply-adds of the stem for each token and channel.
            classes: Outputs of the head.
        """
        start = len(ATTENTION_PARTS) + len(FFN_PARTS)
        costs = self._costs[start : start + len(END_PARTS)]
        parts = end_parts(embed, tokens, pixels, classes, tile=self.tile)
        return _priced(parts, costs, present=1)

    def select_ms(
        self, embed: Sizes, tokens: Sizes, kept: Sizes, macs: Sizes, reads: Sizes
    ) -> Numbers:
        """Return the milliseconds of a selection of tokens; arrays are broadcast.

        Args:
            embed: Channels of the residual stream.
            tokens: Tokens that it chooses from.
            kept: Tokens that it leaves.
            macs: Multiply-adds of its scores.
            reads: Channels that its norm reads.
        """
        costs = self._costs[-len(SELECT_PARTS) :]
        return _priced(select_parts(embed, tokens, kept, macs, reads), costs, present=kept)

    def sum_ms(self, network: NetworkShape) -> float:
        """Return the sum over the parts of a network, in milliseconds, without the correction."""
        return float(network_parts(network, self.tile) @ self._costs)

    def latency_ms(self, network: NetworkShape) -> float:
        """Return the predicted latency of a network in milliseconds, corrected."""
        return self.corrected_ms(self.sum_ms(network))

    def corrected_ms(self, sum_ms: float) -> float:
        """Return the latency of a network whose parts take `sum_ms`, in milliseconds."""
        return self.correction.scale * sum_ms + self.correction.offset_ms

    def parts_ms(self, latency_ms: float) -> float:
        """Return what the parts of a network may take for a latency; inverts `corrected_ms`."""
        return (latency_ms - self.correction.offset_ms) / self.correction.scale

    def with_costs(self, costs_ms: Mapping[str, float]) -> CostTable:
        """Return the table with other costs."""
        found = self.model_copy(update={"costs_ms": dict(costs_ms)})
        # A copy has the cached arrays of the original (pydantic/pydantic#11955).
        found.__dict__.pop("_costs", None)
        return found

    def save(self, path: Path | str) -> None:
        """Write the table as JSON, atomically."""
        data = self.model_dump(mode="json", by_alias=True)
        points = ",\n".join(f"  {json.dumps(point)}" for point in data.pop("points"))
        # A line for each of the points, which are most of the file.
        text = json.dumps(data, indent=1).removesuffix("\n}")
        replace_file(path, f'{text},\n "points": [\n{points}\n ]\n}}\n', COST_TABLE)

    @classmethod
    def load(cls, path: Path | str) -> CostTable:
        """Read a saved table, also one of the earlier schema.

        Raises:
            InputError: It cannot be read, or a key is wrong; the message has the file and the key.
        """
        try:
            data = strict_json.parse(Path(path).read_bytes())
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); "
                "measure a table with `vitrim bench --cost-table`"
            ) from None
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); measure the table again") from None
        try:
            if isinstance(data, dict) and data.get("schema") == EARLIER_SCHEMA:
                data = _upgraded(_EarlierTable.model_validate(data))
            return cls.model_validate_json(json.dumps(data))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the table"
            raise InputError(f"{path}: {key}: {first['msg']}; measure the table again") from None


def _extent(network: NetworkShape) -> Numbers:
    """Sizes by which costs are extrapolated where a network has larger ones.

    Depth and classes are none: a further sub-layer costs what the others do, and the head is small.

    Returns:
        Stream, tokens, numbers of a patch, width of all heads, and hidden units.
    """
    attentions = [each for each in network.sublayers if isinstance(each, AttentionShape)]
    hidden = [each.hidden for each in network.sublayers if isinstance(each, FfnShape)]
    width = [each.heads * max(each.qk, each.v) for each in attentions]
    widest = (max(width, default=0), max(hidden, default=0))
    return np.array((network.embed, network.tokens, network.pixels, *widest), dtype=np.float64)


_EXTENTS = (
    *("channels of the stream", "tokens", "numbers in a patch", "columns of all heads"),
    "hidden units",
)
_NOTHING = np.zeros(len(_EXTENTS))


def _priced(parts: list[Any], costs: Numbers, *, present: Sizes) -> Numbers:
    total = sum(
        cost * np.asarray(part, np.float64) for part, cost in zip(parts, costs, strict=True)
    )
    return np.asarray(np.where(np.greater(present, 0), total, 0.0), dtype=np.float64)


class _EarlierTable(BaseModel):
    """What is used of a table of the earlier schema: seconds by part of a block, in fp32."""

    model_config = ConfigDict(frozen=True)
    target: str
    target_features: tuple[str, ...] | None = None
    threads: int = Field(ge=1)
    runtime: str
    costs_s: dict[str, Cost]
    environment: dict[str, Any] = {}


def _upgraded(earlier: _EarlierTable) -> Mapping[str, Any]:
    """A table of the earlier schema in the present one; the ends cost nothing there."""
    costs: dict[str, float] = {}
    for part, seconds in earlier.costs_s.items():
        for name, share in _EARLIER_PARTS.get(part, ()):
            costs[name] = 1e3 * share * seconds
    known = "target_features" in earlier.model_fields_set
    name, _, version = earlier.runtime.partition(" ")
    return {
        "schema": SCHEMA,
        "target": earlier.target if known else present_name(earlier.target),
        "target_features": earlier.target_features,
        "runtime": name,
        "runtime_version": version,
        "threads": earlier.threads,
        "costs_ms": costs,
        "environment": earlier.environment,
    }
