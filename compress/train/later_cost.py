"""The cost of what is added to a network after its widths are learned, under the same budget.

Where selections follow, how much they save depends on the widths that are left, and predictors add
a part that no mask takes. So the cut network is counted with them at each update of the masks, and
when they freeze.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.budget import Budget, DualSolver
from ..network.architecture import Architecture
from ..surgery.plan import plan

# From kept units and a target to rounded units.
Round = Callable[[DualSolver, list[Tensor], int], list[Tensor]]
# How often masks are rounded again; each time for a smaller cost of the widths.
ROUNDS = 40
# The least share by which that cost falls.
_STEP = 0.997


@dataclass(frozen=True)
class LaterCost:
    """What follows the widths.

    Attributes:
        count: From a cut network to its cost with what is added to it, in the unit of the budget.
        pinned: Names of the sub-layers that it needs, which are not removed as a whole.
    """

    count: Callable[[Architecture], int]
    pinned: frozenset[str] = frozenset()

    def total(self, solver: DualSolver, kept: Sequence[Tensor]) -> int:
        """The cost of the network that keeps these units, with what is added to it."""
        source = solver.architecture
        found = plan(source, solver.gates.mask(kept)).architecture
        # As it is cut at the end.
        return self.count(found.model_copy(update={"last_queries": True}))

    def widths_target(self, solver: DualSolver, kept: Sequence[Tensor], target: int) -> int:
        """The cost of the widths alone at which the whole costs `target`, near these units."""
        return int(target * solver.cost(kept) / self.total(solver, kept))

    def require_feasible(self, solver: DualSolver, budget: Budget, dense: int) -> None:
        """Check that the smallest masks meet the budget.

        Args:
            solver: That of the network before any cut.
            budget: The budget.
            dense: The cost of that network.

        Raises:
            InputError: They do not; the message has the smallest budget that can be met.
        """
        least = []
        for group in solver.gates.groups:
            keep = torch.zeros(group.size, dtype=torch.bool)
            keep[group.members[0]] = True
            least.append(keep)
        smallest = self.total(solver, least)
        if smallest > budget.ratio * dense:
            raise InputError(
                f"budget {budget.kind} = {budget.ratio:.4g}: not feasible; with what selections "
                f"cost the smallest is {smallest / dense + 5e-5:.4f}"
            )

    def rounded(
        self, solver: DualSolver, kept: list[Tensor], limit: int, rounds: Round
    ) -> list[Tensor]:
        """Round kept units so that the whole costs at most `limit`.

        Args:
            solver: The saliencies and the cost of the widths.
            kept: The units kept now, one tensor for each group.
            limit: The cost not to exceed.
            rounds: Rounds units within a cost of the widths.

        Returns:
            Booleans, one tensor for each group.

        Raises:
            InputError: The limit cannot be met.
        """
        target = self.widths_target(solver, kept, limit)
        for _ in range(ROUNDS):
            found = rounds(solver, solver.solve(kept, target), target)
            total = self.total(solver, found)
            if total <= limit:
                return found
            target = int(target * min(_STEP, limit / total))
        raise InputError(
            f"budget: masks with what selections cost stay above it, {total} of {limit}; give a "
            "larger budget or fewer token_stages"
        )
