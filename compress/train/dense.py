"""Ordinary training of a whole model: the baseline, and the fine-tuning after the cut, with or
without a teacher.

Distillation: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section
2: loss = (1 - alpha) * CE(logits, targets) + alpha * T^2 * KL(softmax(teacher / T) ||
softmax(logits / T)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.errors import InputError
from .optimizers import OptimizerName, make_optimizer
from .task import EpochEnd


@dataclass(frozen=True)
class Distillation:
    """Learn from a teacher's outputs. alpha: its share of the loss; temperature: the softening of
    both outputs.
    """

    teacher: nn.Module
    alpha: float = 0.9
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0 or self.temperature <= 0.0:
            raise InputError(
                f"distillation: alpha = {self.alpha} must lie in [0, 1] and temperature = {self.temperature} above 0"
            )


class DenseTask:
    """Train every parameter of `model`. `phase` is `baseline` or `finetune`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        phase: str = "baseline",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        distillation: Distillation | None = None,
        metrics: dict[str, float] | None = None,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        self.model, self.phase, self.lr, self.weight_decay, self.optimizer_name = (
            model,
            phase,
            lr,
            weight_decay,
            optimizer,
        )
        self.label_smoothing, self.distillation = label_smoothing, distillation
        # Figures that do not change in this phase but belong in its history, such as params and
        # macs.
        self.metrics = dict(metrics or {})

    def optimizer(self) -> Optimizer:
        return make_optimizer(self.optimizer_name, self.model, self.lr, self.weight_decay)

    def train_mode(self) -> None:
        self.model.train()

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(images)
        return task_loss(logits, targets, images, self.label_smoothing, self.distillation), logits

    def after_step(self, step: int) -> None:
        pass

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        return EpochEnd(metrics=self.metrics)

    def model_for_eval(self) -> nn.Module:
        return self.model

    def state(self) -> dict[str, Any]:
        return {
            "model": {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])


def task_loss(
    logits: Tensor,
    targets: Tensor,
    images: Tensor,
    label_smoothing: float,
    distillation: Distillation | None,
) -> Tensor:
    """Cross-entropy, mixed with the teacher's word if there is a teacher. Soft targets (B, classes)
    carry their smoothing already.
    """
    own = F.cross_entropy(
        logits, targets, label_smoothing=label_smoothing if targets.ndim == 1 else 0.0
    )
    if distillation is None or distillation.alpha == 0.0:
        return own
    return (1.0 - distillation.alpha) * own + distillation.alpha * distillation_loss(
        logits, images, distillation
    )


def distillation_loss(logits: Tensor, images: Tensor, distillation: Distillation) -> Tensor:
    """T^2 * KL(teacher || student), mean over the batch; scalar, in nats."""
    teacher, temperature = distillation.teacher, distillation.temperature
    teacher.eval()
    with torch.inference_mode():
        taught = teacher(images)
    # Out of inference mode by a copy, so that the backward pass may keep it.
    wanted = F.log_softmax(taught.clone() / temperature, dim=1)
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, dim=1), wanted, reduction="batchmean", log_target=True
    )
