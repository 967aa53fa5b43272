"""How much an error of the residual stream changes the features, without labels.

The weight of depth l is s_l = E ||∂(vᵀz)/∂x_l||² / d, summed over tokens, where z are the features
in units of their standard deviation and v ~ N(0, I/d): an unbiased Gauss-Newton estimate. An error
of mean square e per token and channel sum at depth l then changes the features by about s_l e, as
a share of their variance (isotropic approximation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from .stream import recorded_inputs

# Images for the weights of a whole cut.
WEIGHING_IMAGES = 48
# Largest number of images in one backward pass, and of stream numbers at all depths, which bounds
# the memory for activations.
BATCH, STREAM_NUMBERS = 8, 2**23


def features(model: CompactModel, x: Tensor) -> Tensor:
    """Return the pooled features: (batch, tokens, embed) -> (batch, features).

    The input of the classifier, or the output of a network without one. Two classifiers
    (distilled networks) read two vectors, which are concatenated.
    """
    readers = [model.pre_head] if model.pre_head is not None else [model.head, model.head_dist]
    if model.head is None:
        return model.classify(x)
    found: list[Tensor] = []
    for reader in readers:
        if reader is not None:
            with recorded_inputs(reader) as inputs:
                model.classify(x)
            found.append(inputs[0].flatten(1) if inputs[0].ndim == 2 else inputs[0].mean(dim=1))
    return torch.cat(found, dim=-1)


def patch_features(model: CompactModel, x: Tensor) -> Tensor:
    """Return the normalized patch tokens: (batch, tokens, embed) -> (batch, patches, channels)."""
    return model.normed(x)[:, model.architecture.prefix :]


# Tensors made in inference mode record no gradients.
@torch.inference_mode(False)
def stream_weights(
    model: CompactModel,
    images: Tensor,
    *,
    patches: float = 0.0,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> list[float]:
    """Return s_l for the stream after each step, and before the first: len(steps) + 1 numbers.

    Args:
        model: The dense network.
        images: Unlabeled images, (images, channels, height, width); 48 are enough.
        patches: Share of the patch tokens in the features, from 0 (pooled features only, as a
            classifier needs) to 1 (patch tokens only, as a detector needs).
        seed: Seed of the random projections v.
        progress: Called after every batch.

    Returns:
        The weights, in the order of depth; the first one belongs to the stem's output.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.eval()
    scales = _scales(model, images)
    totals = torch.zeros(len(model.steps) + 1, dtype=torch.float64)
    for part in images.split(weighing_batch(model)):
        # Callers may have switched gradients off.
        with torch.enable_grad():
            locations, loss = _projection(model, part, scales, patches, generator)
            gradients = torch.autograd.grad(loss, locations)
        for number, gradient in enumerate(gradients):
            totals[number] += gradient.double().square().sum() / gradient.shape[-1]
        if progress is not None:
            progress()
    return [float(total) / len(images) for total in totals]


def weighing_batch(model: CompactModel) -> int:
    """Images in one backward pass of `stream_weights`."""
    architecture = model.architecture
    numbers = architecture.tokens * architecture.embed * (len(architecture.steps) + 1)
    return max(1, min(BATCH, STREAM_NUMBERS // numbers))


def _projection(
    model: CompactModel,
    images: Tensor,
    scales: tuple[Tensor, Tensor],
    patches: float,
    generator: torch.Generator,
) -> tuple[list[Tensor], Tensor]:
    """The streams of all depths, and the random projection vᵀz summed over a batch."""
    locations, x = _forward(model, images)
    loss = torch.zeros(())
    for share, scale, values in zip(
        (1.0 - patches, patches),
        scales,
        (features(model, x), patch_features(model, x)),
        strict=True,
    ):
        if share == 0.0 or values.numel() == 0:
            continue
        direction = torch.randn(values.shape, generator=generator)
        # Patches are independent draws, so their mean square has to be that of one vector.
        count = values.shape[1:].numel()
        loss = loss + share**0.5 * (direction * values / scale).sum() / count**0.5
    return locations, loss


def _forward(model: CompactModel, images: Tensor) -> tuple[list[Tensor], Tensor]:
    with torch.no_grad():
        x = model.embed(images)
    x = x.detach().requires_grad_(True)
    locations = [x]
    counts = model.architecture.step_tokens(last_queries=False)
    for step, count in zip(cast("Iterable[Sequence[Branch]]", model.steps), counts, strict=True):
        queries = count if count < x.shape[1] else None
        updates = [branch(x, queries) for branch in step]
        x = x[:, :queries]
        for branch, y in zip(step, updates, strict=True):
            x = branch.add(x, y)
        locations.append(x)
    return locations, x


def _scales(model: CompactModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of the pooled features and of the patch tokens, per channel."""
    pooled, patches = [], []
    with torch.no_grad():
        for part in images.split(BATCH):
            x = _forward(model, part)[1]
            pooled.append(features(model, x))
            patches.append(patch_features(model, x).flatten(0, 1))
    return _deviation(torch.cat(pooled)), _deviation(torch.cat(patches))


def _deviation(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.ones(values.shape[-1])
    deviation = values.std(dim=0)
    return deviation.clamp(min=1e-3 * float(deviation.mean()) + 1e-12)
