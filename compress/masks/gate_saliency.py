"""Saliency from gradients of the loss on gates, one gate of value 1 for each unit.

A gate g multiplies the output of its unit. At g = 1, ∂loss/∂g is the sum of weight times gradient
over what the gate scales: the first-order Taylor estimate of the change of the loss when the unit
is removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.errors import InputError
from ..network.axes import has_own_mask
from ..network.modules.model import CompactModel
from .groups import SHARED, ScaleRule, Sharing, groups
from .masked_network import MaskedNetwork

Scores = dict[str, dict[str, Tensor]]
Data = Iterable[tuple[Tensor, Tensor]]


def taylor(
    model: CompactModel,
    data: Data,
    dimensions: Sequence[str],
    sharing: Sharing,
    *,
    scale: ScaleRule = "original",
) -> Scores:
    """The magnitude of the mean gradient, |mean over the data of ∂loss/∂gate|.

    Args:
        model: The network to score; it is copied.
        data: Batches of (images, class numbers), (batch, channels, height, width) and (batch,).
        dimensions: Which dimensions get scores.
        sharing: Which sites share a gate.
        scale: The softmax scale, as in `StructuredMask`.

    Returns:
        `scores[dimension][site]`, (size,) each.

    Raises:
        InputError: `data` has no image.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8 with
        gates; its square ranks the same.
    """
    gates = _Gates(model, dimensions, sharing, scale)
    totals, images = [torch.zeros_like(gate) for gate in gates.ones], 0
    for batch, targets in data:
        for total, gradient in zip(totals, gates.gradients(batch, targets), strict=True):
            total += gradient * len(batch)
        images += len(batch)
    return gates.scores([(total / _at_least_one(images)).abs() for total in totals])


def sensitivity(
    model: CompactModel,
    data: Data,
    dimensions: Sequence[str],
    sharing: Sharing,
    *,
    scale: ScaleRule = "original",
) -> Scores:
    """The mean gradient magnitude over single images, divided by the L2 norm of its group.

    Args:
        model: The network to score; it is copied.
        data: Batches of (images, class numbers), (batch, channels, height, width) and (batch,).
        dimensions: Which dimensions get scores.
        sharing: Which sites share a gate.
        scale: The softmax scale, as in `StructuredMask`.

    Returns:
        `scores[dimension][site]`, (size,) each.

    Raises:
        InputError: `data` has no image.

    References:
        Michel et al. 2019, "Are Sixteen Heads Really Better than One?", eq. 2 and the
        normalisation below it, for heads.
    """
    gates = _Gates(model, dimensions, sharing, scale)
    means = _means_over_images(gates, data, Tensor.abs)
    return gates.scores([mean / mean.norm().clamp(min=1e-20) for mean in means])


def fisher(
    model: CompactModel,
    data: Data,
    dimensions: Sequence[str],
    sharing: Sharing,
    *,
    scale: ScaleRule = "original",
) -> Scores:
    """The mean squared gradient over single images, mean (∂loss/∂gate)².

    It is the diagonal of the empirical Fisher information of the gates. Unlike the mean gradient,
    terms of opposite sign do not cancel, neither over images nor over the columns of a head, so
    that units of different layers and dimensions can be compared.

    Args:
        model: The network to score; it is copied.
        data: Batches of (images, class numbers), (batch, channels, height, width) and (batch,).
        dimensions: Which dimensions get scores.
        sharing: Which sites share a gate.
        scale: The softmax scale, as in `StructuredMask`.

    Returns:
        `scores[dimension][site]`, (size,) each.

    Raises:
        InputError: `data` has no image.

    References:
        Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", eq. 5.
    """
    gates = _Gates(model, dimensions, sharing, scale)
    return gates.scores(_means_over_images(gates, data, Tensor.square))


def _means_over_images(gates: _Gates, data: Data, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The mean over single images of a function of each gate's gradient."""
    totals, images = [torch.zeros_like(gate) for gate in gates.ones], 0
    for batch, targets in data:
        for image, target in zip(batch, targets, strict=True):
            gradients = gates.gradients(image[None], target[None])
            for total, gradient in zip(totals, gradients, strict=True):
                total += of(gradient)
        images += len(batch)
    return [total / _at_least_one(images) for total in totals]


class _Gates:
    """A gate of 1 for each unit of each group, and the network that computes with them."""

    def __init__(
        self, model: CompactModel, dimensions: Sequence[str], sharing: Sharing, scale: ScaleRule
    ) -> None:
        self._scale = scale
        device = next(model.parameters()).device
        self._network = MaskedNetwork(copy.deepcopy(model).eval())
        self._network.requires_grad_(False)
        found = groups(model.architecture, sharing)
        sizes = {
            (dimension, site): size
            for dimension in dimensions
            for site, size in found.get(dimension, {}).items()
        }
        self._gates = {
            place: torch.ones(size, device=device, requires_grad=True)
            for place, size in sizes.items()
        }
        self.ones = list(self._gates.values())

    def gradients(self, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """∂(mean cross-entropy)/∂gate for each group."""
        device = self.ones[0].device
        _require_floats(images)
        logits = self._network(images.to(device), self._value, self._scale)
        loss = F.cross_entropy(logits, targets.to(device))
        found = torch.autograd.grad(loss, self.ones, allow_unused=True)
        return tuple(
            torch.zeros_like(gate) if gradient is None else gradient
            for gate, gradient in zip(self.ones, found, strict=True)
        )

    def scores(self, values: Sequence[Tensor]) -> Scores:
        """Values in the order of the gates, by dimension and site."""
        result: Scores = {}
        for (dimension, site), value in zip(self._gates, values, strict=True):
            result.setdefault(dimension, {})[site] = value.detach().cpu()
        return result

    def _value(self, dimension: str, site: str) -> Tensor | None:
        gate = self._gates.get((dimension, site))
        if gate is not None or has_own_mask(site):
            return gate
        return self._gates.get((dimension, SHARED))


def _require_floats(images: Tensor) -> None:
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise InputError(
            f"data: images of type {kind}, where float32 was expected, normalized as the model "
            "expects them: (pixels / 255 - mean) / std"
        )


def _at_least_one(images: int) -> int:
    if images == 0:
        raise InputError(
            "data: no images; this saliency needs some batches of (images, class numbers)"
        )
    return images
