"""What a training phase brings to the loop. Dense training, fine-tuning and mask learning are
tasks; the loop knows nothing of masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class EpochEnd:
    """A task's word at the end of an epoch.

    metrics: keys for history.jsonl and the progress line (`params` and `macs` are absolute counts,
    `lambda` the penalty). score: what `best` means, higher is better; None is validation top-1,
    -inf: this epoch may not be the best (over budget). stop: end the phase after this epoch, with a
    reason to print. optimizer: set when the model was rebuilt smaller. Its groups carry their peak
    learning rate in `lr` (or `initial_lr`).
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    stop: str | None = None
    optimizer: Optimizer | None = None


class Task(Protocol):
    """One phase of training: `baseline`, `masks` or `finetune`."""

    phase: str

    def optimizer(self) -> Optimizer:
        """A new optimizer over the present parameters; each group's `lr` is its peak."""

    def train_mode(self) -> None:
        """Put the model into training mode (called at the start of each epoch)."""

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """images float32 (B, C, H, W), targets int64 (B,) or soft (B, classes) -> scalar loss,
        logits (B, classes).
        """

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, `step` counted from 0 over the whole phase (multiplier
        updates, pinned scores, ...).
        """

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """Called once validation is done, before the checkpoint is written; epochs count from 1,
        top-1 is in percent.
        """

    def model_for_eval(self) -> nn.Module:
        """The model whose validation top-1 counts, in evaluation mode."""

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain data only."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what `state` describes, rebuilding the model if it had shrunk."""
