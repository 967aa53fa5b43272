"""Optimizer steps: parts of a batch, precision, clipping, and several processes; sums over them."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.errors import InputError
from .evaluate import top1, top1_share
from .processes import Processes
from .settings import TrainSettings
from .task import Task

# On a GPU, the loss is read once in as many steps; several processes agree as often.
STEPS_BETWEEN_READS = 20


class _Loss(nn.Module):
    """The loss of a task as a module, which DistributedDataParallel can wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.trained = task, task.trained()

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.task.loss(images, targets)


class Stepper:
    """Takes the optimizer steps of a task.

    Args:
        task: The task, on its device.
        settings: The precision, the number of parts, and the largest gradient norm.
        processes: They average their gradients.
    """

    def __init__(self, task: Task, settings: TrainSettings, processes: Processes) -> None:
        self.task, self.settings, self.processes = task, settings, processes
        self.place = settings.placement
        self.scaler = self.place.scaler()

    def use(self, optimizer: Optimizer) -> None:
        """Use an optimizer, and the present module of the task, which may be a new one."""
        self.optimizer = optimizer
        self.module = self.processes.wrap(_Loss(self.task))

    def step(
        self, images: Tensor, targets: Tensor, number: int, where: str
    ) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            images: float32 (B, C, H, W), the share of this process.
            targets: Class numbers (B,), or soft targets (B, classes).
            number: The number of the step in the phase.
            where: Names epoch and learning rate in the message of an error.

        Returns:
            The loss and the logits (B, classes) of this process, on the device.

        Raises:
            InputError: The loss is not finite.
        """
        count = self.settings.accumulate
        losses, outputs = [], []
        parts = list(zip(images.chunk(count), targets.chunk(count), strict=True))
        for index, (part, labels) in enumerate(parts):
            with self._exchanging(last=index == len(parts) - 1):
                with self.place.autocast():
                    loss, logits = self.module(part, labels)
                if len(parts) > 1:
                    loss = loss * (len(part) / len(images))
                self._require_finite(loss, number, where)
                if index == 0:
                    self.optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            outputs.append(logits.detach())
        self._update()
        self.task.after_step(number)
        return torch.stack(losses).sum(), torch.cat(outputs)

    def _exchanging(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged with the last part of a batch only."""
        return contextlib.nullcontext() if last else self.processes.without_sum(self.module)

    def _require_finite(self, loss: Tensor, number: int, where: str) -> None:
        # Reading the value makes a CPU wait for its GPU.
        if not self.place.waits and number % STEPS_BETWEEN_READS:
            return
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"{self.task.phase}: the loss became {value} at step {number} {where}; "
                "lower the learning rate, lengthen the warmup, or lower lambda"
            )

    def _update(self) -> None:
        """Step the optimizer with the gradients, unscaled and clipped."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            inverse = 1.0 / self.scaler.get_scale()
            for parameter in self.task.observed():
                if parameter.grad is not None:
                    # Where fp16 overflowed, the optimizer skips the step as well.
                    parameter.grad.mul_(inverse).nan_to_num_(0.0, 0.0, 0.0)
        if self.settings.grad_clip is not None:
            groups = self.optimizer.param_groups
            parameters = [parameter for group in groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@dataclass
class EpochSums:
    """Sums over the steps of an epoch; those of losses and hits stay on the device.

    Attributes:
        steps: The number of steps.
        loss: The sum of their losses.
        top1: The sum of their training top-1, in percent.
        loader_s: The seconds spent on reading and augmenting images.
        seconds: The seconds before the last checkpoint within the epoch.
    """

    steps: int = 0
    loss: float | Tensor = 0.0
    top1: float | Tensor = 0.0
    loader_s: float = 0.0
    seconds: float = 0.0
    _means: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a step."""
        self.steps += 1
        if loss.device.type == "cpu":
            self.loss, self.top1 = self.loss + float(loss), self.top1 + top1(logits, targets)
            self._means = self.means()
            return
        self.loss, self.top1 = self.loss + loss, self.top1 + 100.0 * top1_share(logits, targets)
        if self.steps == 1 or self.steps % STEPS_BETWEEN_READS == 0:
            self._means = self.means()

    def means(self) -> dict[str, float]:
        """The means over the steps."""
        return {
            "loss": float(self.loss) / self.steps,
            "train_top1": float(self.top1) / self.steps,
        }

    def known_means(self) -> dict[str, float]:
        """The means when they were last read from the device."""
        return self._means

    def state(self) -> dict[str, Any]:
        """Plain numbers, the arguments of another `EpochSums`."""
        return {
            "steps": self.steps,
            "loss": float(self.loss),
            "top1": float(self.top1),
            "loader_s": self.loader_s,
            "seconds": self.seconds,
        }
