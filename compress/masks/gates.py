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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..network.architecture import Architecture, Indices
from ..network.select_specs import is_hidden_site
from .groups import DIMENSIONS, SHARED, Sharing, groups, sites, tied_units
from .mask import StructuredMask
from .token_gates import close_upwards, nested_gates, token_places

# Scores start above the threshold, so that every unit is kept at first.
START, THRESHOLD = 1.0, 0.5
GATED = ("embed", "head", "qk", "v", "ffn")
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Units that share a mask: a dimension at a site, or at all sites (`*`).

    Attributes:
        dimension: The dimension of the units.
        site: Where they are, or `*`.
        size: The number of indices; for tokens, of patches, since prefix tokens always stay.
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
        fixed: Dimensions that are kept whole (`head`, `embed`, `ffn`, `qk`, `v`, `token`); default:
            none.
        tokens: Whether nested sets of patches have gates, too.

    Raises:
        InputError: An unknown dimension is fixed, or all of them are; or tokens are to be learned
            in a network that returns every token.
    """

    def __init__(
        self,
        architecture: Architecture,
        sharing: Sharing = "residual",
        fixed: Sequence[str] = (),
        tokens: bool = False,
    ) -> None:
        super().__init__()
        for name in fixed:
            if name not in (*GATED, "token"):
                raise InputError(
                    f"fixed = {name!r}: not a dimension; choose from {', '.join(GATED)}, token"
                )
        self.sharing, self.fixed = sharing, tuple(fixed)
        self.tokens = tokens and "token" not in fixed
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
            # Units of a predictor matter little before it has learned, so they would go first.
            if not is_hidden_site(site)
        ]
        self.token_places = token_places(architecture) if self.tokens else ()
        self._widths, self._prefix = len(self.groups), architecture.prefix
        self.groups += [
            Group("token", place.site, place.patches, 1, torch.arange(place.patches)[:, None])
            for place in self.token_places
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
        # A site without a group carries what the site before it does.
        self._token_numbers: dict[str, int | None] = {}
        number: int | None = None
        for site in self._sizes["token"]:
            number = self._place.get(("token", site), number)
            self._token_numbers[site] = number
        self._current: list[Tensor] = []
        # Whether every token stays for good, so that attention needs no mask.
        self.settled = False
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
        if number is None or (dimension == "token" and self.settled):
            return None
        gates = self._current[number]
        return torch.cat([gates.new_ones(self._prefix), gates]) if dimension == "token" else gates

    def live(self, dimension: str, site: str, indices: Indices | None = None) -> Any:
        """The number of kept units for the cost functions, as a differentiable sum."""
        if dimension == "token":
            number, size = self._token_numbers[site], self._sizes["token"][site]
            if indices is not None:
                # Learned tokens always stay.
                return len(indices)
            if number is None:
                return size
            return self._prefix + self._current[number][: size - self._prefix].sum()
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
            token = dimension == "token"
            number = self._token_numbers[site] if token else self._number(dimension, site)
            if number is None or (token and indices is not None):
                return self._sizes[dimension][site] if indices is None else len(indices)
            if token:
                patches = self._sizes["token"][site] - self._prefix
                return self._prefix + int(kept[number][:patches].sum())
            return totals[number] if indices is None else int(kept[number][list(indices)].sum())

        return live

    def remove_branch(self, branch: str) -> None:
        """Remove a sub-layer as a whole, for good: without gradients it cannot return."""
        self.removed |= {branch}

    def is_removed(self, number: int) -> bool:
        """Whether the sub-layer of a group, or the only readers of its tokens, are removed."""
        if number < self._widths:
            return self.groups[number].site in self.removed
        attentions = self.token_places[number - self._widths].attentions
        return bool(attentions) and attentions <= self.removed

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
            if group.dimension == "token":
                keep = torch.cat([torch.ones(self._prefix, dtype=torch.bool), keep])
            entries.setdefault(group.dimension, {})[group.site] = keep.clone()
        if self.removed:
            entries["block"] = {
                name: torch.zeros(1, dtype=torch.bool) for name in sorted(self.removed)
            }
        return StructuredMask(entries, scale="kept")

    def units(self, mask: StructuredMask) -> list[Tensor]:
        """The units of every group that a mask of `mask()` keeps, as `kept` returns them."""
        return [
            entry[self._prefix :] if group.dimension == "token" else entry
            for group in self.groups
            for entry in [mask.kept[group.dimension][group.site]]
        ]

    def nested(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """`kept` with what makes its token sets nested: earlier sites keep what later ones do."""
        return [*kept[: self._widths], *close_upwards(kept[self._widths :])]

    def split(self, values: Sequence[T]) -> tuple[list[T], list[T]]:
        """The values of the groups of widths, and those of the groups of tokens in their order."""
        return list(values[: self._widths]), list(values[self._widths :])

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
        widths, tokens = self.split(list(self.scores))
        return [
            *(
                group.spread(_straight(group.gather(scores)))
                for group, scores in zip(self.groups, widths, strict=False)
            ),
            *nested_gates(tokens, THRESHOLD),
        ]

    def _number(self, dimension: str, site: str) -> int | None:
        found = self._place.get((dimension, site))
        return self._place.get((dimension, SHARED)) if found is None else found
