"""Learning rate schedules as pure functions of the step, so that resumed runs continue exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim import Optimizer

from ...core.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule.

    Attributes:
        kind: "cosine" falls once from the rate of each group to `min_lr`; "restarts" does so every
            `restart_epochs`; "constant" does not fall.
        warmup_epochs: The epochs in which the rate first rises linearly from `min_lr`.
        restart_epochs: The length of a cycle of "restarts".
        min_lr: The lowest rate.
        rewind: Each cosine is the last part of a longer one, this share of it, without warm-up:
            with 0.25 it begins at 15 % of the peak. None: the whole one.

    Raises:
        InputError: An unknown kind, or a number out of range.

    References:
        Renda, Frankle, Carbin 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning"
        (learning-rate rewinding).
    """

    kind: Literal["cosine", "restarts", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    restart_epochs: int = 4
    min_lr: float = 1e-6
    rewind: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "restarts", "constant"):
            raise InputError(
                f"schedule {self.kind!r}: not known; choose cosine, restarts or constant"
            )
        if self.restart_epochs < 1 or self.warmup_epochs < 0 or self.min_lr < 0:
            raise InputError(
                "schedule: restart_epochs must be at least 1, warmup_epochs and min_lr at least 0"
            )
        if self.rewind is not None and (
            not 0.0 < self.rewind <= 1.0 or self.warmup_epochs or self.kind == "constant"
        ):
            raise InputError(
                f"schedule: rewind = {self.rewind} must lie in (0, 1], and is of a cosine without "
                "warm-up"
            )


class LearningRate:
    """Sets the learning rate of every group of an optimizer.

    Args:
        optimizer: The optimizer; the initial rate of each group is its peak.
        schedule: The schedule.
        epochs: The epochs of the whole training.
        steps_per_epoch: The optimizer steps of one epoch.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, epochs: int, steps_per_epoch: int
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        warmup = round(min(schedule.warmup_epochs, epochs) * steps_per_epoch)
        if schedule.kind == "restarts":
            length, cycles = schedule.restart_epochs * steps_per_epoch, 1_000_000
        else:
            length, cycles = max(1, epochs * steps_per_epoch - warmup), 1
        # timm has no constant schedule for groups of different rates, so `set` computes it.
        self.constant, self.min_lr = schedule.kind == "constant", schedule.min_lr
        self.optimizer, self.warmup = optimizer, warmup
        self.rewind, self.length = schedule.rewind, length
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=length,
            lr_min=schedule.min_lr,
            cycle_limit=cycles,
            warmup_t=warmup,
            warmup_lr_init=schedule.min_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, step: int) -> float:
        """Set the rates for a step, counted from 0; return that of the first group.

        A group rests, at the rate 0, in the first `frozen_steps` that its optimizer states for it.
        """
        if self.rewind is not None:
            # Restarts are cycles of one length; a single cosine ends with its phase.
            place = 1.0 - self.rewind * (1.0 - step % self.length / self.length)
            for group in self.optimizer.param_groups:
                span = group["initial_lr"] - self.min_lr
                group["lr"] = self.min_lr + 0.5 * span * (1.0 + math.cos(math.pi * place))
        elif not self.constant:
            self.cosine.step_update(step)
        else:
            for group in self.optimizer.param_groups:
                peak = group["initial_lr"]
                if step < self.warmup:
                    peak = self.min_lr + (peak - self.min_lr) * step / self.warmup
                group["lr"] = peak
        for group in self.optimizer.param_groups:
            if step < group.get("frozen_steps", 0):
                group["lr"] = 0.0
        return float(self.optimizer.param_groups[0]["lr"])
