"""The settings and the result of one training phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.errors import InputError
from .augment import Preset
from .devices import Placement
from .schedule import Schedule


@dataclass(frozen=True)
class TrainSettings:
    """How long and how a phase trains; learning rates and weight decay belong to the task.

    Attributes:
        epochs: The number of epochs.
        batch_size: The number of images in a step.
        seed: For the order of images, augmentation and dropout.
        augmentation: The preset.
        label_smoothing: For the soft targets of the preset `thesis`.
        schedule: The learning rate schedule.
        patience_epochs: Stop after this number of epochs without a better score; None never stops.
        grad_clip: The largest gradient norm; None does not clip.
        restore_best: End with the state of the best epoch instead of the last one.
        matmul_precision: As for `torch.set_float32_matmul_precision`.
        threads: The threads of torch; None leaves them.
        quiet: Print nothing.
        placement: The device and the precision.
        accumulate: The number of parts in which a process computes its share of a batch, one after
            the other, to need less memory; the step is that of the whole batch.
        workers: The number of processes that read images that are not decoded in advance.
        checkpoint_s: Seconds after which a checkpoint is written within an epoch.

    Raises:
        InputError: A number is out of range.
    """

    epochs: int
    batch_size: int = 128
    seed: int = 7
    augmentation: Preset = "light"
    label_smoothing: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)
    patience_epochs: int | None = None
    grad_clip: float | None = 1.0
    restore_best: bool = True
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    threads: int | None = None
    quiet: bool = False
    placement: Placement = field(default_factory=Placement)
    accumulate: int = 1
    workers: int = 0
    checkpoint_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise InputError(
                f"training: epochs = {self.epochs} and batch_size = {self.batch_size} "
                "must be at least 0 and 1"
            )
        if self.accumulate < 1:
            raise InputError(f"training: accumulate = {self.accumulate} must be at least 1")


@dataclass(frozen=True)
class TrainResult:
    """The result of a phase.

    Attributes:
        epochs: The number of trained epochs.
        best_epoch: The best one, or 0 if none qualified.
        best_val_top1: Its validation top-1 in percent.
        stopped: Why the phase ended early, or None.
        history: The lines of this phase in history.jsonl.
    """

    epochs: int
    best_epoch: int
    best_val_top1: float
    stopped: str | None
    history: list[dict[str, Any]]
