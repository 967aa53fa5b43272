"""Numeric check that a converted piece computes what the module it was read from computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Relative. A wrong reading differs by far more, rounding by far less.
TOLERANCE = 1e-4


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode without gradients, and restore its training flags afterwards."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in flags:
            child.training = training


def output_difference(
    module: nn.Module, ours: Callable[[Tensor], Tensor], inputs: Tensor
) -> float | str:
    """Return the largest difference of outputs, relative to the largest output of `module`.

    If the outputs cannot be compared, return one line with the reason.
    """
    reference = next(module.parameters(), None)
    if reference is not None:
        inputs = inputs.to(reference)
    with eval_mode(module):
        try:
            expected = module(inputs)
        except Exception as error:  # an unknown module may fail in any way
            text = f"it raises {type(error).__name__} on {tuple(inputs.shape)}: {error}"
            return text.splitlines()[0]
        if not isinstance(expected, Tensor):
            return f"it returns {type(expected).__name__}, not a tensor"
        found = ours(inputs)
    if expected.ndim == found.ndim + 1:
        # A feature map, where ours are tokens.
        expected = expected.flatten(2).transpose(1, 2)
    if found.shape != expected.shape:
        shapes = tuple(expected.shape), tuple(found.shape)
        return f"it returns shape {shapes[0]} where the rule gives {shapes[1]}"
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / max(scale, 1e-30)


def is_close(difference: float | str) -> bool:
    """Whether `output_difference` found equal outputs."""
    return not isinstance(difference, str) and difference <= TOLERANCE


def describe(difference: float | str) -> str:
    """Return a result of `output_difference` as text for an error message."""
    return difference if isinstance(difference, str) else f"outputs differ by {difference:.1e}"


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return `module`, built on the meta device, with these tensors (views of the source's)."""
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module
