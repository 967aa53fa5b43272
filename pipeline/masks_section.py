"""The table `[masks]` of a recipe: how much remains, and how that is chosen."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from .bucket_keys import BUCKET_KEYS, BucketKeys
from .latency_keys import LatencyKeys, positive, share
from .recipe_sections import Augmentation
from .weight_keys import WeightKeys

# How patches are chosen that leave the network on the way. The first ones after "learned" choose
# for each image, and so does class-attention with `token_ratio`.
TokenMethod = Literal[
    "learned",
    "dynamicvit",
    "evit",
    "dps",
    "patch-slimming",
    "class-attention",
    "column-attention",
    "power-bert",
    "scop",
    "radial",
    "random",
]


WidthMethod = Literal["learned", "closed-form", "vtp", "l1", "l2", "random", "magnitude"]
# Methods that rank units by a criterion of `StructuredMask.from_saliency`.
RANKING = ("l1", "l2", "random")
TokenOrder = Literal["together", "tokens-first", "widths-first"]
SELECTING: tuple[str, ...] = get_args(TokenMethod)[1:4]
# Those that choose one set of patches for all images, without training.
CHOOSING: tuple[str, ...] = get_args(TokenMethod)[4:]
# Keys that set how many tokens a choice for all images keeps.
COUNT_KEYS = ("token_macs", "token_counts", "token_tolerance")
# Keys of the methods that choose for each image; those of a static choice beside them.
SELECTION_KEYS = (
    *("token_ratio", "token_stages", "token_rule", "token_order", "token_epochs", "token_lr"),
    *("token_ratio_weight", *BUCKET_KEYS),
)


class MasksSection(LatencyKeys, WeightKeys, BucketKeys):
    """The size of the compact model and how its masks are learned.

    Exactly one of `params`, `macs`, `lambda`, `file_mb`, `latency_ms`, `latency` and
    `weight_sparsity` sets the size; `file_mb` may stand beside a latency.
    """

    method: WidthMethod = Field(
        "learned",
        description="learned: gates are trained for `epochs` epochs; closed-form: widths are "
        "chosen and output projections refitted from `images` unlabeled images, without training; "
        "vtp: control coefficients are trained and thresholded; l1, l2, random: units are ranked "
        "in each layer by the norm of their weights, or at random, without training; magnitude: "
        "single weights become zero and stay zero (`weight_sparsity`)",
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
        "widths, under the same budget, `macs` or a latency; dynamicvit, evit, dps, and "
        "class-attention with `token_ratio`: a constant number is chosen for each image; another "
        "method: one set for all images is chosen from `images`, before widths, for `token_macs`, "
        "`token_counts` or `token_tolerance`; absent: every patch stays to the end",
    )
    token_macs: float | None = share(
        "with a method that chooses one set for all images: share of the multiply-adds "
        "of the baseline that dropping tokens leaves, e.g. 0.6; `params = 1.0` then keeps all "
        "widths",
    )
    token_counts: tuple[int, ...] | None = Field(
        None,
        strict=False,
        description="instead of `token_macs`: the tokens after each block, prefix tokens included; "
        "instead of `token_ratio`: the patches that each stage keeps",
    )
    token_schedule: Literal["error", "importance", "uniform", "linear", "constant"] | None = Field(
        None,
        description="how `token_macs` distributes the counts: error, the least measured error of "
        "the features (absent, with methods that read images), importance, the least dropped share "
        "of the scores, uniform, the same share of the patches in each block (absent, with radial "
        "and random), linear, or constant. Methods are compared at equal counts by one of the last "
        "three",
    )
    token_tolerance: float | None = share(
        "patch-slimming, instead of `token_macs`: the counts follow from this relative squared "
        "error of the next block, e.g. 0.02, and each block is refitted from its inputs on "
        "`images` (Algorithm 1 of the source; takes minutes)"
    )
    token_ratio: float | None = share(
        "with a method that chooses for each image: share of the patches that the "
        "first stage keeps; absent: 0.7, and class-attention chooses one set for all images",
    )
    token_stages: tuple[int, ...] | None = Field(
        None,
        strict=False,
        description="blocks, counted from 0, before which predictors choose, or within which "
        "attention does, e.g. [3, 6, 9]; absent: after each quarter of the depth",
    )
    token_rule: Literal["geometric", "subtractive"] | None = Field(
        None,
        description="shares of the later stages: ratio², ratio³ ... (geometric; absent), or "
        "ratio - 0.2, ratio - 0.4 ... (subtractive)",
    )
    token_order: TokenOrder | None = Field(
        None,
        description="together (absent): predictors and widths are learned at once; tokens-first: "
        "predictors learn, then widths around them; widths-first: the reverse, and what "
        "closed-form does. `params = 1.0` or `macs = 1.0` keeps all widths",
    )
    token_epochs: int | None = Field(
        None,
        ge=0,
        description="epochs in which tokens are learned alone, where `token_order` has such a "
        "phase; absent: `epochs`, and 0 for class-attention",
    )
    token_lr: float | None = positive(
        "learning rate of predictors outside fine-tuning; absent: 1e-3. evit and class-attention "
        "have none: all weights learn at `lr`"
    )
    token_ratio_weight: float | None = Field(
        None,
        ge=0.0,
        description="weight of DynamicViT's loss on kept shares; absent: 2. More where the share "
        "that is kept in training (`kept_percent_0`... in history.jsonl) stays above the target",
    )
    epochs: int = Field(20, gt=0, description="maximum number of epochs of mask learning")
    lr: float = Field(1e-4, gt=0.0, description="learning rate of the weights during mask learning")
    score_lr: float = Field(
        1e-2,
        gt=0.0,
        description="learning rate of the mask scores, or control coefficients (their weight decay "
        "is 0)",
    )
    sparsity: float | None = Field(
        None,
        ge=0.0,
        description="vtp: weight of the sum of all control coefficients in the loss; absent: 1e-4",
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
    def selects_tokens(self) -> bool:
        """Whether patches are chosen for each image."""
        return self.tokens in SELECTING or (
            self.tokens == "class-attention" and self.token_ratio is not None
        )

    @property
    def chooses_tokens(self) -> bool:
        """Whether one set of tokens is chosen before widths, by a method that trains no gates."""
        return self.tokens not in (None, "learned") and not self.selects_tokens

    @property
    def keeps_widths(self) -> bool:
        """Whether the budget leaves all widths, so that patches alone are dropped."""
        return self.selects_tokens and 1.0 in (self.params, self.macs)

    @property
    def order(self) -> TokenOrder:
        """In which order patches and widths are learned."""
        if self.method == "closed-form":
            return "widths-first"
        return self.token_order or "together"

    @property
    def alone_epochs(self) -> int:
        """Epochs in which the choice of patches for each image is trained at fixed widths."""
        if not self.selects_tokens or self.method == "closed-form":
            return 0
        if self.order == "together" and not self.keeps_widths:
            return 0
        default = 0 if self.tokens == "class-attention" else self.epochs
        return default if self.token_epochs is None else self.token_epochs

    @property
    def width_epochs(self) -> int:
        """Epochs of mask learning."""
        return self.epochs if self.trains_widths and not self.keeps_widths else 0

    @property
    def trains_widths(self) -> bool:
        """Whether widths are chosen by a training."""
        return self.method in ("learned", "vtp")

    @property
    def round_epochs(self) -> int:
        """Epochs between the masks of single weights."""
        return self.epochs * (self.rounds - 1) if self.method == "magnitude" else 0

    @field_validator("fixed")
    @classmethod
    def _no_duplicates(cls, fixed: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(fixed)) != len(fixed):
            raise ValueError("a dimension is listed twice")
        return fixed

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = {"params": self.params, "macs": self.macs, "lambda": self.lambda_}
        sizes |= {"latency_ms": self.latency_ms, "latency": self.latency}
        sizes["file_mb"] = None if self.has_latency else self.file_mb
        sizes["weight_sparsity"] = self.weight_sparsity
        given = [f"`{key}`" for key, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the size; keep one")
        if not given:
            raise ValueError(
                "nothing sets the size; add one of `params = 0.3`, `macs = 0.5` or `lambda = 1e-7`"
            )
        self.check_latency(self.method, self.start, self.sharing)
        given_keys = {"fixed": bool(self.fixed), "start": self.start != "dense"}
        self.check_weights(self.method, {**given_keys, "tokens": self.tokens is not None})
        if self.method != "learned" and self.lambda_ is not None:
            raise ValueError(
                f'method = "{self.method}" needs a budget; replace `lambda` by `params` or `macs`'
            )
        if self.method not in ("learned", "closed-form") and self.tokens is not None:
            raise ValueError(
                f'method = "{self.method}" chooses widths alone; leave `tokens` out, or write '
                'method = "learned" or "closed-form"'
            )
        if self.sparsity is not None and self.method != "vtp":
            raise ValueError(f'sparsity is of method = "vtp"; "{self.method}" has none')
        if self.method == "vtp" and self.sharing == "unshared":
            raise ValueError(
                'method = "vtp" needs sharing = "residual" or "full": its coefficients are on what '
                "projections read, and unshared masks are on what they write, too"
            )
        priced = self.macs is not None or self.has_latency
        if self.tokens == "learned" and not (self.method == "learned" and priced):
            raise ValueError(
                'tokens = "learned" needs method = "learned" and the budget `macs` or a latency: '
                "tokens have no parameters, so `params` and `lambda` set no price for them"
            )
        self._check_tokens()
        if self.start == "one-shot" and (self.method, self.lambda_) != ("learned", None):
            raise ValueError(
                'start = "one-shot" needs method = "learned" and a budget, `params` or `macs`'
            )
        return self

    def _check_tokens(self) -> None:
        given = [key for key in COUNT_KEYS if getattr(self, key) is not None]
        if self.selects_tokens:
            self._check_selection(given)
            return
        for key in SELECTION_KEYS:
            if getattr(self, key) is not None:
                raise ValueError(
                    f'{key} needs a method that chooses for each image, e.g. tokens = "dynamicvit"'
                )
        if self.token_schedule is not None and not (self.chooses_tokens and self.token_macs):
            raise ValueError(
                "token_schedule distributes `token_macs`, the share of a choice for all images: "
                'add both to a method, e.g. tokens = "patch-slimming"'
            )
        if not self.chooses_tokens:
            if given:
                raise ValueError(f'{given[0]} needs a method, e.g. tokens = "patch-slimming"')
            return
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` both set the tokens; keep one")
        if not given:
            raise ValueError(
                f'tokens = "{self.tokens}" needs one of `token_macs = 0.6` and `token_counts`, the '
                'tokens after each block; "patch-slimming" takes `token_tolerance = 0.02`, too'
            )
        if self.token_tolerance is not None and self.tokens != "patch-slimming":
            raise ValueError(
                f'token_tolerance is of tokens = "patch-slimming"; "{self.tokens}" takes '
                "`token_macs = 0.6` or `token_counts`"
            )

    def _check_selection(self, given: list[str]) -> None:
        """Check the keys of a choice for each image; `given` are those of a static one."""
        self.check_buckets(self.tokens)
        if self.token_schedule is not None:
            given = [*given, "token_schedule"]
        for key in given:
            if key != "token_counts":
                raise ValueError(
                    f'{key} is that of one set for all images; tokens = "{self.tokens}" takes '
                    "`token_ratio = 0.7` or `token_counts`, the patches of each stage"
                )
        if given and self.token_ratio is not None:
            raise ValueError("`token_counts` and `token_ratio` both set the patches; keep one")
        if self.method == "closed-form" and self.token_order not in (None, "widths-first"):
            raise ValueError(
                f'token_order = "{self.token_order}" needs method = "learned"; a closed-form cut '
                'of widths comes first, token_order = "widths-first"'
            )
        if self.method == "learned" and self.has_latency and self.order == "widths-first":
            raise ValueError(
                'token_order = "widths-first": the widths\' share of a latency is not known before '
                'the selections; write "together" or "tokens-first"'
            )
        if self.token_ratio_weight is not None and self.tokens != "dynamicvit":
            raise ValueError(f'token_ratio_weight is of "dynamicvit"; "{self.tokens}" has none')
        if self.token_epochs == 0 and self.tokens in ("dynamicvit", "dps"):
            raise ValueError(
                f'token_epochs = 0 leaves tokens = "{self.tokens}" untrained; leave it out, or '
                'use tokens = "class-attention", which needs no training'
            )
