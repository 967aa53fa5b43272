"""How an image's bucket is chosen: by what its best patches hold, or by a divergence learned.

Both rules give an image one *need* for each bucket but the last, and it gets the first bucket whose
need is at most a threshold; the last one if there is none. By coverage a need is the share of the
image's scores that the bucket's best patches hold, negative. By divergence it is the predicted
logarithm of how far the bucket's logits are from those of the last bucket: a linear function of the
stream before the selection, fitted in closed form to images without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from ..network.branch_specs import Count, Spec, Width

# Far above any useful number of buckets.
MOST_BUCKETS = 16
Rule = Literal["divergence", "coverage"]
RULES: tuple[Rule, ...] = get_args(Rule)
Share = Annotated[float, Field(ge=0, le=1)]
_LEAST_COVERAGE = 1e-9
# In nats: a smaller divergence changes no answer, and its logarithm would dominate the fit.
_LEAST_DIVERGENCE = 1e-4
# The strengths of the ridge that are tried, for each image of the fit.
_RIDGES = tuple(10.0 ** (exponent / 4) for exponent in range(-16, 9))


class Divergence(Spec):
    """A linear prediction of how far a bucket's logits are from those of the last one.

    For bucket b it is `bias[b] + weights[b] · f` with the features f of the stream before the
    selection: the first token of the prefix, where there is one, and the mean of the patches, each
    less the mean of its channels.

    Attributes:
        weights: For each bucket but the last, the weights of the features.
        bias: For each bucket but the last, the constant.
        threshold: Natural logarithm of the largest predicted divergence in nats with which an image
            gets a bucket.
    """

    weights: tuple[tuple[float, ...], ...] = Field(min_length=1, max_length=MOST_BUCKETS - 1)
    bias: tuple[float, ...]
    threshold: float

    @model_validator(mode="after")
    def _consistent(self) -> Divergence:
        if len(self.bias) != len(self.weights):
            raise ValueError(f"{len(self.bias)} constants for {len(self.weights)} rows of weights")
        if len({len(row) for row in self.weights}) != 1:
            raise ValueError("rows of weights differ in length")
        return self

    def centred_weights(self, embed: int) -> NDArray[np.float32]:
        """Weights of tokens as they are: float32 (buckets - 1, tokens, embed).

        They sum to zero in each token, so that a stream whose channels were centred, as some
        exported graphs compute it, gives the same prediction.
        """
        weights = np.array(self.weights).reshape(len(self.weights), -1, embed)
        centred: NDArray[np.float32] = weights - weights.mean(axis=-1, keepdims=True)
        return centred.astype(np.float32)


class Buckets(Spec):
    """The numbers of patches that images may keep at the last selection, and how one is chosen.

    Attributes:
        schema_: Version of the format; the key is `schema`.
        counts: Number of patches that each bucket keeps, increasing.
        coverage: An image gets the smallest bucket whose best patches hold this share of its
            scores; the last one if none does. None: `divergence` chooses.
        divergence: An image gets the smallest bucket whose predicted divergence is at most the
            threshold; the last one if none is. None: `coverage` chooses.
        shares: Share of the calibration images in each bucket; None where none were used. With
            `divergence` each image is predicted by a fit to the others.
        images: Number of calibration images.
    """

    schema_: Literal["vitrim.buckets/1"] = Field("vitrim.buckets/1", alias="schema")
    counts: tuple[Width, ...] = Field(min_length=2, max_length=MOST_BUCKETS)
    coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    divergence: Divergence | None = None
    shares: tuple[Share, ...] | None = None
    images: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> Buckets:
        if list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"counts {list(self.counts)} must be increasing")
        if (self.coverage is None) == (self.divergence is None):
            raise ValueError("give coverage or divergence, one of them")
        if self.divergence is not None and len(self.divergence.bias) != len(self.counts) - 1:
            raise ValueError(
                f"divergence of {len(self.divergence.bias)} buckets for {len(self.counts)} counts; "
                "it is of each but the last"
            )
        if self.shares is not None and len(self.shares) != len(self.counts):
            raise ValueError(f"{len(self.shares)} shares for {len(self.counts)} counts")
        if (self.shares is None) != (self.images == 0):
            raise ValueError("shares and the number of images need each other")
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_rule(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        found: dict[str, object] = write(self)
        return {key: value for key, value in found.items() if key not in RULES or value is not None}

    @property
    def rule(self) -> Rule:
        """How the bucket of an image is chosen."""
        return "coverage" if self.divergence is None else "divergence"

    @property
    def threshold(self) -> float:
        """The largest need with which an image gets a bucket."""
        if self.divergence is not None:
            return self.divergence.threshold
        assert self.coverage is not None
        return -self.coverage

    @property
    def described(self) -> str:
        """How the bucket of an image is chosen, for output."""
        if self.divergence is not None:
            return f"predicted divergence at most e^{self.divergence.threshold:.3f} nats"
        return f"coverage {self.coverage:.4f}"


@dataclass(frozen=True)
class BucketShares:
    """How images are distributed over buckets, and what they cost.

    Attributes:
        counts: Number of patches that each bucket keeps, increasing.
        shares: Share of the images in each.
        macs: Multiply-adds of one image in each; the largest is the bound for any image.
        images: Number of images.
    """

    counts: tuple[int, ...]
    shares: tuple[float, ...]
    macs: tuple[int, ...]
    images: int

    @property
    def mean_patches(self) -> float:
        """Number of patches that an image keeps on average."""
        return sum(share * count for share, count in zip(self.shares, self.counts, strict=True))

    @property
    def mean_macs(self) -> float:
        """Number of multiply-adds of an image on average."""
        return sum(share * macs for share, macs in zip(self.shares, self.macs, strict=True))

    @property
    def worst_macs(self) -> int:
        """Number of multiply-adds that no image exceeds."""
        return max(self.macs)


def features(x: Tensor, prefix: int) -> Tensor:
    """What a divergence is predicted from: (batch, tokens, embed) -> float32 (batch, features).

    Args:
        x: The stream before the last selection.
        prefix: Number of tokens in front of the patches.
    """
    tokens = [x[:, :1].float()] if prefix else []
    found = torch.cat([*tokens, x[:, prefix:].float().mean(dim=1, keepdim=True)], dim=1)
    return (found - found.mean(dim=-1, keepdim=True)).flatten(1)


def feature_count(embed: int, prefix: int) -> int:
    """Number of `features`."""
    return embed * (2 if prefix else 1)


def divergences(logits: Sequence[Tensor]) -> Tensor:
    """Natural logarithm of the divergence of each bucket from the last: (images, buckets - 1).

    Args:
        logits: For each bucket the logits (images, classes).

    Returns:
        float64; the Kullback-Leibler divergence is in nats, and at least 1e-4.
    """
    last = logits[-1].double().log_softmax(-1)
    found = [(last.exp() * (last - each.double().log_softmax(-1))).sum(-1) for each in logits[:-1]]
    return torch.stack(found, dim=1).clamp(min=_LEAST_DIVERGENCE).log()


def fit_divergence(inputs: Tensor, wanted: Tensor) -> tuple[Divergence, Tensor]:
    """Fit a linear prediction by ridge regression whose strength the images choose.

    The strength has the least squared error when each image is predicted by a fit to the others,
    which a singular value decomposition gives without fitting again.

    Args:
        inputs: The features, (images, features).
        wanted: `divergences` of the same images, (images, buckets - 1).

    Returns:
        The prediction, with a threshold of 0, and for each image what a fit to the others predicts,
        float64 (images, buckets - 1).

    References:
        Allen 1974, "The relationship between variable selection and data augmentation and a method
        for prediction" (leave-one-out error in closed form).
    """
    x, y = inputs.double(), wanted.double()
    middle, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    # A feature that is constant, up to rounding, says nothing.
    scale = torch.where(deviation > 1e-6 * (1 + middle.abs()), 1 / deviation, 0.0)
    centre = y.mean(dim=0)
    u, s, vh = torch.linalg.svd((x - middle) * scale, full_matrices=False)
    along, count = u.T @ (y - centre), len(x)
    best: tuple[float, Tensor, Tensor] | None = None
    for ridge in _RIDGES:
        damped = s.square() + ridge * count
        fitted = u @ ((s.square() / damped)[:, None] * along)
        leverage = (u.square() * (s.square() / damped)).sum(dim=1, keepdim=True) + 1 / count
        error = (y - centre - fitted) / (1 - leverage).clamp(min=1e-9)
        mean = float(error.square().mean())
        if best is None or mean < best[0]:
            weights = vh.T @ ((s / damped)[:, None] * along)
            best = mean, weights * scale[:, None], y - error
    assert best is not None
    weights = best[1]
    found = Divergence(
        weights=tuple(map(tuple, weights.T.float().tolist())),
        bias=tuple((centre - middle @ weights).float().tolist()),
        threshold=0.0,
    )
    return found, best[2]


def first_enough(needs: Tensor, threshold: float) -> Tensor:
    """The first bucket whose need is at most the threshold, else the last: int64 (images,).

    Args:
        needs: (images, buckets - 1).
        threshold: The largest need.
    """
    # What is no number is above any threshold.
    return (~(needs <= threshold)).long().cumprod(dim=1).sum(dim=1)


def shares_of(needs: Tensor, threshold: float) -> tuple[float, ...]:
    """The share of the images in each bucket; see `first_enough`."""
    found = first_enough(needs, threshold).bincount(minlength=needs.shape[1] + 1)
    return tuple((found.double() / len(needs)).tolist())


def threshold_for(needs: Tensor, counts: Sequence[int], mean_patches: float) -> float:
    """The least threshold whose mean number of patches is at most `mean_patches`.

    Args:
        needs: (images, buckets - 1).
        counts: Number of patches of each bucket, increasing.
        mean_patches: At least the smallest count.
    """
    patches = torch.tensor(counts, dtype=torch.float64)

    def fits(threshold: float) -> bool:
        return float(patches[first_enough(needs, threshold)].mean()) <= mean_patches

    # The mean changes at the needs of images, and is constant from each to the next.
    steps: list[float] = needs[needs.isfinite()].unique().tolist()
    steps = [(steps[0] if steps else 0.0) - 1.0, *steps]
    low, high = -1, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(steps[middle]) else (middle, high)
    # Between two of them, so that rounding moves no calibration image.
    above = steps[high + 1] if high + 1 < len(steps) else steps[high] + 1.0
    return (steps[high] + above) / 2


def coverage_of(threshold: float) -> float:
    """The coverage of a threshold, in its range."""
    return min(1.0, max(_LEAST_COVERAGE, -threshold))
