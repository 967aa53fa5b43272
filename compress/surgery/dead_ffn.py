"""Hidden units of a feed-forward sub-layer that do nothing, or the same for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.architecture import FfnSpec
from ..network.modules.layers import ACTIVATIONS


@dataclass(frozen=True)
class DeadUnits:
    """`keep`: mask entries by dimension. `fold` (width_out,): what the removed units add to every
    token, to go into the output bias.

    `left`: units that are zero and stay, as (count, why).
    """

    keep: Mapping[str, Tensor]
    fold: Tensor
    left: tuple[tuple[int, str], ...] = ()


def dead_ffn(core: FfnSpec, tensors: Mapping[str, Tensor], gain: Tensor | None) -> DeadUnits:
    """Units of act(x W1 + b1) W2 + b2 whose W1 row is zero, which emit act(b1) whatever x is, or
    whose W2 column is zero, which nobody reads.

    A gated unit act(x Wg + bg) * (x W1 + b1) is constant if both rows are zero, and zero if one
    factor is. `tensors`: by leaf (`fc1.weight`); `gain` (width_out,): the layer scale behind W2, or
    None.
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
        why = "the norm inside the FFN takes its statistics over every unit"
        return DeadUnits(
            {}, out.new_zeros(out.shape[0]), ((int(dead.sum()), why),) if bool(dead.any()) else ()
        )
    fold = out.double()[:, dead] @ emitted.double()[dead]
    return DeadUnits({"ffn": ~dead} if bool(dead.any()) else {}, fold.to(out))


def _row(tensors: Mapping[str, Tensor], leaf: str, size: int) -> tuple[Tensor, Tensor]:
    """(size,) whether each row of a Linear is zero, and what it then gives: its bias."""
    weight = tensors[f"{leaf}.weight"]
    return (weight == 0).all(dim=1), tensors.get(f"{leaf}.bias", weight.new_zeros(size))
