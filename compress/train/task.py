"""The interface between the training loop and a phase: dense training, masks or fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from .devices import Placement


@dataclass(frozen=True)
class EpochEnd:
    """What a task returns at the end of an epoch.

    Attributes:
        metrics: Figures for history.jsonl and the progress line: `params` and `macs` are absolute
            counts, `lambda` is the penalty.
        score: By which the best epoch is chosen, higher is better. None: the validation top-1;
            -inf: this epoch must not be the best, since it is over budget.
        stop: The reason to end the phase after this epoch, or None.
        optimizer: A new optimizer if the model was rebuilt smaller; the `lr` (or `initial_lr`) of
            each group is its peak.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    stop: str | None = None
    optimizer: Optimizer | None = None


class Task(Protocol):
    """One phase of training: `baseline`, `masks` or `finetune`."""

    phase: str

    def place(self, placement: Placement) -> None:
        """Move everything to a device; called before any other method, and at the end."""

    def trained(self) -> nn.Module:
        """The module with all parameters that get gradients; a new one after it was rebuilt."""

    def observed(self) -> Sequence[nn.Parameter]:
        """Parameters outside the optimizer whose gradients `after_step` reads."""

    def optimizer(self) -> Optimizer:
        """Create an optimizer over the current parameters; the `lr` of each group is its peak."""

    def train_mode(self) -> None:
        """Set the model to training mode; called at the start of each epoch."""

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch.

        Args:
            images: float32 (B, C, H, W).
            targets: Class numbers (B,), or soft targets (B, classes).

        Returns:
            The scalar loss, and the logits (B, classes).
        """

    def after_step(self, step: int) -> None:
        """Update the task after an optimizer step, counted from 0 over the whole phase."""

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """End an epoch, after validation and before the checkpoint is written.

        Args:
            epoch: Counted from 1.
            val_top1: In percent.
        """

    def model_for_eval(self) -> nn.Module:
        """The model to validate, in evaluation mode."""

    def state(self) -> dict[str, Any]:
        """The state for a resumed run: tensors on the CPU and plain data only."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state; the model is rebuilt if it was smaller."""

    def finish(self) -> None:
        """Give the model its final weights; called once, after the best state was restored."""
