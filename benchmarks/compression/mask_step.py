"""A step of mask learning compared with a dense step: `python -m benchmarks.compression.mask_step`.

Three kinds of step take turns in one process: dense, of mask learning at its start, and of mask
learning once the graph has shrunk. Figures are medians of processor time, and ratios to the dense
step of the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import count

import timm
import torch
from torch import Tensor
from torch.optim import Optimizer
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask

from ..models import DEMO
from ..turns import in_turns

SHRINKING_STEPS = 60


class Training:
    """A task with its optimizer and its number of steps."""

    def __init__(self, task: DenseTask | MaskTask) -> None:
        self.task, self.numbers = task, count()
        self.optimizer: Optimizer = task.optimizer()

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One training step."""
        loss, _ = self.task.loss(images, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.task.after_step(next(self.numbers))


def masking(budget: float, steps: int) -> MaskTask:
    """A mask task on the demo's model."""
    model = lift(timm.create_model("vit_tiny_patch16_224", **DEMO))
    return MaskTask(model, MaskSettings(budget=Budget("params", budget)), steps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.precision)
    torch.manual_seed(0)
    images, targets = torch.randn(options.batch, 1, 28, 28), torch.randint(0, 10, (options.batch,))
    shrunk = masking(options.budget, SHRINKING_STEPS)
    training = Training(shrunk)
    for _ in range(SHRINKING_STEPS):
        training.step(images, targets)
    training.optimizer = shrunk._shrink() or training.optimizer
    dense = DenseTask(lift(timm.create_model("vit_tiny_patch16_224", **DEMO)))
    trainings = {
        "dense step": Training(dense),
        "mask-learning step, nothing dead yet": Training(masking(options.budget, 10**6)),
        f"mask-learning step, shrunk to {options.budget:.0%}": training,
    }
    calls: dict[str, Callable[[], object]] = {
        name: partial(one.step, images, targets) for name, one in trainings.items()
    }
    turns = in_turns(calls, range(options.rounds), repeats=1)
    samples = {name: [turn.processor_s for turn in found] for name, found in turns.items()}
    dense_s = statistics.median(samples["dense step"])
    print(
        f"batch {options.batch}, one thread, matmul precision {options.precision}, "
        f"torch {torch.__version__}, {options.rounds} interleaved rounds"
    )
    for name, seconds in samples.items():
        middle_s, low, high = statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds)
        print(
            f"{name:42s} {options.batch / middle_s:7.0f} images/s   "
            f"{middle_s / dense_s:5.2f} x dense   ({low:.0f} .. {high:.0f} ms)"
        )


if __name__ == "__main__":
    main()
