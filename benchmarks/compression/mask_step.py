"""What a step of mask learning costs beside a dense step, and what it costs once the graph has
shrunk: `python -m benchmarks.compression.mask_step`.

The variants take turns in one process; figures are medians of processor time and ratios to the
dense step of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor
from torch.optim import Optimizer
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.mask_task import MaskSettings, MaskTask

MODEL = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}


def step_s(
    task: DenseTask | MaskTask, optimizer: Optimizer, images: Tensor, targets: Tensor, number: int
) -> float:
    """Processor seconds of one training step."""
    started = time.process_time()
    loss, _ = task.loss(images, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    task.after_step(number)
    return time.process_time() - started


def masking(budget: float, steps: int) -> MaskTask:
    """A mask task on the demo's model."""
    return MaskTask(
        lift(timm.create_model("vit_tiny_patch16_224", **MODEL)),
        MaskSettings(budget=Budget("params", budget)),
        steps,
    )


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
    shrunk = masking(options.budget, 60)
    optimizer = shrunk.optimizer()
    for number in range(60):
        step_s(shrunk, optimizer, images, targets, number)
    smaller = shrunk._shrink() or optimizer
    dense, mask = (
        DenseTask(lift(timm.create_model("vit_tiny_patch16_224", **MODEL))),
        masking(options.budget, 10**6),
    )
    rows: dict[str, tuple[DenseTask | MaskTask, Optimizer, list[float]]] = {
        "dense step": (dense, dense.optimizer(), []),
        "mask-learning step, nothing dead yet": (mask, mask.optimizer(), []),
        f"mask-learning step, shrunk to {options.budget:.0%}": (shrunk, smaller, []),
    }
    for number in range(options.rounds + 2):
        for task, optimizer, samples in rows.values():
            seconds = step_s(task, optimizer, images, targets, number)
            if number >= 2:
                samples.append(seconds)
    base = statistics.median(rows["dense step"][2])
    print(
        f"batch {options.batch}, one thread, matmul precision {options.precision}, torch {torch.__version__}, {options.rounds} interleaved rounds"
    )
    for name, (_, _, samples) in rows.items():
        middle, low, high = statistics.median(samples), min(samples), max(samples)
        print(
            f"{name:42s} {options.batch / middle:7.0f} images/s   {middle / base:5.2f} x dense   ({low * 1e3:.0f} .. {high * 1e3:.0f} ms)"
        )


if __name__ == "__main__":
    main()
