"""The reference: a network of full size that computes with a mask."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..lift import lift
from ..network.modules.model import CompactModel
from .mask import StructuredMask
from .masked_network import MaskedNetwork


class MaskedModel(nn.Module):
    """A network with a fixed mask: images (batch, channels, height, width) -> logits (batch,
    classes).
    """

    def __init__(self, model: CompactModel, mask: StructuredMask) -> None:
        super().__init__()
        mask.check(model.architecture)
        self.masked = MaskedNetwork(model)
        self.mask = mask

    @property
    def network(self) -> CompactModel:
        """The full-size network that owns the parameters."""
        return self.masked.network

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        out: Tensor = self.masked(images, self._value, self.mask.scale)
        return out

    def _value(self, dimension: str, site: str) -> Tensor | None:
        keep = self.mask.get(dimension, site)
        reference = next(self.parameters())
        return None if keep is None else keep.to(reference)


def masked(model: nn.Module, mask: StructuredMask) -> MaskedModel:
    """The reference for `compact`: same shapes as `model`, computing with the mask. `model` is
    copied, not changed.
    """
    result = MaskedModel(copy.deepcopy(lift(model)), mask)
    result.train(model.training)
    return result
