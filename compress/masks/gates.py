"""Trainable masks: one score per unit, thresholded by a straight-through estimator.

The forward pass uses the hard mask; the backward pass takes the threshold as the identity.

References:
    Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning".
    Lagunas et al. 2021, "Block Pruning For Faster Transformers".
    L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..network.architecture import Architecture, Indices
from .groups import DIMENSIONS, SHARED, Sharing, groups, sites, tied_units
from .mask import StructuredMask

# Scores start above the threshold, so that every unit is kept at first.
START, THRESHOLD = 1.0, 0.5
GATED = ("embed", "head", "qk", "v", "ffn")


@dataclass(frozen=True)
class Group:
    """Units that share a mask: a dimension at a site, or at all sites (`*`).

    Attributes:
        dimension: The dimension of the units.
        site: Where they are, or `*`.
        size: The number of indices.
        uses: The number of sites that this mask applies to.
        members: (units, members), the indices of each unit; most units have one, a rope pair two.
    """

    dimension: str
    site: str
    size: int
    uses: int
    members: Tensor

    @property
    def unit_size(self) -> int:
        """The number of indices in one unit."""
        return int(self.members.shape[1])

    def spread(self, units: Tensor) -> Tensor:
        """(units,) -> (size,): each unit's value at all its indices."""
        if self.unit_size == 1:
            return units
        members = self.members.to(units.device)
        return units.new_zeros(self.size).index_put(
            (members,), units[:, None].expand(members.shape)
        )

    def gather(self, values: Tensor) -> Tensor:
        """(size,) -> (units,): the mean value of each unit's indices."""
        if self.unit_size == 1:
            return values
        return values[self.members.to(values.device)].mean(dim=1)


class _Straight(torch.autograd.Function):
    """1[scores >= threshold], at least one of them 1. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        # The largest score is kept if any is. Without a branch, a GPU need not be waited for.
        keep = scores >= threshold
        return keep.index_fill(0, scores.argmax(), True).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight(scores: Tensor) -> Tensor:
    mask: Tensor = _Straight.apply(scores, THRESHOLD)
    return mask


class Gates(nn.Module):
    """Trainable scores for every group of units, and the masks computed from them.

    Args:
        architecture: The network.
        sharing: Which sites share a mask.
        fixed: Dimensions that are kept whole (`head`, `embed`, `ffn`, `qk`, `v`); default: none.

    Raises:
        InputError: An unknown dimension is fixed, or all of them are.
    """

    def __init__(
        self, architecture: Architecture, sharing: Sharing = "residual", fixed: Sequence[str] = ()
    ) -> None:
        super().__init__()
        for name in fixed:
            if name not in GATED:
                raise InputError(
                    f"fixed = {name!r}: not a dimension; choose from {', '.join(GATED)}"
                )
        self.sharing, self.fixed = sharing, tuple(fixed)
        wanted = groups(architecture, sharing)
        self.groups = [
            Group(
                dimension,
                site,
                size,
                len(sites(architecture, dimension)) if site == SHARED else 1,
                tied_units(architecture, dimension, site),
            )
            for dimension in GATED
            if dimension in wanted and dimension not in self.fixed
            for site, size in wanted[dimension].items()
        ]
        if not self.groups:
            raise InputError(
                "every dimension is fixed: nothing is left to remove; remove one from `fixed`"
            )
        self.scores = nn.ParameterList(
            nn.Parameter(torch.full((group.size,), START)) for group in self.groups
        )
        self._place = {
            (group.dimension, group.site): number for number, group in enumerate(self.groups)
        }
        self._sizes = {dimension: sites(architecture, dimension) for dimension in DIMENSIONS}
        self._current: list[Tensor] = []
        # Names of the sub-layers that were removed as a whole.
        self.removed: frozenset[str] = frozenset()

    def begin(self) -> None:
        """Compute the masks of this step; call it before each forward pass."""
        self._current = self._masks()

    def value(self, dimension: str, site: str) -> Tensor | None:
        """The gates at a site for `MaskedNetwork`: (size,) of 0 and 1 that pass gradients, or None.

        None: nothing is gated there.
        """
        if dimension == "block":
            return self.scores[0].detach().new_zeros(1) if site in self.removed else None
        number = self._number(dimension, site)
        return None if number is None else self._current[number]

    def live(self, dimension: str, site: str, indices: Indices | None = None) -> Any:
        """The number of kept units for the cost functions, as a differentiable sum."""
        value = self.value(dimension, site)
        if value is None:
            return self._sizes[dimension][site] if indices is None else len(indices)
        return value.sum() if indices is None else value[list(indices)].sum()

    def counter(self, kept: Sequence[Tensor]) -> Any:
        """A `live` function that returns integers, for booleans `kept`, one tensor per group."""
        totals = [int(keep.sum()) for keep in kept]

        def live(dimension: str, site: str, indices: Indices | None = None) -> int:
            if dimension == "block" and site in self.removed:
                return 0
            number = self._number(dimension, site)
            if number is None:
                return self._sizes[dimension][site] if indices is None else len(indices)
            return totals[number] if indices is None else int(kept[number][list(indices)].sum())

        return live

    def remove_branch(self, branch: str) -> None:
        """Remove a sub-layer as a whole, for good: without gradients it cannot return."""
        self.removed |= {branch}

    def kept(self) -> list[Tensor]:
        """Booleans of every group at the current scores, on the CPU."""
        with torch.no_grad():
            sizes = [group.size for group in self.groups]
            # One copy from the device for all groups.
            masks = (torch.cat(self._masks()) > 0.5).cpu()
            return [part.clone() for part in masks.split(sizes)]

    def mask(self, kept: Sequence[Tensor] | None = None) -> StructuredMask:
        """The current masks (or `kept`) as a `StructuredMask`."""
        entries: dict[str, dict[str, Tensor]] = {}
        for group, keep in zip(self.groups, self.kept() if kept is None else kept, strict=True):
            entries.setdefault(group.dimension, {})[group.site] = keep.clone()
        if self.removed:
            entries["block"] = {
                name: torch.zeros(1, dtype=torch.bool) for name in sorted(self.removed)
            }
        return StructuredMask(entries, scale="kept")

    def parameter_groups(self, lr: float) -> Iterator[dict[str, Any]]:
        """One optimizer group per mask, without weight decay, at the learning rate `lr`.

        The rate of a shared mask is scaled by 1 - (times shared / total masks).

        References:
            L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time".
        """
        total = sum(group.uses for group in self.groups)
        for group, scores in zip(self.groups, self.scores, strict=True):
            factor = 1.0 - group.uses / total if group.uses > 1 else 1.0
            # With a single mask in all, the factor of the paper would be 0.
            yield {"params": [scores], "lr": lr * factor if factor > 0 else lr, "weight_decay": 0.0}

    def _masks(self) -> list[Tensor]:
        return [
            group.spread(_straight(group.gather(scores)))
            for group, scores in zip(self.groups, self.scores, strict=True)
        ]

    def _number(self, dimension: str, site: str) -> int | None:
        found = self._place.get((dimension, site))
        return self._place.get((dimension, SHARED)) if found is None else found
