"""Keys of `[masks]` for zeros among single weights, which stay zero through fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .recipe_sections import Section

WEIGHT_KEYS = (
    *("weight_granularity", "weight_ranking", "weight_scope", "weight_rounds", "weight_rewind"),
)


class WeightKeys(Section):
    """What `masks.method = "magnitude"` reads; every key is absent with other methods."""

    weight_sparsity: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="magnitude: share of the weights in `weight_scope` that become zero and stay "
        "zero, e.g. 0.9; the shapes stay",
    )
    weight_granularity: Literal["weight", "row", "column"] | None = Field(
        None, description="magnitude: single weights (absent), or whole rows or columns of matrices"
    )
    weight_ranking: Literal["global", "layerwise", "random", "shuffled"] | None = Field(
        None,
        description="magnitude: by magnitude over all matrices at once (global; absent), or the "
        "same share in each (layerwise); random: the shares of global, of weights drawn at random; "
        "shuffled: these shares also change places among matrices of equal size",
    )
    weight_scope: Literal["all", "attention", "ffn"] | None = Field(
        None, description="magnitude: matrices of attentions and FFNs (absent), or of one of them"
    )
    weight_rounds: int | None = Field(
        None,
        gt=0,
        le=100,
        description="magnitude: number of masks, each of which removes an equal share of what is "
        "left; `epochs` epochs follow each but the last, which is fine-tuned; absent: 1, one-shot",
    )
    weight_rewind: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="magnitude: in each round, the learning rate takes the last part of the cosine "
        "of a longer training, this share of it; absent: 1. The same as `finetune.rewind`",
    )

    @property
    def rounds(self) -> int:
        """The number of masks of single weights."""
        return self.weight_rounds or 1

    def check_weights(self, method: str, others: dict[str, bool]) -> None:
        """Validate the keys together.

        Args:
            method: `masks.method`.
            others: Keys of other methods, and whether they are given.

        Raises:
            ValueError: They contradict each other; the message names the key.
        """
        if method != "magnitude":
            for key in ("weight_sparsity", *WEIGHT_KEYS):
                if getattr(self, key) is not None:
                    raise ValueError(f'{key} needs method = "magnitude"; "{method}" has none')
            return
        if self.weight_sparsity is None:
            raise ValueError(
                'method = "magnitude" sets weights to zero and keeps the shapes; write '
                "`weight_sparsity = 0.9` in place of the other size"
            )
        for key, given in others.items():
            if given:
                raise ValueError(
                    f'{key} is of a method that removes units; method = "magnitude" has none, '
                    "leave it out"
                )
