"""A step of mask learning compared with dense steps: `python -m benchmarks.compression.mask_step`.

Four kinds of step take turns in one process: of a plain loop over timm's own module, dense, of mask
learning at its start, and of mask learning once the graph has shrunk. All but the first are those
of the training loop, with its checks and clipping. Figures are medians of processor time, and
ratios to the dense step of the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor, nn
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.processes import ALONE
from vitrim.compress.train.settings import TrainSettings
from vitrim.compress.train.steps import Stepper

from ..models import DEMO
from ..turns import in_turns

SHRINKING_STEPS = 60
SETTINGS = TrainSettings(epochs=1)


class Training:
    """A task with its optimizer and its number of steps."""

    def __init__(self, task: DenseTask | MaskTask) -> None:
        self.task, self.numbers = task, count()
        task.train_mode()
        self.stepper = Stepper(task, SETTINGS, ALONE)
        self.stepper.use(task.optimizer())

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One training step."""
        self.stepper.step(images, targets, next(self.numbers), "")


class PlainLoop:
    """The usual training step of timm's module: AdamW, clipping, and the loss as a number."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-3)

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One training step."""
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=0.1)
        loss.item()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def created(name: str) -> nn.Module:
    """The demo's model, or another one of timm's."""
    if name == "demo":
        return timm.create_model("vit_tiny_patch16_224", **DEMO)
    return timm.create_model(name)


def masking(name: str, budget: float, steps: int) -> MaskTask:
    """A mask task."""
    return MaskTask(lift(created(name)), MaskSettings(budget=Budget("params", budget)), steps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, or a timm name")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.precision)
    torch.manual_seed(0)
    dense = DenseTask(lift(created(options.model)))
    architecture: Any = dense.model
    channels, height, width = architecture.architecture.image
    images = torch.randn(options.batch, channels, height, width)
    targets = torch.randint(0, architecture.architecture.classes, (options.batch,))
    shrunk = masking(options.model, options.budget, SHRINKING_STEPS)
    training = Training(shrunk)
    for _ in range(SHRINKING_STEPS):
        training.step(images, targets)
    if (optimizer := shrunk._shrink()) is not None:
        training.stepper.use(optimizer)
    trainings: dict[str, Training | PlainLoop] = {
        "plain step of timm's module": PlainLoop(created(options.model)),
        "dense step": Training(dense),
        "mask-learning step, nothing dead yet": Training(
            masking(options.model, options.budget, 10**6)
        ),
        f"mask-learning step, shrunk to {options.budget:.0%}": training,
    }
    calls: dict[str, Callable[[], object]] = {
        name: partial(one.step, images, targets) for name, one in trainings.items()
    }
    turns = in_turns(calls, range(options.rounds), repeats=1)
    samples = {name: [turn.processor_s for turn in found] for name, found in turns.items()}
    dense_s = statistics.median(samples["dense step"])
    print(
        f"{options.model}, batch {options.batch}, one thread, matmul precision "
        f"{options.precision}, torch {torch.__version__}, {options.rounds} interleaved rounds"
    )
    for name, seconds in samples.items():
        middle_s, low, high = statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds)
        print(
            f"{name:42s} {options.batch / middle_s:7.1f} images/s   "
            f"{middle_s / dense_s:5.2f} x dense   ({low:.0f} .. {high:.0f} ms)"
        )


if __name__ == "__main__":
    main()
