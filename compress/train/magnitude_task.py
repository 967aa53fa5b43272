"""Iterative magnitude pruning: rounds of training, each between two masks of single weights.

References:
    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    Renda, Frankle, Carbin 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning"
    (learning-rate rewinding, `Schedule.rewind`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from ..masks.weight_choice import WeightOptions
from ..masks.weight_mask import WeightMask, next_mask
from ..network.modules.model import CompactModel
from .dense import DenseTask, Distillation
from .optimizers import OptimizerName
from .regularization import DenseOptions
from .task import EpochEnd


class TrainingKeywords(TypedDict, total=False):
    """Keywords of `DenseTask` that are the same here, with its defaults."""

    lr: float
    weight_decay: float
    label_smoothing: float
    distillation: Distillation | None
    metrics: dict[str, float] | None
    optimizer: OptimizerName
    options: DenseOptions | None


class MagnitudeTask(DenseTask):
    """Train a network in rounds, with more weights at zero in each.

    The first mask is chosen at once, one more at the end of each round: the last one when the phase
    ends, from the best epoch of the last round. What comes after it is fine-tuning.

    Args:
        model: The network, pruned and trained in place.
        choice: How weights are chosen, with the final sparsity.
        sparsities: The rising sparsity of each mask; one more than rounds. The last one is final.
        round_epochs: The epochs of a round.
        **training: What `DenseTask` takes.
    """

    model: CompactModel

    def __init__(
        self,
        model: CompactModel,
        choice: WeightOptions,
        sparsities: Sequence[float],
        round_epochs: int,
        **training: Unpack[TrainingKeywords],
    ) -> None:
        self.choice, self.sparsities = choice, tuple(sparsities)
        self.round_epochs, self.round = round_epochs, 0
        super().__init__(
            model,
            phase="masks",
            weights=next_mask(model, replace(choice, sparsity=self.sparsities[0])),
            **training,
        )

    @property
    def mask(self) -> WeightMask:
        """The present mask; the final one after `finish`."""
        assert self.held is not None
        return self.held.mask

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """Narrow the mask after each round but the last; its epochs alone may be the best."""
        last = len(self.sparsities) - 2
        metrics = {**self.metrics, "sparsity": self.mask.sparsity}
        if self.round == last:
            return EpochEnd(metrics=metrics)
        if epoch % self.round_epochs:
            return EpochEnd(metrics=metrics, score=-math.inf)
        self._narrow()
        # Moments of the round before are of weights that are gone.
        return EpochEnd(metrics=metrics, score=-math.inf, optimizer=self.optimizer())

    def state(self) -> dict[str, Any]:
        """The parameters, the round and its mask."""
        kept = {name: keep.clone() for name, keep in self.mask.kept.items()}
        return {**super().state(), "round": self.round, "kept": kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the parameters, the round and its mask."""
        assert self.held is not None
        self.round = int(state["round"])
        self.held.replace(replace(self.mask, kept=dict(state["kept"])))
        super().load_state(state)

    def finish(self) -> None:
        """Give the network its final weights, and narrow the mask to the final sparsity."""
        self._narrow()
        super().finish()

    def _narrow(self) -> None:
        assert self.held is not None
        if self.average is not None and self.round == len(self.sparsities) - 2:
            # What ends the phase are the averaged weights.
            self.model.load_state_dict(self.average.module.state_dict())
        self.round += 1
        options = replace(self.choice, sparsity=self.sparsities[self.round])
        self.held.replace(next_mask(self.model, options, self.mask))
        if self.average is not None:
            self.held.apply(self.average.module)
