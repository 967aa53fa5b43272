"""Keys of `[masks]` for buckets: the last selection keeps a number that depends on the image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from .latency_keys import positive
from .recipe_sections import Section

# Trained weights do not depend on them.
BUCKET_KEYS = ("token_buckets", "token_mean_patches", "token_coverage", "token_bucket_rule")
# Those of `masks.tokens` whose scores an image can be judged by.
_BUCKETED = ("dynamicvit", "dps", "class-attention")
# That of `Buckets`, whose module imports torch.
_MOST = 16
Patches = Annotated[int, Field(gt=0)]


class BucketKeys(Section):
    """The numbers of patches of which each image keeps one, and how it is chosen."""

    token_buckets: tuple[Patches, ...] | None = Field(
        None,
        strict=False,
        min_length=2,
        max_length=_MOST,
        description="with dynamicvit, dps, or class-attention with `token_ratio`: the last stage "
        "keeps one of these numbers of patches, which depends on the image, e.g. [60, 98, 137]; "
        "the last one, which bounds the latency of any image, is what the stage keeps in training. "
        "Needs `token_mean_patches` or `token_coverage`",
    )
    token_mean_patches: float | None = positive(
        "with `token_buckets`: the mean number of patches that `images` unlabeled training images "
        "keep, e.g. 90"
    )
    token_coverage: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="with `token_buckets`, instead of `token_mean_patches`: an image keeps the "
        "smallest number whose best patches hold this share of its scores, e.g. 0.9",
    )
    token_bucket_rule: Literal["divergence", "coverage"] | None = Field(
        None,
        description="with `token_mean_patches`: `divergence` (absent: the same), an image keeps "
        "the smallest number with which the logits are predicted to be near those of the largest, "
        "learned from `images` without labels; or `coverage`, as `token_coverage` chooses",
    )

    @field_validator("token_buckets")
    @classmethod
    def _increasing(cls, counts: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if counts is not None and list(counts) != sorted(set(counts)):
            example = ", ".join(map(str, sorted(set(counts))))
            raise ValueError(f"the numbers must increase; write [{example}]")
        return counts

    def check_buckets(self, tokens: str | None) -> None:
        """Validate the keys together.

        Args:
            tokens: `masks.tokens`, a method that chooses for each image.

        Raises:
            ValueError: They contradict each other; the message names the key.
        """
        keys = {name: getattr(self, name) for name in BUCKET_KEYS[1:]}
        given = {name: value for name, value in keys.items() if value is not None}
        if self.token_buckets is None:
            for name, value in given.items():
                raise ValueError(
                    f"{name} = {value} belongs to token_buckets; add the numbers of patches, "
                    "e.g. `token_buckets = [60, 98, 137]`"
                )
            return
        if tokens not in _BUCKETED:
            *others, last = (f'"{name}"' for name in _BUCKETED)
            raise ValueError(
                f'token_buckets needs tokens = {", ".join(others)} or {last}; "{tokens}" fuses '
                "the dropped patches into a token, so that their share of the scores is not lost"
            )
        if len(given.keys() - {"token_bucket_rule"}) != 1:
            raise ValueError(
                "`token_buckets` needs one of `token_mean_patches` and `token_coverage`, e.g. "
                "`token_coverage = 0.9`"
            )
        if {"token_bucket_rule", "token_coverage"} <= given.keys():
            raise ValueError(
                "token_bucket_rule and token_coverage: a coverage is a rule of its own; keep one"
            )
        low, high = self.token_buckets[0], self.token_buckets[-1]
        if self.token_mean_patches is not None and not low <= self.token_mean_patches <= high:
            raise ValueError(
                f"token_mean_patches = {self.token_mean_patches}: give a number from {low} to "
                f"{high}, the first and the last of token_buckets"
            )
