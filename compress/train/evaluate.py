"""Top-1 of a model on a split: no augmentation, no randomness, a progress bar only when it takes a
while.
"""

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
    """Logits of every image of the split, float32 (N, classes). The model's mode is put back
    afterwards.
    """
    was_training = model.training
    model.eval()
    started, parts = time.perf_counter(), []
    try:
        with torch.inference_mode(), progress_bar(title, len(split), quiet=quiet) as advance:
            for start in range(0, len(split), batch_size):
                parts.append(model(split.floats(slice(start, start + batch_size))).float())
                # Short evaluations stay silent.
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
    """Top-1 in percent."""
    return top1(
        predict(model, split, batch_size=batch_size, title=title, quiet=quiet),
        torch.from_numpy(split.targets),
    )


def top1(logits: Tensor, targets: Tensor) -> float:
    """Percent of rows whose largest logit is the target's; targets int64 (N,) or soft (N,
    classes).
    """
    wanted = targets.argmax(1) if targets.ndim == 2 else targets
    return 100.0 * float((logits.argmax(1) == wanted).float().mean())
