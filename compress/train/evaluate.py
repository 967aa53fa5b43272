"""Top-1 accuracy of a model on a split, without augmentation."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from ...core.console import progress_bar
from ..data.splits import Split

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
        model: The model; its mode is restored afterwards.
        split: The images.
        batch_size: The number of images in one forward pass.
        title: The text of the progress bar, which appears after two seconds.
        quiet: Show no progress bar.

    Returns:
        Logits, float32 (N, classes).
    """
    was_training = model.training
    model.eval()
    started, parts = time.perf_counter(), []
    try:
        with torch.inference_mode(), progress_bar(title, len(split), quiet=quiet) as advance:
            for start in range(0, len(split), batch_size):
                parts.append(model(split.floats(slice(start, start + batch_size))).float())
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
) -> float:
    """Compute the top-1 accuracy of a model on a split.

    Args:
        model: The model; its mode is restored afterwards.
        split: The images and labels.
        batch_size: The number of images in one forward pass.
        title: The text of the progress bar, which appears after two seconds.
        quiet: Show no progress bar.

    Returns:
        The accuracy in percent.
    """
    return top1(
        predict(model, split, batch_size=batch_size, title=title, quiet=quiet),
        torch.from_numpy(split.targets),
    )


def top1(logits: Tensor, targets: Tensor) -> float:
    """The percentage of rows with the largest logit at the target.

    `targets`: class numbers (N,), or soft targets (N, classes).
    """
    wanted = targets.argmax(1) if targets.ndim == 2 else targets
    return 100.0 * float((logits.argmax(1) == wanted).float().mean())
