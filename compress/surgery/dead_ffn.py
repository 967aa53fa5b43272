"""Hidden units of a feed-forward sub-layer that are zero, or the same for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.architecture import FfnSpec
from ..network.modules.layers import ACTIVATIONS


@dataclass(frozen=True)
class DeadUnits:
    """The removable units of a sub-layer.

    Attributes:
        keep: Mask entries by dimension.
        fold: (width_out,), the sum of the removed units at every token, for the output bias.
        remaining: Units that are zero and stay, as (count, reason).
    """

    keep: Mapping[str, Tensor]
    fold: Tensor
    remaining: tuple[tuple[int, str], ...] = ()


def dead_ffn(core: FfnSpec, tensors: Mapping[str, Tensor], gain: Tensor | None) -> DeadUnits:
    """Find the removable units of act(x W1 + b1) W2 + b2.

    A unit with a zero W1 row emits act(b1) for every x; one with a zero W2 column is not read. A
    gated unit act(x Wg + bg) * (x W1 + b1) is constant if both rows are zero, and zero if one
    factor is zero.

    Args:
        core: The sub-layer.
        tensors: Its tensors by leaf (`fc1.weight`).
        gain: (width_out,), the layer scale behind W2, or None.
    """
    act = ACTIVATIONS[core.act]
    one, value = _row(tensors, "fc1", core.hidden)
    constant, emitted = one, act(value)
    if core.gated:
        gate, gate_value = _row(tensors, "gate", core.hidden)
        opened = act(gate_value)
        constant = (one & gate) | (one & (value == 0)) | (gate & (opened == 0))
        emitted = torch.where(one & gate, opened * value, torch.zeros_like(value))
    out = tensors["fc2.weight"]
    unread = ((out if gain is None else out * gain[:, None]) == 0).all(dim=0)
    dead = constant | unread
    if core.norm is not None:
        why = "the statistics of the norm inside the FFN run over every unit"
        remaining = ((int(dead.sum()), why),) if bool(dead.any()) else ()
        return DeadUnits({}, out.new_zeros(out.shape[0]), remaining)
    fold = out.double()[:, dead] @ emitted.double()[dead]
    return DeadUnits({"ffn": ~dead} if bool(dead.any()) else {}, fold.to(out))


def _row(tensors: Mapping[str, Tensor], leaf: str, size: int) -> tuple[Tensor, Tensor]:
    """Which rows of a Linear are zero, and what these emit, the bias; (size,) each."""
    weight = tensors[f"{leaf}.weight"]
    return (weight == 0).all(dim=1), tensors.get(f"{leaf}.bias", weight.new_zeros(size))
