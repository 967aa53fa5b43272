"""Proof by trial: a lifted piece against the module that it was read from, on random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Relative; a wrong reading is off by far more, rounding by far less.
CLOSE = 1e-4


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode and without gradients, its training flags put back afterwards."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in flags:
            child.training = training


def difference(module: nn.Module, ours: Callable[[Tensor], Tensor], inputs: Tensor) -> float | str:
    """Largest difference of outputs over the largest wanted magnitude, or one line on why the two
    cannot be compared.
    """
    reference = next(module.parameters(), None)
    if reference is not None:
        inputs = inputs.to(reference)
    with evaluating(module):
        try:
            wanted = module(inputs)
        except Exception as error:  # a stranger's module may fail in any way
            return (
                f"it raises {type(error).__name__} on {tuple(inputs.shape)}: {error}".splitlines()[
                    0
                ]
            )
        if not isinstance(wanted, Tensor):
            return f"it answers with {type(wanted).__name__}, not with a tensor"
        found = ours(inputs)
    if wanted.ndim == found.ndim + 1:
        # A feature map, where ours are tokens.
        wanted = wanted.flatten(2).transpose(1, 2)
    if found.shape != wanted.shape:
        return (
            f"it answers with shape {tuple(wanted.shape)} where the rule gives {tuple(found.shape)}"
        )
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / max(scale, 1e-30)


def filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Our module, built on the meta device, holding these tensors (views of the source's)."""
    module.load_state_dict(
        {name: tensor.detach() for name, tensor in tensors.items()}, strict=True, assign=True
    )
    return module
