"""How much the loss feels each unit: gradients of the loss on gates that stand at one beside the
units.

A gate g multiplies what its unit gives, so that by the chain rule ∂loss/∂g at g = 1 is the sum of
weight times gradient over what the gate scales: the first-order Taylor estimate of what the loss
loses with the unit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.errors import InputError
from ..network.axes import POOL_SITES
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
    """|mean over the data of ∂loss/∂gate|: (size,) a group, of `dimensions`.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8 with
    gates (its square ranks the same). `data`: (images (batch, channels, height, width), class
    numbers (batch,)). Errors: InputError when there is none.
    """
    gates = _Gates(model, dimensions, sharing, scale)
    totals, images = [torch.zeros_like(gate) for gate in gates.ones], 0
    for batch, targets in data:
        for total, gradient in zip(totals, gates.gradients(batch, targets), strict=True):
            total += gradient * len(batch)
        images += len(batch)
    return gates.scores([(total / _some(images)).abs() for total in totals])


def sensitivity(
    model: CompactModel,
    data: Data,
    dimensions: Sequence[str],
    sharing: Sharing,
    *,
    scale: ScaleRule = "original",
) -> Scores:
    """Mean over the data of |∂loss/∂gate| of each single image, divided by the group's L2 norm:
    (size,) a group, of `dimensions`.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", eq. 2 and the
    normalisation below it, for heads.
    """
    gates = _Gates(model, dimensions, sharing, scale)
    totals, images = [torch.zeros_like(gate) for gate in gates.ones], 0
    for batch, targets in data:
        for image, target in zip(batch, targets, strict=True):
            for total, gradient in zip(
                totals, gates.gradients(image[None], target[None]), strict=True
            ):
                total += gradient.abs()
        images += len(batch)
    means = [total / _some(images) for total in totals]
    return gates.scores([mean / mean.norm().clamp(min=1e-20) for mean in means])


class _Gates:
    """A gate of one for every unit of every group, and the network that computes with them."""

    def __init__(
        self, model: CompactModel, dimensions: Sequence[str], sharing: Sharing, scale: ScaleRule
    ) -> None:
        self._scale = scale
        device = next(model.parameters()).device
        self._network = MaskedNetwork(copy.deepcopy(model).eval())
        self._network.requires_grad_(False)
        wanted = groups(model.architecture, sharing)
        self._places = [
            (dimension, site, size)
            for dimension in dimensions
            for site, size in wanted.get(dimension, {}).items()
        ]
        self.ones = [
            torch.ones(size, device=device, requires_grad=True) for _, _, size in self._places
        ]
        self._found = {
            (dimension, site): gate
            for (dimension, site, _), gate in zip(self._places, self.ones, strict=True)
        }

    def gradients(self, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """∂(mean cross-entropy)/∂gate for every group."""
        device = self.ones[0].device
        logits = self._network(images.to(device), self._value, self._scale)
        loss = F.cross_entropy(logits, targets.to(device))
        found = torch.autograd.grad(loss, self.ones, allow_unused=True)
        return tuple(
            torch.zeros_like(gate) if gradient is None else gradient
            for gate, gradient in zip(self.ones, found, strict=True)
        )

    def scores(self, values: Sequence[Tensor]) -> Scores:
        """Values in the order of the gates, under their names."""
        result: Scores = {}
        for (dimension, site, _), value in zip(self._places, values, strict=True):
            result.setdefault(dimension, {})[site] = value.detach().cpu()
        return result

    def _value(self, dimension: str, site: str) -> Tensor | None:
        own = self._found.get((dimension, site))
        return (
            own if own is not None or site in POOL_SITES else self._found.get((dimension, SHARED))
        )


def _some(images: int) -> int:
    if images == 0:
        raise InputError(
            "data: no image came; this saliency needs some batches of (images, class numbers)"
        )
    return images
