"""Which units to keep within a budget: the highest saliency per cost, at a price that meets it.

Minimise loss(mask) subject to cost(mask) <= budget. With the saliency s_u of unit u (the growth of
the loss without it) and its marginal cost c_u, the Lagrangian keeps u if s_u >= lambda c_u. The
dual problem has one variable and is solved by bisection at every update, on live costs. Unlike
gradient ascent on lambda it needs no tuning, and it meets the budget to the unit during the ramp.

Under a latency, units are priced by the milliseconds of a whole tile of columns at the current
widths, since a kernel computes all columns of a tile.

The saliency is the moving average of (dLoss/dgate)², the empirical Fisher information of a gate.
The first-order term is not used: in a trained network it is noise around zero. Tokens are chosen by
the same price, in nested sets (`token_gates.py`).

References:
    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8.
    Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ..network.architecture import Architecture
from ..network.cost import CostKind, Live, live_cost
from ..network.live_latency import LatencyCost
from ..network.select_specs import scoring_branches
from .gates import Gates
from .groups import SHARED, sites
from .token_gates import exit_gradients, nested_values

# A budget counts as met when at most this share of it is left over.
SLACK = 0.01
# The dimensions whose units write the output of a sub-layer.
WRITING = ("v", "ffn")
# The dimension whose units multiply the columns of a unit in one product of an attention.
_MULTIPLIED = {"qk": "head", "v": "head", "head": "qk"}
# What a budget is of: a kind, or the latency by a cost table.
CostOf = CostKind | LatencyCost


@dataclass(frozen=True)
class Budget:
    """At most a share of the dense network's cost.

    Attributes:
        kind: "params", "macs", or "latency" by a cost table.
        ratio: The share, above 0, at most 1.
        table: The cost table of a latency.
    """

    kind: Literal["params", "macs", "latency"]
    ratio: float
    table: CostTable | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("params", "macs", "latency"):
            raise InputError(f"budget kind {self.kind!r}: choose 'params', 'macs' or 'latency'")
        if (self.kind == "latency") != (self.table is not None):
            raise InputError(
                f"budget {self.kind}: a latency and a cost table need each other; measure one "
                "with `vitrim bench --cost-table FILE`"
            )
        if not 0 < self.ratio <= 1:
            raise InputError(
                f"budget {self.kind} = {self.ratio}: give the share to keep, above 0 and at most 1"
            )

    @property
    def cost(self) -> CostOf:
        """What the budget is of."""
        if self.kind == "latency":
            assert self.table is not None
            return LatencyCost(self.table)
        return self.kind

    @property
    def counted(self) -> CostKind:
        """The kind, of a budget that is counted and no latency."""
        assert self.kind != "latency"
        return self.kind


def cost_function(cost: CostOf) -> Callable[[Architecture, Live], int]:
    """The function from a network and its live units to parameters, MACs or nanoseconds."""
    return partial(live_cost, kind=cost) if isinstance(cost, str) else cost


def dense_cost(architecture: Architecture, cost: CostOf) -> int:
    """The cost of the network with everything kept."""

    def live(dimension: str, site: str, indices: Any = None) -> int:
        return sites(architecture, dimension)[site] if indices is None else len(indices)

    return int(cost_function(cost)(architecture, live))


def smallest_ratio(architecture: Architecture, gates: Gates, cost: CostOf) -> float:
    """The share of the cost that remains when every mask keeps its one pinned unit."""
    least = []
    for group in gates.groups:
        keep = torch.zeros(group.size, dtype=torch.bool)
        keep[group.members[0]] = True
        least.append(keep)
    count = cost_function(cost)
    return count(architecture, gates.counter(least)) / dense_cost(architecture, cost)


def require_feasible(architecture: Architecture, gates: Gates, budget: Budget) -> None:
    """Validate that some mask meets a budget.

    Raises:
        InputError: No mask does; the message has the smallest feasible budget.
    """
    least = smallest_ratio(architecture, gates, budget.cost)
    if budget.ratio < least:
        kept = f" with {', '.join(gates.fixed)} fixed" if gates.fixed else ""
        raise InputError(
            f"budget {budget.kind} = {budget.ratio}: not feasible; "
            f"with sharing = '{gates.sharing}'{kept} the smallest is {_round_up(least):.4f} "
            "(one unit of each mask is always kept)"
        )


class DualSolver:
    """Chooses the units to keep for a target cost, by saliencies averaged over steps.

    Lists of tensors have one tensor (size,) for each group of `gates`, in their order.

    Args:
        architecture: The network.
        gates: Its groups of units.
        cost: "params", "macs", or a latency by a cost table.
        decay: The decay of the moving averages for each step.
    """

    def __init__(
        self, architecture: Architecture, gates: Gates, cost: CostOf, decay: float = 0.98
    ) -> None:
        self.architecture, self.gates, self.decay = architecture, gates, decay
        self._count = cost_function(cost)
        self._tile = 1 if isinstance(cost, str) else cost.tile
        self.saliency = [torch.zeros(group.size, dtype=torch.float64) for group in gates.groups]
        # The saliency of each sub-layer as a whole, by the name of its branch.
        self.branch_saliency = {branch.name: 0.0 for branch in architecture.branches}
        self.price = 0.0
        # Sub-layers that are not removed as a whole, besides those whose attention scores patches.
        self.pinned: frozenset[str] = frozenset()

    @property
    def memory_steps(self) -> int:
        """The number of steps that the averages extend over."""
        return round(1.0 / (1.0 - self.decay))

    def observe(
        self, gradients: Sequence[Tensor | None], kept: Sequence[Tensor] | None = None
    ) -> None:
        """Update the averages.

        Args:
            gradients: The gradients of the gates in one step; None leaves a group unchanged.
            kept: The units that were kept in this step (default: all).
        """
        found = self._with_exits(_on_cpu(gradients))
        for number, (average, gradient, group) in enumerate(
            zip(self.saliency, found, self.gates.groups, strict=True)
        ):
            if gradient is None:
                continue
            # The gradient of a unit is divided evenly among the scores of its members.
            whole = gradient.double() * group.unit_size
            average.mul_(self.decay).add_(whole.square(), alpha=1.0 - self.decay)
            if group.dimension in WRITING and group.site in self.branch_saliency:
                # The gradient of a gate on the whole output is the sum over its units.
                live = whole if kept is None else whole[kept[number]]
                total = float(live.sum()) / group.unit_size
                self.branch_saliency[group.site] = (
                    self.decay * self.branch_saliency[group.site] + (1.0 - self.decay) * total**2
                )

    def _with_exits(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients, with those of leaving the stream for the tokens."""
        widths, tokens = self.gates.split(gradients)
        if all(gradient is None for gradient in tokens):
            return [*widths, *tokens]
        _, groups = self.gates.split(self.gates.groups)
        whole = [
            torch.zeros(group.size) if gradient is None else gradient
            for gradient, group in zip(tokens, groups, strict=True)
        ]
        return [*widths, *exit_gradients(whole)]

    def values(self, costs: Sequence[float]) -> list[Tensor]:
        """The saliency per cost of every unit; 0 where a sub-layer is removed.

        Args:
            costs: The cost of one unit of each group.

        Returns:
            One tensor per group. Those of tokens fall along the depth, so that a price selects
            nested sets.
        """
        widths, tokens = self.gates.split(self.saliency)
        own, shared = self.gates.split(costs)
        found = [
            torch.zeros_like(saliency) if self.gates.is_removed(number) else saliency / cost
            for number, (saliency, cost) in enumerate(zip(widths, own, strict=True))
        ]
        return [*found, *nested_values(tokens, shared)]

    def cost(self, kept: Sequence[Tensor]) -> int:
        """The exact cost of keeping `kept`."""
        return int(self._count(self.architecture, self.gates.counter(kept)))

    def solve(self, kept: Sequence[Tensor], target: int) -> list[Tensor]:
        """The units to keep for a cost of at most `target`, as near to it as whole units allow.

        Args:
            kept: The units kept now, at which the marginal costs are taken.
            target: The cost not to exceed.

        Returns:
            Booleans, one tensor per group.
        """
        values = self.values(self.marginal_costs(kept))
        everything = torch.cat(values)
        positive = everything[everything > 0]
        if not len(positive):
            return list(kept)
        low, high = float(positive.min()) / 2, float(everything.max()) * 2
        for _ in range(60):
            middle = (low * high) ** 0.5
            if self.cost(self._keep(values, middle)) > target:
                low = middle
            else:
                high = middle
        self.price = high
        return self.fill(self._keep(values, high), values, target)

    def fill(self, kept: list[Tensor], values: Sequence[Tensor], target: int) -> list[Tensor]:
        """Spend the rest of the budget: best units first, group by group from the cheapest."""
        spent, costs = self.cost(kept), self.marginal_costs(kept)
        for number in sorted(range(len(kept)), key=lambda index: costs[index]):
            if self.gates.is_removed(number):
                continue
            count = int((target - spent) // costs[number])
            if count < 1:
                break
            candidates = self._candidates(kept, number)
            best = candidates[values[number][candidates[:, 0]].argsort(descending=True)[:count]]
            trial = kept[number].clone()
            trial[best.flatten()] = True
            changed = self.gates.nested([*kept[:number], trial, *kept[number + 1 :]])
            if self.cost(changed) <= target:
                kept, spent = changed, self.cost(changed)
        return kept if target - spent <= SLACK * target else self._exchange(kept, values, target)

    def _exchange(self, kept: list[Tensor], values: Sequence[Tensor], target: int) -> list[Tensor]:
        """Add one unit of an expensive group in exchange for units of the cheapest group."""
        costs = self.marginal_costs(kept)
        numbers = range(len(self.gates.groups))
        alive = [number for number in numbers if not self.gates.is_removed(number)]
        widths = [number for number in alive if self.gates.groups[number].dimension != "token"]
        if not widths:
            return kept
        cheap = min(widths, key=lambda index: costs[index])
        best, spent = kept, self.cost(kept)
        for number in alive:
            candidates = self._candidates(kept, number)
            if number == cheap or not len(candidates):
                continue
            trial = [keep.clone() for keep in kept]
            trial[number][candidates[values[number][candidates[:, 0]].argmax()]] = True
            trial = self.gates.nested(trial)
            excess = self.cost(trial) - target
            own = self.gates.groups[cheap].members
            live = own[trial[cheap][own[:, 0]]]
            count = -int(-excess // self.marginal_costs(trial)[cheap])
            if 0 < count < len(live):
                trial[cheap][live[values[cheap][live[:, 0]].argsort()[:count]].flatten()] = False
            if spent < self.cost(trial) <= target:
                best, spent = trial, self.cost(trial)
        return best

    def _candidates(self, kept: Sequence[Tensor], number: int) -> Tensor:
        """(units, members), the units of a group that may be added: tokens only while nested."""
        members = self.gates.groups[number].members
        absent = ~kept[number][members[:, 0]]
        before = number - 1
        if self.gates.groups[number].dimension == "token":
            while before >= 0 and self.gates.is_removed(before):
                before -= 1
            if before >= 0 and self.gates.groups[before].dimension == "token":
                absent = absent & kept[before][: len(absent)]
        return members[absent]

    def branch_to_remove(
        self, kept: Sequence[Tensor], overhead: Mapping[str, float], target: int
    ) -> str | None:
        """The sub-layer of the lowest saliency per cost, if that is below the price.

        The saliency is that of one gate on the whole output. The sum over units is two to four
        times lower in an attention, whose units are redundant: each alone could be removed.

        Args:
            kept: The units kept now.
            overhead: The cost of a sub-layer beside its units by kind ("attention", "ffn"): the
                starts of its operators, its norm and its softmax, in units of the cost. A kind
                without overhead is never removed.
            target: The cost that the other sub-layers, at full size, must be able to reach.

        Returns:
            The name of the branch, or None.
        """
        pinned = self.gates.removed | scoring_branches(self.architecture) | self.pinned
        alive = {
            branch.name: branch.core.kind
            for branch in self.architecture.branches
            if branch.name not in pinned
        }
        spent, everything = self.cost(kept), [torch.ones_like(keep) for keep in kept]
        found = {
            name: self.branch_saliency[name]
            / max(spent - self._cost_without(name, kept) + overhead[kind], 1.0)
            for name, kind in alive.items()
            if self.branch_saliency[name]
            and overhead.get(kind)
            and self._cost_without(name, everything) >= target
        }
        # One always stays: a network without any sub-layer mixes no tokens.
        if len(self.architecture.branches) - len(self.gates.removed) < 2 or not found:
            return None
        least = min(found, key=lambda name: found[name])
        return least if found[least] < self.price else None

    def _cost_without(self, branch: str, kept: Sequence[Tensor]) -> int:
        counter = self.gates.counter(kept)

        def live(dimension: str, site: str, indices: Any = None) -> int:
            removed = (dimension, site) == ("block", branch)
            return 0 if removed else int(counter(dimension, site, indices))

        return int(self._count(self.architecture, live))

    def removable(self, kept: Sequence[Tensor], margin: float = 0.5) -> list[Tensor]:
        """Booleans, True for units that may leave the training graph.

        These are not kept, and their saliency per cost is below `margin` times the price.
        """
        values = self.values(self.marginal_costs(kept))
        return [
            ~keep & (value < margin * self.price) for keep, value in zip(kept, values, strict=True)
        ]

    def marginal_costs(self, kept: Sequence[Tensor]) -> list[float]:
        """The cost of one more or one less unit of each group, at the current widths.

        Under a latency it is the mean over the units of one tile of columns: of a single one it
        is that of the whole tile, or nothing.
        """
        base, result = self.cost(kept), []
        counter = self.gates.counter(kept)
        for number, (keep, group) in enumerate(zip(kept, self.gates.groups, strict=True)):
            live = keep[group.members[:, 0]]
            # One less where possible, since there may not be one more.
            fewer = int(live.sum()) > 1
            places = group.members[live if fewer else ~live]
            if not len(places):
                result.append(1.0)
                continue
            most = len(places) - fewer
            places = places[: min(most, self._units_of_a_tile(number, counter))]
            other = keep.clone()
            other[places.flatten()] = not fewer
            changed = self.cost([*kept[:number], other, *kept[number + 1 :]])
            result.append(max(1.0, abs(base - changed) / len(places)))
        return result

    def _units_of_a_tile(self, number: int, live: Live) -> int:
        """The number of units of a group that change its products by whole tiles of columns."""
        if self._tile == 1:
            return 1
        group = self.gates.groups[number]
        columns, other = group.unit_size, _MULTIPLIED.get(group.dimension)
        if other is not None:
            found = sites(self.architecture, other)
            site = next(iter(found)) if group.site == SHARED else group.site
            columns *= max(1, int(live(other, site, None)))
        return self._tile // math.gcd(self._tile, columns)

    def _keep(self, values: Sequence[Tensor], price: float) -> list[Tensor]:
        result = []
        for value, group in zip(values, self.gates.groups, strict=True):
            units = value[group.members[:, 0]]
            keep = units >= price
            keep[units.argmax()] = True
            result.append(group.spread(keep))
        return self.gates.nested(result)


def _on_cpu(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients on the CPU, by one copy from their device for all of them."""
    given = [gradient.detach() for gradient in gradients if gradient is not None]
    if given and given[0].device.type != "cpu":
        given = list(torch.cat(given).cpu().split([len(gradient) for gradient in given]))
    parts = iter(given)
    return [None if gradient is None else next(parts) for gradient in gradients]


def ramp(step: int, start: int, end: int, ratio: float) -> float:
    """The share to keep at a step: 1 until `start`, then a cubic fall to `ratio` at `end`.

    Args:
        step: The current optimizer step.
        start: The last step at which everything is kept.
        end: The first step at which `ratio` is kept.
        ratio: The final share, above 0 and at most 1.

    Returns:
        A share between `ratio` and 1.

    References:
        Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for
        model compression", eq. 1.
    """
    if step <= start:
        return 1.0
    done = min(1.0, (step - start) / max(1, end - start))
    return ratio + (1.0 - ratio) * (1.0 - done) ** 3


def _round_up(ratio: float) -> float:
    return int(ratio * 10_000 + 1) / 10_000
