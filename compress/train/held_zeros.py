"""Weights that stay zero while a network is trained, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..masks.weight_mask import WeightMask


class HeldZeros:
    """Keeps the weights that a mask does not keep at zero.

    Their gradients are zero, so that neither the norm by which gradients are clipped, nor moments,
    nor Muon's orthogonalised updates depend on them. An update of Muon is not zero where its
    momentum is, so the weights are also set to zero again after each step.

    Args:
        network: The network; its weights are set to zero now.
        mask: What is kept.

    Raises:
        InputError: The mask is of another network.
    """

    def __init__(self, network: nn.Module, mask: WeightMask) -> None:
        mask.check(network)
        self.mask, self._network = mask, network
        self._removed = _removed(mask)
        weights = dict(network.named_parameters())
        self._handles = [
            weights[name].register_hook(self._masked_gradient(name)) for name in self._removed
        ]
        self.apply(network)

    def replace(self, mask: WeightMask) -> None:
        """Use another mask of the same matrices from here on."""
        mask.check(self._network)
        device = next(self._network.parameters()).device
        self.mask, self._removed = mask, _removed(mask)
        self.place(device)
        self.apply(self._network)

    def place(self, device: torch.device) -> None:
        """Move the mask to a device."""
        self._removed = {name: removed.to(device) for name, removed in self._removed.items()}

    def apply(self, network: nn.Module) -> None:
        """Set the weights of the network, or of an average of its weights, to zero."""
        weights = dict(network.named_parameters())
        with torch.no_grad():
            for name, removed in self._removed.items():
                weights[name].masked_fill_(removed, 0.0)

    def release(self) -> None:
        """End it: gradients are whole again."""
        for handle in self._handles:
            handle.remove()

    def _masked_gradient(self, name: str) -> Callable[[Tensor], Tensor]:
        # Not a product: where fp16 overflowed, zero times infinity is no number.
        return lambda gradient: gradient.masked_fill(self._removed[name], 0.0)


def _removed(mask: WeightMask) -> dict[str, Tensor]:
    return {name: ~keep for name, keep in mask.kept.items()}
