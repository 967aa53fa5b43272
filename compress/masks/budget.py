"""How much may stay, and which units: keep what loses most a unit of cost, with the price chosen so
that the budget is met exactly.

Minimise loss(mask) subject to cost(mask) <= budget. With the second-order saliency s_u (how much
the loss grows without unit u) and its marginal cost c_u, the Lagrangian keeps u exactly if s_u >=
lambda c_u. A gradient ascent on lambda would have to be tuned; the dual problem has one variable
and is solved at once by bisection, at every update, on live costs. So the budget is followed to the
unit during the whole ramp, and there is no search by the user.

Saliency: the moving average of (dLoss/dgate)², the empirical Fisher information of a gate
(Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8; Kwon et al.
2022). For a trained network the first-order movement of a gate is noise around zero, which is why
it is squared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture
from ..network.cost import CostKind, live_cost
from .gates import Gates

# A budget counts as met when at most this share of it is left over.
SLACK = 0.01
# The dimensions whose units make up what a sub-layer gives.
WRITING = ("v", "ffn")


@dataclass(frozen=True)
class Budget:
    """At most `ratio` of the dense network's `kind` ("params" or "macs")."""

    kind: CostKind
    ratio: float

    def __post_init__(self) -> None:
        if self.kind not in ("params", "macs"):
            raise InputError(f"budget kind {self.kind!r}: choose 'params' or 'macs'")
        if not 0 < self.ratio <= 1:
            raise InputError(
                f"budget {self.kind} = {self.ratio}: give the share to keep, above 0 and at most 1"
            )


def dense_cost(architecture: Architecture, kind: CostKind) -> int:
    """Cost with everything live."""
    from .groups import sites

    def live(dimension: str, site: str, indices: Any = None) -> int:
        return sites(architecture, dimension)[site] if indices is None else len(indices)

    return int(live_cost(architecture, live, kind))


def smallest_ratio(architecture: Architecture, gates: Gates, kind: CostKind) -> float:
    """The share that is left when every mask keeps its one pinned unit."""
    least = []
    for group in gates.groups:
        keep = torch.zeros(group.size, dtype=torch.bool)
        keep[group.members[0]] = True
        least.append(keep)
    return float(
        live_cost(architecture, gates.counter(least), kind) / dense_cost(architecture, kind)
    )


def require_feasible(architecture: Architecture, gates: Gates, budget: Budget) -> None:
    """Refuse a budget that no mask can meet. Errors: InputError with the smallest feasible
    budget.
    """
    least = smallest_ratio(architecture, gates, budget.kind)
    if budget.ratio < least:
        kept = f" with {', '.join(gates.fixed)} fixed" if gates.fixed else ""
        raise InputError(
            f"budget {budget.kind} = {budget.ratio}: not feasible; with sharing = '{gates.sharing}'{kept} the smallest is {_up(least):.4f} "
            "(one unit of each mask is always kept)"
        )


class DualSolver:
    """Chooses what is kept for a target cost, from saliencies that it averages over steps.

    Shapes: one tensor (size,) a group of `gates`.
    """

    def __init__(
        self, architecture: Architecture, gates: Gates, kind: CostKind, decay: float = 0.98
    ) -> None:
        self.architecture, self.gates, self.kind, self.decay = architecture, gates, kind, decay
        self.saliency = [torch.zeros(group.size, dtype=torch.float64) for group in gates.groups]
        # Of each sub-layer as a whole, by its branch's name.
        self.worth = {branch.name: 0.0 for branch in architecture.branches}
        self.price = 0.0

    @property
    def memory_steps(self) -> int:
        """How many steps the averages look back."""
        return round(1.0 / (1.0 - self.decay))

    def observe(
        self, gradients: Sequence[Tensor | None], kept: Sequence[Tensor] | None = None
    ) -> None:
        """Take in the gates' gradients of one step, in which `kept` lived (absent: all)."""
        for number, (average, gradient, group) in enumerate(
            zip(self.saliency, gradients, self.gates.groups, strict=True)
        ):
            if gradient is None:
                continue
            # Scores of one unit share its gradient evenly; together they have all of it.
            whole = gradient.detach().double().cpu() * group.whole
            average.mul_(self.decay).add_(whole.square(), alpha=1.0 - self.decay)
            if group.dimension in WRITING and group.site in self.worth:
                # A gate on the whole output has the sum of its units' gradients (each unit's is
                # spread over its members).
                live = whole if kept is None else whole[kept[number]]
                together = float(live.sum()) / group.whole
                self.worth[group.site] = (
                    self.decay * self.worth[group.site] + (1.0 - self.decay) * together**2
                )

    def cost(self, kept: Sequence[Tensor]) -> int:
        """Exact cost of keeping `kept`."""
        return int(live_cost(self.architecture, self.gates.counter(kept), self.kind))

    def solve(self, kept: Sequence[Tensor], target: int) -> list[Tensor]:
        """What to keep so that the cost is at most `target` and as near to it as whole units allow.
        Marginal costs are taken at `kept`.
        """
        prices = self.marginal_costs(kept)
        values = [
            saliency / price if group.site not in self.gates.gone else torch.zeros_like(saliency)
            for saliency, price, group in zip(self.saliency, prices, self.gates.groups, strict=True)
        ]
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
        """Spend what the price left over: best units first, group by group from the cheapest."""
        spent, prices = self.cost(kept), self.marginal_costs(kept)
        for number in sorted(range(len(kept)), key=lambda index: prices[index]):
            if self.gates.groups[number].site in self.gates.gone:
                continue
            room = int((target - spent) // prices[number])
            if room < 1:
                break
            members = self.gates.groups[number].members
            candidates = members[~kept[number][members[:, 0]]]
            best = candidates[values[number][candidates[:, 0]].argsort(descending=True)[:room]]
            trial = kept[number].clone()
            trial[best.flatten()] = True
            changed = [*kept[:number], trial, *kept[number + 1 :]]
            if self.cost(changed) <= target:
                kept, spent = changed, self.cost(changed)
        return kept if target - spent <= SLACK * target else self._trade(kept, values, target)

    def _trade(self, kept: list[Tensor], values: Sequence[Tensor], target: int) -> list[Tensor]:
        """Nothing cheap is left to take in: take in one dear unit and give up the cheap ones that
        it displaces.
        """
        prices = self.marginal_costs(kept)
        alive = [
            number
            for number, group in enumerate(self.gates.groups)
            if group.site not in self.gates.gone
        ]
        cheap = min(alive, key=lambda index: prices[index])
        best, spent = kept, self.cost(kept)
        for number in alive:
            members = self.gates.groups[number].members
            candidates = members[~kept[number][members[:, 0]]]
            if number == cheap or not len(candidates):
                continue
            trial = [keep.clone() for keep in kept]
            trial[number][candidates[values[number][candidates[:, 0]].argmax()]] = True
            over = self.cost(trial) - target
            own = self.gates.groups[cheap].members
            live = own[trial[cheap][own[:, 0]]]
            count = -int(-over // self.marginal_costs(trial)[cheap])
            if 0 < count < len(live):
                trial[cheap][live[values[cheap][live[:, 0]].argsort()[:count]].flatten()] = False
            if spent < self.cost(trial) <= target:
                best, spent = trial, self.cost(trial)
        return best

    def worthless(
        self, kept: Sequence[Tensor], overhead: Mapping[str, float], target: int
    ) -> str | None:
        """The sub-layer that is worth least for what it costs, if the price is above its worth: it
        should go as a whole.

        A sub-layer costs what its live units cost and, however few they are, `overhead` of its kind
        ("attention", "ffn"): the time of its operators' starts, its norm and its softmax, in units
        of the cost. Its worth is the saliency of one gate on its whole output: units of an
        attention say much the same, so that each alone could go, and the sum of their saliencies
        was two to four times less than that of all together. None goes whose place the others, at
        their full size, could not fill up to `target`.
        """
        alive = {
            branch.name: branch.core.kind
            for branch in self.architecture.branches
            if branch.name not in self.gates.gone
        }
        spent, everything = self.cost(kept), [torch.ones_like(keep) for keep in kept]
        found = {
            name: self.worth[name]
            / max(spent - self._cost_without(name, kept) + overhead[kind], 1.0)
            for name, kind in alive.items()
            if self.worth[name]
            and overhead.get(kind)
            and self._cost_without(name, everything) >= target
        }
        # One always stays: a network without any sub-layer mixes no tokens.
        if len(alive) < 2 or not found:
            return None
        least = min(found, key=lambda name: found[name])
        return least if found[least] < self.price else None

    def _cost_without(self, branch: str, kept: Sequence[Tensor]) -> int:
        counter = self.gates.counter(kept)

        def live(dimension: str, site: str, indices: Any = None) -> int:
            return (
                0
                if (dimension, site) == ("block", branch)
                else int(counter(dimension, site, indices))
            )

        return int(live_cost(self.architecture, live, self.kind))

    def surely_dead(self, kept: Sequence[Tensor], margin: float = 0.5) -> list[Tensor]:
        """Units that are out and whose value is far under the price: booleans, True = may be
        removed from the training graph.
        """
        prices = self.marginal_costs(kept)
        return [
            ~keep & (saliency < margin * self.price * price)
            for keep, saliency, price in zip(kept, self.saliency, prices, strict=True)
        ]

    def marginal_costs(self, kept: Sequence[Tensor]) -> list[float]:
        """What one more or one less unit of each group costs, at the present live widths."""
        base, result = self.cost(kept), []
        for number, (keep, group) in enumerate(zip(kept, self.gates.groups, strict=True)):
            live = keep[group.members[:, 0]]
            # One less where possible: the last unit's price counts, not that of one that may not
            # exist.
            fewer = int(live.sum()) > 1
            places = group.members[live if fewer else ~live]
            if not len(places):
                result.append(1.0)
                continue
            other = keep.clone()
            other[places[0]] = not fewer
            result.append(
                max(1.0, abs(base - self.cost([*kept[:number], other, *kept[number + 1 :]])))
            )
        return result

    def select(self, keep: Sequence[Tensor]) -> list[Tensor]:
        """Saliencies of the units that stay in the training graph."""
        return [saliency[index] for saliency, index in zip(self.saliency, keep, strict=True)]

    def _keep(self, values: Sequence[Tensor], price: float) -> list[Tensor]:
        result = []
        for value, group in zip(values, self.gates.groups, strict=True):
            units = value[group.members[:, 0]]
            keep = units >= price
            keep[units.argmax()] = True
            result.append(group.spread(keep))
        return result


def ramp(step: int, start: int, end: int, ratio: float) -> float:
    """The share to keep at a step: 1 until `start`, then a cubic fall to `ratio` at `end` (Zhu and
    Gupta 2017, eq. 1).
    """
    if step <= start:
        return 1.0
    done = min(1.0, (step - start) / max(1, end - start))
    return ratio + (1.0 - ratio) * (1.0 - done) ** 3


def _up(ratio: float) -> float:
    return int(ratio * 10_000 + 1) / 10_000
