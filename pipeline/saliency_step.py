"""The cut of `masks.method = "l1"`, `"l2"` and `"random"`: units are ranked, nothing is trained."""

from __future__ import annotations

from typing import cast

from ..compress.masks.budget import Budget, require_feasible
from ..compress.masks.gates import Gates
from ..compress.masks.mask import StructuredMask, mask_and_scores
from ..compress.masks.saliency import Criterion, SaliencyOptions, Scores
from ..compress.network.architecture import Architecture
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost
from ..compress.surgery.rounding import macs_cost, params_cost, snap
from .masks_section import MasksSection

# The share of units is found to 1 / 2 ** HALVINGS, below a unit of any layer.
HALVINGS = 14


def section_budget(section: MasksSection) -> Budget:
    """The budget `params` or `macs` of `[masks]`."""
    if section.params is not None:
        return Budget("params", section.params)
    assert section.macs is not None
    return Budget("macs", section.macs)


def require_ranking(architecture: Architecture, section: MasksSection) -> None:
    """Check that the budget can be met.

    Raises:
        InputError: No mask meets it; the message has the smallest feasible one.
    """
    gates = Gates(architecture, section.sharing, section.fixed)
    require_feasible(architecture, gates, section_budget(section))


def ranked_mask(
    baseline: CompactModel, section: MasksSection, round_to: int, seed: int
) -> StructuredMask:
    """The mask that keeps the largest share of units, the same in every layer, within the budget.

    Args:
        baseline: The dense model.
        section: The criterion, the budget, and what is shared and fixed.
        round_to: Kept widths are multiples of this.
        seed: Of the criterion "random".

    Returns:
        The mask.

    Raises:
        InputError: Rounded widths exceed the budget.

    References:
        L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (baselines:
        per-channel pruning by L1 and L2 norm at 75, 50 and 25 %).
    """
    architecture, budget = baseline.architecture, section_budget(section)
    cost = {"params": params_cost, "macs": macs_cost}[budget.kind](architecture)
    limit = int(budget.ratio * network_cost(architecture, budget.kind))

    def ranked(share: float) -> tuple[StructuredMask, Scores]:
        options = SaliencyOptions(
            keep_ratio=share, sharing=section.sharing, fixed=section.fixed, seed=seed
        )
        return mask_and_scores(baseline, cast("Criterion", section.method), options)

    low, high = 0, 2**HALVINGS
    while high - low > 1:
        middle = (low + high) // 2
        if cost(ranked(middle / 2**HALVINGS)[0]) <= limit:
            low = middle
        else:
            high = middle
    whole, _ = ranked(1.0)
    share = 1.0 if cost(whole) <= limit else max(low, 1) / 2**HALVINGS
    mask, scores = ranked(share)
    if round_to == 1 or share == 1.0:
        return mask
    return snap(mask, architecture, round_to, saliency=scores, cost=cost, budget=limit)
