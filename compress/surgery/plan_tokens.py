"""The plan of a cut of tokens: the order of the patches, and a number of leading tokens a step.

Nested sets are one number a patch: the number of sub-layers after which the stream still carries
it. Patches are sorted by it (stable, deepest first), so that every set is a number of leading
tokens: dropping is a slice, at any batch size, and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..masks.mask import StructuredMask
from ..masks.token_sets import token_sets
from ..network.architecture import Architecture, AttentionSpec, BranchSpec, Order


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
        order: `Architecture.order` after the cut.
        patches: The indices of the patches that stay, in their new order; None: all, as before.
        counts: Number of tokens that the stream carries after the stem, and after each step that
            stays, by its number in the source; none behind the first selection by content.
    """

    order: Order | None
    patches: Tensor | None
    counts: Mapping[int, int]

    def applied(self, plans: Sequence[tuple[BranchPlan, ...]]) -> list[tuple[BranchPlan, ...]]:
        """The plans of the branches with numbers of tokens, and tables in the new order."""
        found: list[tuple[BranchPlan, ...]] = []
        before = self.counts[-1]
        for row in plans:
            if row[0].step not in self.counts:
                # Behind a selection by content tokens do not leave by place.
                found.append(row)
                continue
            after = self.counts[row[0].step]
            count = None if after == before else after
            found.append(tuple(self._branch(item, count) for item in row))
            before = after
        return found

    def _branch(self, item: BranchPlan, count: int | None) -> BranchPlan:
        spec = item.spec.model_copy(update={"tokens": count})
        if self.patches is None or not isinstance(spec.core, AttentionSpec):
            return replace(item, spec=spec)
        core, slices = spec.core, dict(item.slices)
        if core.rope is not None:
            rope = core.rope.model_copy(update={"tokens": len(self.patches)})
            core = core.model_copy(update={"rope": rope})
            table = slices["core.rope.table"]
            slices["core.rope.table"] = (*table[:2], self.patches, *table[3:])
        if core.bias is not None:
            bias = core.bias.model_copy(update={"order": self.order})
            core = core.model_copy(update={"bias": bias})
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
    prefix, old = architecture.prefix, architecture.order or tuple(range(architecture.patches))
    if not bool(sets[0][prefix:].any()):
        # Nothing reads a patch, but a convolution needs an output; the first step drops it.
        sets[0] = sets[0].clone()
        sets[0][prefix] = True
    depth = torch.stack(sets).sum(dim=0)[prefix:]
    patches = torch.argsort(depth, descending=True, stable=True)[: int((depth > 0).sum())]
    counts = {number: int(kept.sum()) for number, kept in enumerate(sets, start=-1)}
    if torch.equal(patches, torch.arange(architecture.patches)):
        return TokenPlan(architecture.order, None, counts)
    order = tuple(old[place] for place in patches.tolist())
    whole = tuple(range(math.prod(architecture.grid)))
    return TokenPlan(None if order == whole else order, patches, counts)
