"""The settings of mask learning."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import InputError
from ..masks.budget import Budget
from ..masks.groups import Sharing
from ..oneshot.budgets import Precision
from .optimizers import OptimizerName


@dataclass(frozen=True)
class MaskSettings:
    """How masks are learned; exactly one of `budget` and `lambda_` is given.

    Attributes:
        budget: The size or latency to reach; the price of a unit of cost is found by the dual
            problem.
        lambda_: The price of a unit of cost in the loss, task_loss + lambda * cost.
        sharing: Which sites share a mask.
        fixed: Dimensions that are kept whole.
        tokens: Whether nested sets of tokens are learned, too, under a budget of multiply-adds or
            a latency.
        optimizer: The optimizer of the weights.
        lr: The peak learning rate of the weights.
        score_lr: The peak learning rate of the scores, with `lambda_`.
        weight_decay: Of the weights.
        label_smoothing: For class numbers as targets.
        ramp: Shares of the steps at which the budget starts to fall, is reached, and the masks
            freeze.
        update_steps: The number of steps between two solutions of the dual problem.
        shrink_gain: Dead units are removed from the training graph once they have this share of
            its MACs.
        size_patience_epochs: With `lambda_`, stop after this number of epochs without a better
            accuracy or a smaller size.
        round_to: When the masks freeze, kept counts are rounded to multiples of this.
        attention_overhead_macs: The cost of an attention beside its units, as the multiply-adds of
            the same time; a latency has it in its table. With 0 none is removed as a whole.
        ffn_overhead_macs: The same for an FFN.
        file_mb: With a latency: largest size of the weights in a file, in megabytes.
        peak_memory_mb: With a latency: largest memory of weights and activations, in megabytes.
        file_precision: Of the weights in both. None: that of the cost table.

    Raises:
        InputError: A setting is out of range.

    References:
        L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (`lambda_`).
    """

    budget: Budget | None = None
    lambda_: float | None = None
    sharing: Sharing = "residual"
    fixed: tuple[str, ...] = ()
    tokens: bool = False
    optimizer: OptimizerName = "adamw"
    lr: float = 5e-4
    score_lr: float = 5e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ramp: tuple[float, float, float] = (0.02, 0.6, 0.7)
    update_steps: int = 10
    shrink_gain: float = 0.08
    size_patience_epochs: int = 20
    round_to: int = 1
    attention_overhead_macs: float = 0.0
    ffn_overhead_macs: float = 0.0
    file_mb: float | None = None
    peak_memory_mb: float | None = None
    file_precision: Precision | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.lambda_ is None):
            raise InputError(
                "masks: give either a budget (params = 0.3 or macs = 0.5) or lambda = 1e-7, "
                "but not both"
            )
        if self.tokens and (self.budget is None or self.budget.kind == "params"):
            size = "lambda" if self.budget is None else f"params = {self.budget.ratio}"
            raise InputError(
                f"masks: tokens have no parameters, so {size} sets no price for them; "
                "learn them under a budget of multiply-adds, macs = 0.5"
            )
        latency = self.budget is not None and self.budget.kind == "latency"
        for name in ("file_mb", "peak_memory_mb"):
            if getattr(self, name) is not None and not latency:
                raise InputError(f"masks: {name} is a budget beside a latency; add latency_ms")
        if self.lambda_ is not None and self.lambda_ < 0:
            raise InputError(f"masks: lambda = {self.lambda_} must not be negative")
        if not 0 <= self.ramp[0] < self.ramp[1] <= self.ramp[2] <= 1:
            raise InputError(f"masks: ramp = {self.ramp} must rise within 0 and 1")
        for name in ("attention_overhead_macs", "ffn_overhead_macs"):
            if getattr(self, name) < 0:
                raise InputError(f"masks: {name} = {getattr(self, name)} must not be negative")
