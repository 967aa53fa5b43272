"""Training of a network that chooses patches for each image, at widths that stay."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..network.modules.model import CompactModel
from .dense import DenseTask
from .devices import Placement
from .objectives import Objective
from .optimizers import OptimizerName, adamw_lr, make_optimizer, split_rates
from .regularization import DenseOptions
from .task import EpochEnd


class SelectionTask(DenseTask):
    """Train a network with selections by the objective of their method.

    Args:
        model: The network, trained in place.
        objective: The decisions in training, and the loss.
        phase: `tokens` or `finetune`, the name in history and progress.
        lr: The peak learning rate of the weights. In a phase of selections alone, predictors have
            that of the objective's settings, and with "dynamicvit" the other weights 0.01 of it.
        weight_decay: For matrices and kernels.
        metrics: Constant figures for the history of this phase.
        optimizer: The name of the optimizer.
        options: Averaged weights, rates by depth, and stochastic depth (default: none of them).
    """

    model: CompactModel

    def __init__(
        self,
        model: CompactModel,
        objective: Objective,
        *,
        phase: str = "tokens",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        metrics: dict[str, float] | None = None,
        optimizer: OptimizerName = "adamw",
        options: DenseOptions | None = None,
    ) -> None:
        super().__init__(
            model,
            phase=phase,
            lr=lr,
            weight_decay=weight_decay,
            metrics=metrics,
            optimizer=optimizer,
            options=options,
        )
        self.objective, self._step = objective, 0
        self._figures: dict[str, float] = {}

    def place(self, placement: Placement) -> None:
        """Move the model, its average and the teacher to a device; nothing is compiled."""
        for module in (self.model, self.average):
            if module is not None:
                module.to(placement.device)
        self.objective.place(placement.device)

    def trained(self) -> nn.Module:
        """The model, with the parameters that this phase does not train at rest."""
        self.objective.attach(self.model)
        return self.model

    def optimizer(self) -> Optimizer:
        """A new optimizer over the parameters that are trained, predictors at their own rate."""
        self.objective.attach(self.model)
        settings, decay = self.objective.settings, self.options.layer_decay
        name, lr = self.optimizer_name, settings.backbone_lr(self.lr)
        made = make_optimizer(name, self.model, lr, self.weight_decay, decay)
        # In other phases a predictor is one more part of the network.
        factor = settings.lr / adamw_lr(name, lr) if settings.alone else 1.0
        frozen = settings.frozen_steps(self.objective.total_steps)
        return split_rates(made, self.model.selects.parameters(), factor, frozen)

    def train_mode(self) -> None:
        """Set the model to training mode, with the decisions of training."""
        super().train_mode()
        self.objective.attach(self.model)

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its logits (B, classes)."""
        self.objective.begin(self._step)
        logits: Tensor = self.model(images)
        return self.objective.loss(logits, targets, images), logits

    def after_step(self, step: int) -> None:
        """Count the step, and update the average of the weights."""
        self._step = step + 1
        super().after_step(step)

    def model_for_eval(self) -> nn.Module:
        """The model as it is shipped, or the one with the averaged weights."""
        self._figures = self.objective.metrics()
        self.objective.detach()
        return super().model_for_eval()

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """The constant metrics and those of the objective."""
        return EpochEnd(metrics={**self.metrics, **self._figures})

    def state(self) -> dict[str, Any]:
        """The parameters and buffers, and the number of steps."""
        return {**super().state(), "step": self._step}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the parameters, buffers and steps."""
        super().load_state(state)
        self._step = int(state["step"])

    def finish(self) -> None:
        """End as `DenseTask.finish`, with every parameter trainable."""
        super().finish()
        self.objective.release(self.model)
