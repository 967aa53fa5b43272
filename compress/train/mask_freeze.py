"""When masks freeze: which rounding a budget needs, and whether it can be met, before training."""

from __future__ import annotations

import contextlib

from torch import Tensor

from ...core.errors import InputError
from ..latency.solution import Limits
from ..masks.budget import (
    Budget,
    CostOf,
    DualSolver,
    dense_cost,
    require_feasible,
    smallest_ratio,
)
from ..masks.gates import Gates
from ..network.architecture import Architecture
from ..network.live_latency import NS_PER_MS, LatencyCost
from .freezing import Rounding, least_latency_ms, require_rounding, round_to_latency, snapped
from .mask_settings import MaskSettings


def least_masked_ms(architecture: Architecture, settings: MaskSettings) -> float:
    """The smallest latency that masks can reach within the other budgets, in milliseconds.

    Args:
        architecture: The network whose masks are learned.
        settings: How; the budget is a latency.
    """
    gates = Gates(architecture, settings.sharing, settings.fixed, settings.tokens)
    # As mask learning counts it.
    counted = architecture.model_copy(update={"last_queries": True})
    return Freeze(settings).least_ms(counted, gates)


class Freeze:
    """Rounds the masks of a mask learning when they freeze.

    Args:
        settings: How masks are learned.
    """

    def __init__(self, settings: MaskSettings) -> None:
        self.settings = settings
        self.cost: CostOf = "params" if settings.budget is None else settings.budget.cost
        self.rounding: Rounding | None = None
        if isinstance(self.cost, LatencyCost):
            removable = tuple(kind for kind, each in self._overheads.items() if each)
            precision = settings.file_precision
            self.rounding = Rounding(self.cost.table, settings.round_to, removable, precision)

    @property
    def _overheads(self) -> dict[str, float]:
        settings = self.settings
        return {
            "attention": settings.attention_overhead_macs,
            "ffn": settings.ffn_overhead_macs,
        }

    def overhead(self, rate: float) -> dict[str, float]:
        """The cost of a sub-layer beside its units by kind.

        Args:
            rate: The cost of a multiply-add.
        """
        if self.rounding is not None:
            # A cost table has it; a kind without any is not removed.
            return dict.fromkeys(self.rounding.removable, 1.0)
        return {kind: macs * rate for kind, macs in self._overheads.items()}

    def require_feasible(
        self, architecture: Architecture, gates: Gates, budget: Budget, dense: int
    ) -> None:
        """Check that some mask meets the budget.

        Args:
            architecture: The network whose cost is counted.
            gates: Its gates.
            budget: The budget.
            dense: The cost of the network.

        Raises:
            InputError: None does; the message has the smallest budget that can be met.
        """
        if self.rounding is None or gates.sharing == "full":
            require_feasible(architecture, gates, budget)
            return
        if gates.sharing == "unshared":
            raise InputError(
                'masks: sharing = "unshared": a latency is that of one width of the residual '
                'stream; use sharing = "residual"'
            )
        if architecture.selects:
            self.rounding.table.require_selections()
        solver, kept = DualSolver(architecture, gates, self.cost), gates.kept()
        least_ms = least_latency_ms(solver, kept, self.rounding)
        latency_ms = budget.ratio * dense / NS_PER_MS
        if latency_ms < least_ms:
            raise InputError(
                f"budget latency_ms = {latency_ms:.4g}: the smallest latency that learned masks "
                f"can reach is {least_ms:.4g} ms ({self.rounding.table.title}); give a larger "
                "budget"
            )
        # They are met at the freeze, so that a run would end in the middle of its training.
        require_rounding(solver, kept, self.rounding, self._limits(latency_ms))

    def least_ms(self, architecture: Architecture, gates: Gates) -> float:
        """The smallest latency that masks can reach within the other budgets, in milliseconds.

        Args:
            architecture: The network whose cost is counted.
            gates: Its gates.
        """
        assert self.rounding is not None
        if gates.sharing == "full":
            share = smallest_ratio(architecture, gates, self.cost)
            return share * dense_cost(architecture, self.cost) / NS_PER_MS
        solver, limits = DualSolver(architecture, gates, self.cost), self._limits(1.0)
        return least_latency_ms(solver, gates.kept(), self.rounding, limits)

    def _limits(self, latency_ms: float) -> Limits:
        return Limits(latency_ms, self.settings.file_mb, self.settings.peak_memory_mb)

    def round(self, solver: DualSolver, kept: list[Tensor], target: int) -> list[Tensor]:
        """Round the kept units; of a network under a latency, sub-layers may leave for good.

        Args:
            solver: The saliencies, the cost and the gates.
            kept: The units kept now, one tensor for each group.
            target: The cost not to exceed; a latency in nanoseconds.

        Returns:
            Booleans, one tensor for each group.

        Raises:
            InputError: The budget cannot be met.
        """
        settings, rounding = self.settings, self.rounding
        if rounding is None or settings.sharing == "full":
            # Sub-layers that share their widths are not chosen one by one.
            return snapped(solver, kept, settings.round_to, target)
        greedy = None
        with contextlib.suppress(InputError):
            greedy = snapped(solver, kept, settings.round_to, target)
        limits = self._limits(target / NS_PER_MS)
        found = round_to_latency(solver, kept, limits, rounding, greedy)
        for name in found.removed:
            solver.gates.remove_branch(name)
        return found.kept
