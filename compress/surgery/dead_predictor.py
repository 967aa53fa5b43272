"""Hidden units of a predictor of tokens that are zero, or the same for every patch.

The scores themselves stay the same, not only their order: training and buckets read them. So a
pooled unit of a predictor with one layer behind it stays, although it cannot change the order: it
adds the same to all patches of an image, but another amount for each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.modules.layers import ACTIVATIONS
from ..network.select_specs import SelectSpec

# Why a unit that does nothing stays, as `StructuredMask.check` demands.
_WHY_ONE = "a predictor keeps one unit in each layer, a local one in the first"


@dataclass(frozen=True)
class DeadPredictorUnits:
    """The removable units of a predictor.

    Attributes:
        keep: Entries of an ffn mask by the site of a layer.
        folds: By the same sites, the parameter, a bias of the next layer, and the sum of the
            removed units at every patch, which it gets. Only where some are constant.
        remaining: Units that do nothing and stay, as (site, count, reason).
    """

    keep: Mapping[str, Tensor]
    folds: Mapping[str, tuple[str, Tensor]]
    remaining: tuple[tuple[str, int, str], ...] = ()


def dead_predictor(select: SelectSpec, tensors: Mapping[str, Tensor]) -> DeadPredictorUnits:
    """Find the removable units of the layers of a predictor, each y = W act(x) + b.

    A unit whose row in its layer is zero is act(b) for every patch, and so is its mean over the
    patches; one whose column in the next layer is zero is not read. A unit behind the first layer
    has one row in two matrices, for the local and the pooled units.

    Args:
        select: The selection that the predictor belongs to.
        tensors: The tensors of the selection by leaf (`predictor.fc.weight`).
    """
    spec = select.predictor
    assert spec is not None
    act = ACTIVATIONS[spec.act]
    layers = _layers(spec.pooled > 0, len(spec.hidden), tensors)
    keep: dict[str, Tensor] = {}
    folds: dict[str, tuple[str, Tensor]] = {}
    remaining: list[tuple[str, int, str]] = []
    for number, site in enumerate(select.hidden_sites):
        (own, bias), (following, next_bias) = layers[number], layers[number + 1]
        dead = (own == 0).all(dim=1) | (following == 0).all(dim=0)
        # A view, so that one of them stays.
        needed = dead if number else dead[: spec.local]
        if bool(needed.all()):
            needed[0] = False
            remaining.append((site, 1, _WHY_ONE))
        if not bool(dead.any()):
            continue
        keep[site] = ~dead
        fold = following.double()[:, dead] @ act(tensors[bias].double())[dead]
        if bool(fold.any()):
            folds[site] = (next_bias, fold.to(following))
    return DeadPredictorUnits(keep, folds, tuple(remaining))


def _layers(pooled: bool, hidden: int, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, str]]:
    """The matrix of each layer, and the name of its bias; local units stand before pooled ones."""
    second = tensors["predictor.local.weight"]
    if pooled:
        second = torch.cat([second, tensors["predictor.pooled.weight"]], dim=1)
    rest = [f"predictor.rest.{number}" for number in range(hidden)]
    return [
        (tensors["predictor.fc.weight"], "predictor.fc.bias"),
        (second, "predictor.local.bias"),
        *((tensors[f"{name}.weight"], f"{name}.bias") for name in rest),
    ]
