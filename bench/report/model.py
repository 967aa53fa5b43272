"""report.json ("vitrim.report/1"), kept.json and history.jsonl as data: what is required, what may
be absent, what is refused.

Units: `params` and `macs` are counts, `bytes` the size of the artifact's files, `top1` of a model
or a measurement a share from 0 to 1; in history.jsonl, written while training, `train_top1` and
`val_top1` are percent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..results.measurement import Measurement

SCHEMA = "vitrim.report/1"
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    # Further keys are welcome: a newer vitrim may say more than this one shows.
    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)


class ArtifactEntry(_Part):
    """One exported file set of a model, and its measurement (None where it was not measured)."""

    runtime: str
    precision: str
    target: str
    bytes: Count
    measurement: Measurement | None = None


class ModelEntry(_Part):
    """One model; params, macs and top1 are null where they are not known (a report made of
    measurements alone).
    """

    params: Count | None
    macs: Count | None
    top1: Share | None
    artifacts: tuple[ArtifactEntry, ...] = ()


class EstimatedLatency(_Part):
    """Seconds of one inference on a device that was not at hand: an estimate, never a measurement.

    `estimated_s` lies within `low_s` and `high_s`, which is `factor` either way; so wide a bar held
    the share `level` of the devices `held_against`, each predicted by a calibration that never saw
    it.
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
    """A model in a precision held against a target that was not at hand: whether it fits, and how
    long it would take.

    Bytes needed and bytes there; `latency` is null where it does not fit or nothing was measured to
    estimate it from, and `no_latency` says why.
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
        """By how much the weights or the activations are too large; empty where the model fits."""
        over = {
            "weights": self.weight_bytes - self.weight_space_bytes,
            "activations": self.activation_bytes - self.activation_space_bytes,
        }
        return {what: count for what, count in over.items() if count > 0}


class KeptBranch(_Part):
    """What is left of one attention or FFN branch: dimension -> (kept, total). `qk` and `v` are
    widths of one head.
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


class Epoch(_Part):
    """One line of history.jsonl; top-1 in percent, `params` and `macs` are what remains."""

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
    """The whole of report.json. The first model named `baseline`, or else the first model, is what
    the others are compared with.
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
    curves: tuple[Epoch, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with the key `schema`; absent optional keys are left out."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        models = {
            name: model.model_dump(mode="json", by_alias=True)
            for name, model in self.models.items()
        }
        return {"schema": SCHEMA, **data, "models": models, "parity": dict(self.parity)}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return Report.model_json_schema(by_alias=True)
