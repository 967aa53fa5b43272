"""Trainable masks: one score a unit, a hard threshold in the forward pass, the identity in the
backward pass (straight-through estimator).

Source: Sanh et al. 2020 (movement pruning), Lagunas et al. 2021 (structured), METHODS A.
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

# Scores start in the middle between "surely kept" and the threshold.
START, THRESHOLD = 1.0, 0.5
GATED = ("embed", "head", "qk", "v", "ffn")


@dataclass(frozen=True)
class Group:
    """Units that share a mask: a dimension at a site, or at all sites (`*`)."""

    dimension: str
    site: str
    size: int
    # How many places of the network this one mask serves.
    uses: int
    # (units, members): indices that go or stay as one, such as the two columns of a rope pair;
    # mostly one member each.
    members: Tensor

    @property
    def whole(self) -> int:
        """Indices that one unit holds."""
        return int(self.members.shape[1])

    def spread(self, units: Tensor) -> Tensor:
        """(units,) -> (size,): each unit's value at all its indices."""
        if self.whole == 1:
            return units
        return units.new_zeros(self.size).index_put(
            (self.members,), units[:, None].expand(self.members.shape)
        )


class _Straight(torch.autograd.Function):
    """1[scores >= threshold]; at least one unit is pinned to keep. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        keep = scores >= threshold
        if not bool(keep.any()):
            keep = torch.zeros_like(keep)
            keep[scores.argmax()] = True
        return keep.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight(scores: Tensor) -> Tensor:
    mask: Tensor = _Straight.apply(scores, THRESHOLD)
    return mask


def _uses(architecture: Architecture, dimension: str, site: str) -> int:
    return len(sites(architecture, dimension)) if site == SHARED else 1


class Gates(nn.Module):
    """Scores for every group of units that may go, and the masks they make at this step.

    `fixed`: dimensions kept whole (`head`, `embed`, `ffn`, `qk`, `v`).
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
                _uses(architecture, dimension, site),
                tied_units(architecture, dimension, site),
            )
            for dimension in GATED
            if dimension in wanted and dimension not in self.fixed
            for site, size in wanted[dimension].items()
        ]
        if not self.groups:
            raise InputError(
                "every dimension is fixed: nothing is left to remove; take one out of `fixed`"
            )
        self.scores = nn.ParameterList(
            nn.Parameter(torch.full((group.size,), START)) for group in self.groups
        )
        self._place = {
            (group.dimension, group.site): number for number, group in enumerate(self.groups)
        }
        self._sizes = {dimension: sites(architecture, dimension) for dimension in DIMENSIONS}
        self._now: list[Tensor] = []
        # Sub-layers that have gone as a whole, by the name of their branch.
        self.gone: frozenset[str] = frozenset()

    def begin(self) -> None:
        """Make the masks of this step; call it before each forward pass."""
        self._now = self._masks()

    def value(self, dimension: str, site: str) -> Tensor | None:
        """(size,) of 0 and 1 with a path for gradients, or None where nothing is gated: what
        `MaskedNetwork` asks for.
        """
        if dimension == "block":
            return self.scores[0].detach().new_zeros(1) if site in self.gone else None
        number = self._number(dimension, site)
        return None if number is None else self._now[number]

    def live(self, dimension: str, site: str, indices: Indices | None = None) -> Any:
        """How many units live, as a differentiable sum: what the cost functions ask for."""
        value = self.value(dimension, site)
        if value is None:
            return self._sizes[dimension][site] if indices is None else len(indices)
        return value.sum() if indices is None else value[list(indices)].sum()

    def counter(self, kept: Sequence[Tensor]) -> Any:
        """A `live` function of plain numbers for booleans `kept`, one tensor a group."""
        totals = [int(keep.sum()) for keep in kept]

        def live(dimension: str, site: str, indices: Indices | None = None) -> int:
            if dimension == "block" and site in self.gone:
                return 0
            number = self._number(dimension, site)
            if number is None:
                return self._sizes[dimension][site] if indices is None else len(indices)
            return totals[number] if indices is None else int(kept[number][list(indices)].sum())

        return live

    def drop(self, branch: str) -> None:
        """Take a sub-layer out as a whole. It does not come back: without a path for gradients
        nothing would tell when it should.
        """
        self.gone |= {branch}

    def kept(self) -> list[Tensor]:
        """Booleans of every group, as the scores stand."""
        with torch.no_grad():
            return [mask > 0.5 for mask in self._masks()]

    def mask(self, kept: Sequence[Tensor] | None = None) -> StructuredMask:
        """The masks as they stand (or `kept`), without gates."""
        entries: dict[str, dict[str, Tensor]] = {}
        for group, keep in zip(self.groups, self.kept() if kept is None else kept, strict=True):
            entries.setdefault(group.dimension, {})[group.site] = keep.clone()
        if self.gone:
            entries["block"] = {
                name: torch.zeros(1, dtype=torch.bool) for name in sorted(self.gone)
            }
        return StructuredMask(entries, scale="kept")

    def parameter_groups(self, lr: float) -> Iterator[dict[str, Any]]:
        """One optimizer group a mask: no weight decay; a shared mask's rate is scaled by 1 - (times
        shared / all masks) (METHODS A).
        """
        total = sum(group.uses for group in self.groups)
        for group, scores in zip(self.groups, self.scores, strict=True):
            factor = 1.0 - group.uses / total if group.uses > 1 else 1.0
            # With a single mask in all, the source's factor would stop it altogether.
            yield {"params": [scores], "lr": lr * factor if factor > 0 else lr, "weight_decay": 0.0}

    def _masks(self) -> list[Tensor]:
        return [
            group.spread(_straight(scores[group.members].mean(dim=1)))
            for group, scores in zip(self.groups, self.scores, strict=True)
        ]

    def _number(self, dimension: str, site: str) -> int | None:
        found = self._place.get((dimension, site))
        return self._place.get((dimension, SHARED)) if found is None else found
