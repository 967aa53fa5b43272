"""What the parts of a manifest have in common, and the part that describes buckets.

Free of torch and of onnx.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Size = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]


class Plain(BaseModel):
    """Frozen plain data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class PlainWithExtras(Plain):
    """Plain data with fields that are written only where they have a value."""

    @model_serializer(mode="wrap")
    def _without_absent_extras(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {
            key: value for key, value in data.items() if value is not None or key not in self.extras
        }

    @property
    def extras(self) -> frozenset[str]:
        """The names of these fields."""
        return frozenset()


class BucketsSpec(PlainWithExtras):
    """Numbers of patches of which each image gets one; the largest bounds the latency.

    Attributes:
        selection: Name of the selection that keeps them.
        counts: The numbers, increasing. The optional input `bucket` forces one of them; the output
            `kept`, beside the logits, is the one that an image got.
        coverage: An image gets the smallest one whose best patches hold this share of its scores.
        divergence: An image gets the smallest one whose logits are predicted to be so near those of
            the last: the natural logarithm of a Kullback-Leibler divergence in nats. Either this or
            the coverage is given.
        shares: Share of the calibration images in each, where there were any.
        images: Number of calibration images.
        macs: Multiply-adds of one image in each; no image costs more than the last one.
        equal: Share of the parity images that got the bucket of the reference.
    """

    selection: Name
    counts: tuple[Size, ...] = Field(min_length=2)
    coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    divergence: Annotated[float, Field(allow_inf_nan=False)] | None = None
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    images: Size | None = None
    macs: tuple[Size, ...] | None = None
    equal: Annotated[float, Field(ge=0, le=1)]

    @property
    def extras(self) -> frozenset[str]:
        """Of the two rules one is written; earlier versions did not write the others."""
        return frozenset({"coverage", "divergence", "images", "macs"})

    @model_validator(mode="after")
    def _one_each(self) -> BucketsSpec:
        if list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"buckets: counts {list(self.counts)} must be increasing")
        if (self.coverage is None) == (self.divergence is None):
            raise ValueError("buckets: one of coverage and divergence chooses")
        for name, values in (("shares", self.shares), ("macs", self.macs)):
            if values is not None and len(values) != len(self.counts):
                raise ValueError(f"buckets: {len(values)} {name} for {len(self.counts)} counts")
        return self
