"""The masked reference model: a network of full size that computes with a mask."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..lift import lift
from ..network.modules.model import CompactModel
from ..network.modules.select import Choices
from .mask import StructuredMask, require_mask
from .masked_network import MaskedNetwork


class MaskedModel(nn.Module):
    """A full-size network with a fixed mask, the reference that a compact model must equal."""

    def __init__(self, model: CompactModel, mask: StructuredMask) -> None:
        super().__init__()
        mask.check(model.architecture)
        self.masked = MaskedNetwork(model)
        self.mask = mask

    @property
    def network(self) -> CompactModel:
        """The full-size network that owns the parameters."""
        return self.masked.network

    def forward(self, images: Tensor, choices: Choices | None = None) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes).

        `choices` records which patches the selections choose, or prescribes them.
        """
        out: Tensor = self.masked(images, self._value, self.mask.scale, choices)
        return out

    def _value(self, dimension: str, site: str) -> Tensor | None:
        keep = self.mask.get(dimension, site)
        reference = next(self.parameters())
        return None if keep is None else keep.to(reference)


def masked(model: nn.Module, mask: StructuredMask, *, proof: bool = True) -> MaskedModel:
    """The dense model computing with a mask: the reference for `compact`.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`. It is copied, not changed.
        mask: What to keep. Missing entries keep everything.
        proof: Whether to run `model` beside what was read from it, as in `lift`.

    Returns:
        A module with parameters of full size, in the mode (training or evaluation) of `model`.
        Shapes: (batch, channels, height, width) -> (batch, classes).

    Raises:
        InputError: The mask does not fit the model; the message names the entry.
        UnsupportedModel: A module has no rule, or computes something else than its weights and
            type describe; the message names its path.
    """
    require_mask(mask)
    result = MaskedModel(copy.deepcopy(lift(model, proof=proof)), mask)
    result.train(model.training)
    return result
