"""The table `[masks]` of a recipe: how much remains, and how that is chosen."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from .recipe_sections import Augmentation, Section

# How patches are chosen that leave the network on the way.
TokenMethod = Literal[
    "learned",
    "patch-slimming",
    "class-attention",
    "column-attention",
    "power-bert",
    "scop",
    "radial",
    "random",
]


class MasksSection(Section):
    """The size of the compact model and how its masks are learned.

    Exactly one of `params`, `macs`, `lambda`, `file_mb` and `latency_ms` sets the size.
    """

    method: Literal["learned", "closed-form"] = Field(
        "learned",
        description="learned: gates are trained for `epochs` epochs; closed-form: widths are "
        "chosen and output projections refitted from `images` unlabeled images, without training",
    )
    start: Literal["dense", "one-shot"] = Field(
        "dense",
        description="learned: the network that mask learning starts from: the baseline, or its "
        "closed-form cut to the square root of the budget, for short trainings",
    )
    images: int = Field(
        512,
        gt=1,
        description="closed-form and one-shot: number of training images; their labels are not "
        "used",
    )
    params: float | None = Field(
        None, gt=0.0, le=1.0, description="budget: share of the parameters that remains, e.g. 0.3"
    )
    macs: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="budget: share of the multiply-adds that remains, e.g. 0.5",
    )
    lambda_: float | None = Field(
        None,
        alias="lambda",
        ge=0.0,
        description="without a budget: fixed weight of the size penalty, e.g. 1e-7",
    )
    file_mb: float | None = Field(
        None,
        gt=0.0,
        description="closed-form: budget: computed size of the file in megabytes, with weights of "
        "`file_precision`",
    )
    file_precision: Literal["fp32", "fp16", "int8"] = Field(
        "fp32", description="precision of the weights in `file_mb`"
    )
    latency_ms: float | None = Field(
        None,
        gt=0.0,
        description="closed-form: budget: milliseconds of all sub-layers by `cost_table`",
    )
    cost_table: str | None = Field(
        None, min_length=1, description="file of `vitrim bench --cost-table`, for `latency_ms`"
    )
    sharing: Literal["residual", "unshared", "full"] = Field(
        "residual",
        description="residual: one mask for the residual stream; full: one mask per dimension for "
        "all blocks; unshared: every mask is independent",
    )
    fixed: tuple[Literal["head", "embed", "ffn", "qk", "v", "token"], ...] = Field(
        (), strict=False, description="dimensions that are not pruned"
    )
    tokens: TokenMethod | None = Field(
        None,
        description="learned: patches leave the network at depths that are learned with the "
        "widths, under the same budget `macs`; another method: they are chosen from `images`, "
        "before widths, for `token_macs` or `token_counts`; absent: every patch stays to the end",
    )
    token_macs: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="with a method of `tokens` other than learned: share of the multiply-adds of "
        "the baseline that dropping tokens leaves, e.g. 0.6; `params = 1.0` then keeps all widths",
    )
    token_counts: tuple[int, ...] | None = Field(
        None,
        strict=False,
        description="instead of `token_macs`: the tokens after each block, prefix tokens included",
    )
    epochs: int = Field(20, gt=0, description="maximum number of epochs of mask learning")
    lr: float = Field(1e-4, gt=0.0, description="learning rate of the weights during mask learning")
    score_lr: float = Field(
        1e-2, gt=0.0, description="learning rate of the mask scores (their weight decay is 0)"
    )
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay of the weights")
    restart_epochs: int = Field(
        4, gt=0, description="period in epochs of cosine annealing with warm restarts"
    )
    patience_epochs: int = Field(
        20,
        gt=0,
        description="stop after this many epochs with neither a better accuracy nor a smaller size",
    )
    augmentation: Augmentation = Field("light", description="augmentation during mask learning")
    attention_overhead_macs: float = Field(
        1.3e6,
        ge=0.0,
        description="with a budget: fixed cost of an attention, as the multiply-adds that take "
        "equally long; an attention that is not worth it is removed; 0: attentions are never "
        "removed as a whole",
    )
    ffn_overhead_macs: float = Field(
        4e5,
        ge=0.0,
        description="the same for an FFN (`python -m benchmarks.compression.sublayer_cost` "
        "measures both)",
    )
    round_to: int | None = Field(
        None,
        gt=0,
        description="round kept widths to multiples of this; absent: the target's preferred "
        "multiple",
    )

    @property
    def chooses_tokens(self) -> bool:
        """Whether tokens are chosen before widths, by a method that trains no gates."""
        return self.tokens not in (None, "learned")

    @field_validator("fixed")
    @classmethod
    def _no_duplicates(cls, fixed: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(fixed)) != len(fixed):
            raise ValueError("a dimension is listed twice")
        return fixed

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = {"params": self.params, "macs": self.macs, "lambda": self.lambda_}
        sizes |= {"file_mb": self.file_mb, "latency_ms": self.latency_ms}
        given = [f"`{key}`" for key, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the size; keep one")
        if not given:
            raise ValueError(
                "nothing sets the size; add one of `params = 0.3`, `macs = 0.5` or `lambda = 1e-7`"
            )
        self._check_measured()
        if self.method == "closed-form" and self.lambda_ is not None:
            raise ValueError(
                'method = "closed-form" needs a budget; replace `lambda` by `params` or `macs`'
            )
        if self.tokens == "learned" and (self.method, self.macs is None) != ("learned", False):
            raise ValueError(
                'tokens = "learned" needs method = "learned" and the budget `macs`: tokens have no '
                "parameters, so `params` and `lambda` set no price for them"
            )
        self._check_tokens()
        if self.start == "one-shot" and (self.method, self.lambda_) != ("learned", None):
            raise ValueError(
                'start = "one-shot" needs method = "learned" and a budget, `params` or `macs`'
            )
        return self

    def _check_measured(self) -> None:
        for key in ("file_mb", "latency_ms"):
            if getattr(self, key) is not None and self.method != "closed-form":
                raise ValueError(
                    f'{key} needs method = "closed-form"; masks are learned for `params` or `macs`'
                )
        if (self.latency_ms is None) != (self.cost_table is None):
            raise ValueError(
                "latency_ms and cost_table need each other; `vitrim bench --cost-table` measures "
                "one"
            )

    def _check_tokens(self) -> None:
        given = [key for key in ("token_macs", "token_counts") if getattr(self, key) is not None]
        if not self.chooses_tokens:
            if given:
                raise ValueError(f'{given[0]} needs a method, e.g. tokens = "patch-slimming"')
        elif len(given) != 1:
            raise ValueError(
                f'tokens = "{self.tokens}" needs one of `token_macs = 0.6` and `token_counts`, the '
                "tokens after each block"
            )
