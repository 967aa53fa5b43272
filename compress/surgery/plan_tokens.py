"""The plan of a cut of tokens: the order of the tokens, and a number of leading tokens a step.

Nested sets are one number a token: the number of sub-layers after which the stream still carries
it. Tokens are sorted by it (stable, deepest first), so that every set is a number of leading
tokens: dropping is a slice, at any batch size, and costs nothing. Learned tokens come first among
equals; one that leaves before patches do stands between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.mask import StructuredMask
from ..masks.token_sets import token_sets
from ..network.architecture import Architecture, AttentionSpec, BranchSpec
from ..network.axes import LEARNED, PATCHES
from ..network.token_order import grid_places, patch_positions


@dataclass(frozen=True)
class BranchPlan:
    """One sub-layer that stays.

    Attributes:
        step: Its step in the source network.
        position: Its position in that step.
        spec: Its new specification.
        slices: The indices to keep on each axis of each parameter, by leaf name; None = all.
        constant: Only its bias stays, to be computed from the source parameters.
    """

    step: int
    position: int
    spec: BranchSpec
    slices: Mapping[str, tuple[Tensor | None, ...]]
    constant: bool = False


@dataclass(frozen=True)
class TokenPlan:
    """The tokens after a cut.

    Attributes:
        fields: The fields of `Architecture` that describe the order of the tokens.
        counts: Number of tokens that the stream carries after the stem, and after each step that
            stays, by its number in the source; none behind the first selection by content.
        indices: The rows that stay, in their new order, of the learned tokens and of the patches,
            by axis; none where all stay as before.
        rotated: The rows of a table of angles that stay; the number behind its last row for
            learned tokens that it does not have. None: all, as before.
    """

    fields: Mapping[str, Any]
    counts: Mapping[int, int]
    indices: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    rotated: Tensor | None = None

    def applied(self, plans: Sequence[tuple[BranchPlan, ...]]) -> list[tuple[BranchPlan, ...]]:
        """The plans of the branches with numbers of tokens, and tables in the new order."""
        found: list[tuple[BranchPlan, ...]] = []
        before = self.counts[-1]
        for row in plans:
            if row[0].step not in self.counts:
                # Behind a selection by content tokens do not leave by place; the tables follow.
                found.append(tuple(self._branch(item, item.spec.tokens) for item in row))
                continue
            after = self.counts[row[0].step]
            count = None if after == before else after
            found.append(tuple(self._branch(item, count) for item in row))
            before = after
        return found

    def _branch(self, item: BranchPlan, count: int | None) -> BranchPlan:
        spec = item.spec.model_copy(update={"tokens": count})
        if self.rotated is None or not isinstance(spec.core, AttentionSpec):
            return replace(item, spec=spec)
        core, slices = spec.core, dict(item.slices)
        prefix = self.fields["prefix"]
        if core.rope is not None:
            rope = core.rope.model_copy(update={"tokens": len(self.rotated), "prefix": prefix})
            core = core.model_copy(update={"rope": rope})
            table = slices["core.rope.table"]
            slices["core.rope.table"] = (*table[:2], self.rotated, *table[3:])
        if core.bias is not None:
            update = {name: self.fields[name] for name in ("prefix", "inner", "order")}
            core = core.model_copy(update={"bias": core.bias.model_copy(update=update)})
        return replace(item, spec=spec.model_copy(update={"core": core}), slices=slices)


def plan_tokens(
    architecture: Architecture, mask: StructuredMask, steps: Mapping[int, Sequence[BranchPlan]]
) -> TokenPlan:
    """Plan the tokens of a cut.

    Args:
        architecture: The network before the cut.
        mask: The mask.
        steps: The branches that stay, by the number of their step.

    Returns:
        The plan. A token that only sub-layers without attention would still compute is dropped
        where the last attention before them ends: nothing reads it.
    """
    sets = token_sets(architecture, mask.kept.get("token", {}))
    # A selection by content reads every token before it.
    for number in reversed(range(len(sets) - 1)):
        mixes = any(isinstance(item.spec.core, AttentionSpec) for item in steps.get(number, ()))
        if not mixes:
            sets[number] = sets[number + 1]
    patches = patch_positions(architecture)
    if not bool(sets[0][patches].any()):
        # Nothing reads a patch, but a convolution needs an output; the first step drops it.
        if not steps and not architecture.pooled_prefix:
            raise InputError(
                "mask token keeps no patch and no sub-layer is left to drop the one that the stem "
                "must embed; keep a patch, or a sub-layer"
            )
        sets[0] = sets[0].clone()
        sets[0][patches[0]] = True
    depth = torch.stack(sets).sum(dim=0)
    ranked = torch.argsort(depth, descending=True, stable=True)[: int((depth > 0).sum())]
    counts = {number: int(kept.sum()) for number, kept in enumerate(sets, start=-1)}
    if torch.equal(ranked, torch.arange(architecture.tokens)):
        names = ("order", "prefix", "inner", "learned", "source_prefix")
        return TokenPlan({name: getattr(architecture, name) for name in names}, counts)
    return _reordered(architecture, ranked.tolist(), counts)


def _reordered(
    architecture: Architecture, ranked: list[int], counts: Mapping[int, int]
) -> TokenPlan:
    """The plan for tokens in another order: their places in the stream before the cut."""
    # The number of each patch among the patches, and of each learned token among those.
    patches = {place: number for number, place in enumerate(patch_positions(architecture))}
    learned = [place for place in range(architecture.tokens) if place not in patches]
    own = {place: number for number, place in enumerate(learned)}
    is_learned = [place in own for place in ranked]
    prefix = is_learned.index(False)
    rows = {
        LEARNED: [own[place] for place in ranked if place in own],
        PATCHES: [patches[place] for place in ranked if place in patches],
    }
    before = architecture.prefix
    # A table has no row for the learned tokens that were in front.
    behind = architecture.tokens - before
    rotated = [place - before if place >= before else behind for place in ranked[prefix:]]
    old = grid_places(architecture)
    order = tuple(old[number] for number in rows[PATCHES])
    whole = order == tuple(range(math.prod(architecture.grid)))
    fields: dict[str, Any] = {
        "order": None if whole else order,
        "prefix": prefix,
        "inner": tuple(n for n, found in enumerate(is_learned) if found and n >= prefix) or None,
        "learned": architecture.learned,
        "source_prefix": architecture.source_prefix,
    }
    if rows[LEARNED] != list(range(len(learned))) or fields["inner"] != architecture.inner:
        places = architecture.learned or tuple(range(len(learned)))
        fields["learned"] = tuple(places[number] for number in rows[LEARNED])
        fields["source_prefix"] = architecture.source_tokens
    indices = {(axis.dimension, axis.site): torch.tensor(found) for axis, found in rows.items()}
    return TokenPlan(fields, counts, indices, torch.tensor(rotated))
