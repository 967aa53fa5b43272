"""Top-1 accuracy of a model on a split, without augmentation."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from ...core.console import progress_bar
from ..data.splits import Split
from .processes import ALONE, Processes

BATCH = 256


def predict(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = BATCH,
    title: str = "evaluating",
    quiet: bool = True,
) -> Tensor:
    """Compute the logits of every image of a split, in evaluation mode.

    Args:
        model: The model, on any device; its mode is restored afterwards.
        split: The images.
        batch_size: The number of images in one forward pass.
        title: The text of the progress bar, which appears after two seconds.
        quiet: Show no progress bar.

    Returns:
        Logits, float32 (N, classes), on the CPU.
    """
    was_training, device = model.training, _device_of(model)
    model.eval()
    started, parts = time.perf_counter(), []
    try:
        with torch.inference_mode(), progress_bar(title, len(split), quiet=quiet) as advance:
            for start in range(0, len(split), batch_size):
                images = split.floats(slice(start, start + batch_size)).to(device)
                parts.append(model(images).float().cpu())
                if time.perf_counter() - started > 2.0:
                    advance(min(len(split), start + batch_size))
    finally:
        model.train(was_training)
    return torch.cat(parts)


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = BATCH,
    title: str = "evaluating",
    quiet: bool = True,
    processes: Processes = ALONE,
) -> float:
    """Compute the top-1 accuracy of a model on a split.

    Args:
        model: The model; its mode is restored afterwards.
        split: The images and labels.
        batch_size: The number of images in one forward pass.
        title: The text of the progress bar, which appears after two seconds.
        quiet: Show no progress bar.
        processes: They share the images, each of which is counted once; all of them get the result.

    Returns:
        The accuracy in percent.
    """
    if processes.count > 1:
        size = len(split)
        first, last = (size * (processes.rank + end) // processes.count for end in (0, 1))
        own, correct = split.select(np.arange(first, last, dtype=np.int64)), 0
        if last > first:
            logits = predict(model, own, batch_size=batch_size, title=title, quiet=quiet)
            correct = int((logits.argmax(1) == torch.from_numpy(own.targets)).sum())
        # Rounded as the mean of a single process is.
        return 100.0 * float(torch.tensor(processes.sum([correct])[0] / size, dtype=torch.float32))
    return top1(
        predict(model, split, batch_size=batch_size, title=title, quiet=quiet),
        torch.from_numpy(split.targets),
    )


def _device_of(model: nn.Module) -> torch.device:
    found = next(iter(model.parameters()), None)
    return torch.device("cpu") if found is None else found.device


def top1(logits: Tensor, targets: Tensor) -> float:
    """The percentage of rows with the largest logit at the target.

    `targets`: class numbers (N,), or soft targets (N, classes).
    """
    return 100.0 * float(top1_share(logits, targets))


def top1_share(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of rows as in `top1`, a scalar on the device of the logits."""
    wanted = targets.argmax(1) if targets.ndim == 2 else targets
    return (logits.argmax(1) == wanted).float().mean()
