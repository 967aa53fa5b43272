"""How the learning rate moves: timm's cosine as a pure function of the step, so that a resumed run
continues exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim import Optimizer

from ...core.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """`cosine` falls once from each group's learning rate to `min_lr`; `restarts` does so every
    `restart_epochs`; `constant` stays.

    The learning rate first rises linearly from `min_lr` for `warmup_epochs`.
    """

    kind: Literal["cosine", "restarts", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    restart_epochs: int = 4
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "restarts", "constant"):
            raise InputError(
                f"schedule {self.kind!r}: not known; choose cosine, restarts or constant"
            )
        if self.restart_epochs < 1 or self.warmup_epochs < 0 or self.min_lr < 0:
            raise InputError(
                "schedule: restart_epochs must be at least 1, warmup_epochs and min_lr at least 0"
            )


class LearningRate:
    """Sets the learning rate of every group of an optimizer; each group's own rate at hand-over is
    its peak.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, epochs: int, steps_per_epoch: int
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        warmup = round(min(schedule.warmup_epochs, epochs) * steps_per_epoch)
        cycle = schedule.restart_epochs if schedule.kind == "restarts" else epochs
        common: dict[str, Any] = {
            "warmup_t": warmup,
            "warmup_lr_init": schedule.min_lr,
            "t_in_epochs": False,
        }
        if schedule.kind == "restarts":
            length, limit, prefix = cycle * steps_per_epoch, 1_000_000, True
        else:
            length, limit, prefix = max(1, epochs * steps_per_epoch - warmup), 1, True
        # A constant rate is a cosine whose floor is its peak, which timm cannot say for several
        # groups; it is set by hand below.
        self.constant, self.optimizer, self.warmup, self.min_lr = (
            schedule.kind == "constant",
            optimizer,
            warmup,
            schedule.min_lr,
        )
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=length,
            lr_min=schedule.min_lr,
            cycle_limit=limit,
            warmup_prefix=prefix,
            **common,
        )

    def set(self, step: int) -> float:
        """Set the rates for the step counted from 0 over the whole training; returns the first
        group's.
        """
        if not self.constant:
            self.cosine.step_update(step)
        else:
            for group in self.optimizer.param_groups:
                peak = group["initial_lr"]
                group["lr"] = (
                    peak
                    if step >= self.warmup
                    else self.min_lr + (peak - self.min_lr) * step / self.warmup
                )
        return float(self.optimizer.param_groups[0]["lr"])
