"""The data of a report: report.json ("vitrim.report/1"), kept.json and history.jsonl.

`params` and `macs` are counts, `bytes` is the size of an artifact's files, `top1` of a model or a
measurement is a share from 0 to 1. In history.jsonl, written during training, `train_top1` and
`val_top1` are in percent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...targets.catalog import present_name
from ..results.buckets import BucketTable, bucket_tables
from ..results.measurement import Measurement, of_earlier_version

SCHEMA = "vitrim.report/1"
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    # Unknown keys are kept: a newer vitrim may write more than this one shows.
    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)


class ArtifactEntry(_Part):
    """The files of one exported artifact, and its measurement if there is one."""

    runtime: str
    precision: str
    target: str
    bytes: Count
    measurement: Measurement | None = None

    @model_validator(mode="before")
    @classmethod
    def _present_target(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not of_earlier_version(data.get("measurement")):
            return data
        target = data.get("target")
        return {**data, "target": present_name(target) if isinstance(target, str) else target}


class ModelEntry(_Part):
    """One model; counts and accuracy are null in a report made of measurements alone."""

    params: Count | None
    macs: Count | None
    top1: Share | None
    artifacts: tuple[ArtifactEntry, ...] = ()

    @property
    def buckets(self) -> tuple[BucketTable, ...]:
        """The table of each artifact with all its buckets measured."""
        measured = (each.measurement for each in self.artifacts)
        return bucket_tables(each for each in measured if each is not None)

    @property
    def one_each(self) -> tuple[ArtifactEntry, ...]:
        """The artifacts; of one with all its buckets measured, a single entry with the bound."""
        tables = self.buckets
        first = {id(table.measurements[0]): table.bound for table in tables}
        others = {id(each) for table in tables for each in table.measurements[1:]}
        found = [each for each in self.artifacts if id(each.measurement) not in others]
        return tuple(
            each.model_copy(update={"measurement": first[id(each.measurement)]})
            if id(each.measurement) in first
            else each
            for each in found
        )


class EstimatedLatency(_Part):
    """Estimated seconds of one inference on a device; never a measurement.

    Attributes:
        estimated_s: The likely latency.
        low_s: Lower end of the error bar.
        high_s: Upper end of the error bar.
        factor: Width of the error bar: `high_s / estimated_s` and `estimated_s / low_s`.
        level: Share of the devices in `held_against` whose measurement the error bar covers, each
            predicted by a calibration without that device.
        runtime: Runtime of the estimate.
        threads: Threads of the estimate.
        rests_on: The measurements that the calibration is based on.
        held_against: The measured devices that determine the error bar.
    """

    estimated_s: Seconds
    low_s: Seconds
    high_s: Seconds
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    level: Share
    runtime: str
    threads: Annotated[int, Field(ge=1)]
    rests_on: str
    held_against: tuple[str, ...] = Field(min_length=1)


class EstimateEntry(_Part):
    """Whether a model in a precision fits a device, and its estimated latency there.

    Bytes are what the model needs and what the device has. `latency` is null if the model does not
    fit or if no measurement allows an estimate; `no_latency` is the reason.
    """

    model: str
    precision: str
    target: str
    device: str
    weight_bytes: Count
    weight_space_bytes: Count
    activation_bytes: Count
    activation_space_bytes: Count
    latency: EstimatedLatency | None = None
    no_latency: str | None = None

    @property
    def excess_bytes(self) -> dict[str, int]:
        """By how much the weights or the activations are too large; empty if the model fits."""
        excess = {
            "weights": self.weight_bytes - self.weight_space_bytes,
            "activations": self.activation_bytes - self.activation_space_bytes,
        }
        return {name: count for name, count in excess.items() if count > 0}


class KeptBranch(_Part):
    """What remains of one attention or FFN branch: dimension -> (kept, total).

    `qk` and `v` are widths of one head.
    """

    branch: str = Field(min_length=1)
    kind: Literal["attention", "ffn", "removed", "constant"]
    dims: dict[str, tuple[Count, Annotated[int, Field(ge=1)]]] = {}

    @field_validator("dims")
    @classmethod
    def _kept_is_part_of_total(cls, dims: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        for name, (kept, total) in dims.items():
            if kept > total:
                raise ValueError(
                    f"{name} keeps {kept} of {total}; kept comes first and is at most the total"
                )
        return dims


Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CutRow(_Part):
    """One sub-layer of a cut without training.

    Attributes:
        name: Its path.
        predicted: The predicted error of the features, as a share of their variance.
        measured: The measured one; None where the sub-layer was absorbed by the one before.
        cost_share: The share of its cost that is left.
    """

    name: str = Field(min_length=1)
    predicted: Error
    measured: Error | None = None
    cost_share: Error


class CutErrors(_Part):
    """The predicted and the measured errors of a cut without training."""

    predicted: Error
    measured: Error | None = None
    images: Count
    rows: tuple[CutRow, ...] = ()


class LatencyRound(_Part):
    """One cut to a latency: the table's budget, its prediction, and the measurement, in ms."""

    budget_ms: Milliseconds
    predicted_ms: Milliseconds
    measured_ms: Milliseconds


class LatencyBudget(_Part):
    """How a cut came to its latency.

    Attributes:
        latency_ms: The budget in milliseconds.
        table: What the cost table is of.
        table_error: Median error of the table on whole networks.
        predicted_ms: The latency of the cut by the table.
        measured_ms: The p50 of its exported file; None if it was not measured.
        met: Whether the measured latency is at or under the budget; before fine-tuning.
        rounds: All cuts that were measured.
        shipped: The artifact that the budget is of.
        shipped_ms: Its p50 in the measurement of all artifacts; None if it was not measured on its
            device.
        shipped_met: Whether that is at or under the budget.
        estimated: Whether the table was estimated, not measured, so that the budget is an estimate.
    """

    latency_ms: Milliseconds
    table: str
    table_error: Error | None = None
    predicted_ms: Milliseconds
    measured_ms: Milliseconds | None = None
    met: bool | None = None
    rounds: tuple[LatencyRound, ...] = ()
    shipped: str | None = None
    shipped_ms: Milliseconds | None = None
    shipped_met: bool | None = None
    estimated: bool = False


class ZeroRow(_Part):
    """The zeros of one sub-layer, and the heads (attention) or hidden units (FFN) that are dead."""

    name: str = Field(min_length=1)
    kind: Literal["heads", "units"]
    zeros: Share
    units: Count
    dead: Count

    @model_validator(mode="after")
    def _dead_is_part_of_units(self) -> Self:
        if self.dead > self.units:
            raise ValueError(f"{self.name}: {self.dead} of {self.units} {self.kind} are dead")
        return self


class Zeros(_Part):
    """Zeros among single weights, and what they let go exactly.

    Attributes:
        weights: The number of weights in scope.
        zeros: How many of them are zero.
        sparsity: Their share.
        params: Parameters of the model, zeros included; `macs`: its multiply-adds.
        params_exact: Parameters without the dead weight; `macs_exact` likewise.
        channels: Channels of the residual stream, of which `channels_dead` are removed.
        error: Largest relative difference of the outputs that the removal makes.
        rows: Every sub-layer.
    """

    weights: Count
    zeros: Count
    sparsity: Share
    params: Count
    params_exact: Count
    macs: Count
    macs_exact: Count
    channels: Count
    channels_dead: Count
    error: Error
    rows: tuple[ZeroRow, ...] = ()


class TokenMap(_Part):
    """Where the patches of a network leave it.

    Attributes:
        grid: Rows and columns of patches.
        sites: Names of the places, the stem first, then each sub-layer.
        counts: Number of tokens, prefix tokens included, that are carried after each place.
        exits: For each patch, row by row, at how many places it is carried; 0: never embedded.
        images: Some test images as PNG in base64.
        chosen: Where patches are chosen for each image: for each of `images`, its own exits.
        averaged: Number of test images whose mean exits `exits` has then; 0: all have the same.
    """

    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    sites: tuple[str, ...] = Field(min_length=1)
    counts: tuple[Annotated[int, Field(ge=1)], ...]
    exits: tuple[Count, ...]
    images: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$")], ...] = ()
    chosen: tuple[tuple[Count, ...], ...] = ()
    averaged: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.counts) != len(self.sites):
            raise ValueError(f"{len(self.counts)} counts for {len(self.sites)} sites")
        for exits in (self.exits, *self.chosen):
            if len(exits) != self.grid[0] * self.grid[1]:
                raise ValueError(f"{len(exits)} exits for {self.grid[0]} x {self.grid[1]} patches")
            if max(exits) > len(self.sites):
                raise ValueError(f"a patch is carried at {max(exits)} of {len(self.sites)} sites")
        if self.chosen and len(self.chosen) != len(self.images):
            raise ValueError(f"{len(self.chosen)} choices for {len(self.images)} images")
        return self


class Epoch(_Part):
    """One line of history.jsonl: top-1 in percent, `params` and `macs` as counts that remain."""

    phase: str = Field(min_length=1)
    epoch: int = Field(ge=0)
    loss: float | None = None
    train_top1: float | None = None
    val_top1: float | None = None
    params: float | None = None
    macs: float | None = None
    params_dense: float | None = None
    macs_dense: float | None = None
    images_per_s: float | None = None
    loader_share: float | None = None
    lambda_: float | None = Field(None, alias="lambda")
    lr: float | None = None
    seconds: float | None = None


class Report(_Part):
    """The contents of report.json.

    The others are compared with the model named `baseline`, or with the first one.
    """

    schema_: Literal["vitrim.report/1"] = Field(alias="schema")
    models: dict[str, ModelEntry] = Field(min_length=1)
    parity: dict[str, Annotated[float, Field(ge=0)] | None] = {}
    estimates: tuple[EstimateEntry, ...] = ()

    title: str | None = None
    created_at: str | None = None
    recipe: str | None = None
    command: str | None = None
    data: str | None = None
    seed: int | None = None
    versions: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    kept: tuple[KeptBranch, ...] = ()
    tokens: TokenMap | None = None
    cut: CutErrors | None = None
    latency: LatencyBudget | None = None
    zeros: Zeros | None = None
    curves: tuple[Epoch, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with the key `schema`; optional keys with defaults are left out."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        models = {
            name: model.model_dump(mode="json", by_alias=True)
            for name, model in self.models.items()
        }
        return {"schema": SCHEMA, **data, "models": models, "parity": dict(self.parity)}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return Report.model_json_schema(by_alias=True)
