"""From scores to a mask: units are ranked within a scope, and the best ones are kept.

Scopes: `layer` ranks the units of each group alone; `isomorphic` those of all groups of the same
structure (Fang et al. 2024, "Isomorphic Pruning for Vision Models"); `global` all units of the
network, by score per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture
from .groups import tied_units

Scope = Literal["global", "layer", "isomorphic"]
Scores = Mapping[str, Mapping[str, Tensor]]


@dataclass
class _Group:
    dimension: str
    site: str
    # (units, members): the indices of each unit.
    members: Tensor
    # (rows, units): one row, or one per head where heads keep different columns.
    scores: Tensor
    # (units,) parameters per unit.
    costs: Tensor
    keep: int = 0

    @property
    def ranked(self) -> Tensor:
        """(units,) scores in descending order, sorted for each head and averaged over heads."""
        return self.scores.sort(dim=1, descending=True).values.mean(dim=0)

    def mask(self) -> Tensor:
        """Booleans, True for the `keep` best units."""
        best = self.scores.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        result = torch.zeros(len(best), self.members.numel(), dtype=torch.bool)
        for row, units in zip(result, best, strict=True):
            row[self.members[units].flatten()] = True
        return result if len(result) > 1 else result[0]


def require_scope(scope: str) -> None:
    """Raise InputError if there is no such scope."""
    if scope not in get_args(Scope):
        raise InputError(f"scope = {scope!r}: choose 'global', 'layer' or 'isomorphic'")


def rank(
    architecture: Architecture,
    scores: Scores,
    costs: Scores,
    keep_ratio: Mapping[str, float],
    scope: Scope,
) -> dict[str, dict[str, Tensor]]:
    """Keep the best units until they make up `keep_ratio[dimension]` of the total cost.

    Args:
        architecture: The network.
        scores: `scores[dimension][site]`, (size,) or (heads, size); higher is kept first. Groups
            without scores are kept whole.
        costs: The cost of each unit, in the same shapes.
        keep_ratio: The share of the cost to keep for each dimension. Dimensions of different
            ratios are not ranked against each other.
        scope: "global", "layer" or "isomorphic".

    Returns:
        `kept[dimension][site]`, booleans in the shape of the scores. Every group keeps at least
        one unit, except `block`.

    Raises:
        InputError: There is no such scope.
    """
    require_scope(scope)
    groups = [
        _group(architecture, dimension, site, values, costs[dimension][site])
        for dimension, entries in scores.items()
        if dimension in keep_ratio
        for site, values in entries.items()
    ]
    pools: dict[object, list[_Group]] = {}
    for group in groups:
        pools.setdefault(_pool(group, scope, keep_ratio), []).append(group)
    for pool in pools.values():
        _set_counts(pool, keep_ratio[pool[0].dimension])
    kept: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        kept.setdefault(group.dimension, {})[group.site] = group.mask()
    return kept


def _group(
    architecture: Architecture, dimension: str, site: str, scores: Tensor, costs: Tensor
) -> _Group:
    members = (
        tied_units(architecture, dimension, site)
        if dimension != "block"
        else torch.zeros(1, 1, dtype=torch.long)
    )
    rows = scores.reshape(-1, scores.shape[-1])[:, members].sum(dim=-1)
    price = costs.reshape(-1, costs.shape[-1]).sum(dim=0)[members].sum(dim=-1)
    return _Group(
        dimension, site, members, torch.nan_to_num(rows.float()), price.float().clamp(min=1)
    )


def _pool(group: _Group, scope: Scope, keep_ratio: Mapping[str, float]) -> object:
    if scope == "layer":
        return group.dimension, group.site
    if scope == "isomorphic":
        # A site's name without its numbers identifies the structure: blocks.attn.in, blocks.ffn.
        structure = tuple(part for part in group.site.split(".") if not part.isdigit())
        return group.dimension, len(group.members), structure
    # Whole sub-layers own the units in them, so they are ranked among themselves.
    return "block" if group.dimension == "block" else keep_ratio[group.dimension]


def _set_counts(pool: list[_Group], ratio: float) -> None:
    """Keep the units with the highest score per cost until about `ratio` of all costs is spent."""
    if len(pool) == 1:
        pool[0].keep = max(1, round(ratio * len(pool[0].members)))
        return
    least = 0 if pool[0].dimension == "block" else 1
    prices = [float(group.costs.mean()) for group in pool]
    units = sorted(
        (-float(score) / prices[number], place, number)
        for number, group in enumerate(pool)
        for place, score in enumerate(group.ranked)
    )
    budget = ratio * sum(float(group.costs.sum()) for group in pool)
    for group in pool:
        group.keep = least
    spent = least * sum(prices)
    for _, place, number in units:
        if place < least:
            continue
        if spent + prices[number] / 2 > budget:
            break
        pool[number].keep = place + 1
        spent += prices[number]
