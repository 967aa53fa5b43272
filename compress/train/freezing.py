"""The masks at the freeze: rounded to multiples that a target computes fast, within the budget.

Under a latency the dynamic programme of `compress.latency` rounds: it chooses the width of the
stream, of every sub-layer, and the numbers of tokens, those that the stem embeds among them, that
lose the least saliency within the budget, where one price leaves a part of the budget unused. Units
that are kept by the price stay before all others; patches that it keeps out of the stem do not
return. Sub-layers are removed during training, one at a time; at the freeze they are
removed only if the budget cannot be met otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ..latency.losses import Losses, scored_losses
from ..latency.search import require_limits, smallest_latency_ms, solve_architecture
from ..latency.shapes import network_shape
from ..latency.solution import Limits, Solution, SolveOptions
from ..masks.budget import DualSolver
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.axes import STEM_OUT
from ..network.select_specs import scoring_branches
from ..oneshot.budgets import Precision
from ..surgery.plan import Plan, plan
from ..surgery.rounding import snap
from ..tokens.counts import STEM

# A latency that exceeds a budget by this share is equal to it, in another order of summation.
EQUAL = 1e-9


def snapped(solver: DualSolver, kept: list[Tensor], round_to: int, target: int) -> list[Tensor]:
    """Kept units in multiples of `round_to`, by a greedy search within a cost.

    Args:
        solver: The saliencies and the cost.
        kept: The units kept now, one tensor for each group.
        round_to: The multiple.
        target: The cost not to exceed.

    Returns:
        Booleans, one tensor for each group.

    Raises:
        InputError: Even the smallest counts cost more.
    """
    if round_to == 1:
        return kept
    gates = solver.gates
    saliency: dict[str, dict[str, Tensor]] = {}
    for group, values in zip(gates.groups, solver.saliency, strict=True):
        saliency.setdefault(group.dimension, {})[group.site] = values
    mask = snap(
        gates.mask(kept),
        solver.architecture,
        round_to,
        saliency=saliency,
        cost=lambda mask: solver.cost(gates.units(mask)),
        budget=target,
    )
    return gates.units(mask)


@dataclass(frozen=True)
class Rounding:
    """How masks are rounded for a latency.

    Attributes:
        table: The cost table.
        round_to: Widths are multiples of it.
        removable: Kinds of sub-layers that may be removed as a whole: "attention", "ffn".
        precision: Of the weights in a file and in memory. None: that of the table.
    """

    table: CostTable
    round_to: int = 1
    removable: tuple[str, ...] = ("attention", "ffn")
    precision: Precision | None = None


@dataclass(frozen=True)
class Frozen:
    """Rounded masks.

    Attributes:
        kept: Booleans, one tensor for each group.
        removed: Sub-layers that are removed now.
        latency_ms: The latency by the table.
        loss: The saliency of what is not kept.
    """

    kept: list[Tensor]
    removed: tuple[str, ...] = ()
    latency_ms: float = 0.0
    loss: float = 0.0


def round_to_latency(
    solver: DualSolver,
    kept: Sequence[Tensor],
    limits: Limits,
    rounding: Rounding,
    other: Sequence[Tensor] | None = None,
) -> Frozen:
    """Round learned masks within a latency and the other budgets of a device.

    Args:
        solver: The saliencies.
        kept: The units kept now, one tensor for each group.
        limits: The budgets.
        rounding: The table and the multiples.
        other: Another choice of units; the one that loses less and meets the latency is returned.

    Returns:
        The rounded masks. The latency by the table never exceeds the budget.

    Raises:
        InputError: The budgets cannot be met; the message has the smallest value that can.
    """
    problem = _Problem(solver, kept, rounding)
    found: list[Frozen] = []
    alone = limits.file_mb is None and limits.peak_memory_mb is None
    if other is not None and alone:
        found.append(problem.frozen([keep.clone() for keep in other], ()))
    with contextlib.suppress(InputError):
        found.append(problem.solved(limits, depth=False))
    most = limits.latency_ms or 0.0
    found = [each for each in found if each.latency_ms <= most * (1 + EQUAL)]
    if not found:
        found = [problem.solved(limits, depth=True)]
    return min(found, key=lambda each: each.loss)


def least_latency_ms(
    solver: DualSolver,
    kept: Sequence[Tensor],
    rounding: Rounding,
    limits: Limits | None = None,
) -> float:
    """The smallest latency that rounding can reach, in milliseconds; infinite if it cannot.

    Args:
        solver: The gates of the network.
        kept: The units kept now, one tensor for each group.
        rounding: The table and the multiples.
        limits: The budgets beside the latency.
    """
    problem = _Problem(solver, kept, rounding)
    given = problem.base.architecture, problem.losses(True), rounding.table
    return smallest_latency_ms(*given, limits, problem.options)


def require_rounding(
    solver: DualSolver, kept: Sequence[Tensor], rounding: Rounding, limits: Limits
) -> None:
    """Check that rounding can meet all budgets of a device.

    Args:
        solver: The gates of the network.
        kept: The units kept now, one tensor for each group.
        rounding: The table and the multiples.
        limits: The budgets.

    Raises:
        InputError: It cannot; the message has the smallest value that can be met.
    """
    problem = _Problem(solver, kept, rounding)
    given = problem.base.architecture, problem.losses(True), limits, rounding.table
    require_limits(*given, problem.options)


class _Problem:
    """The network of the current masks, and what its choices lose."""

    def __init__(self, solver: DualSolver, kept: Sequence[Tensor], rounding: Rounding) -> None:
        self.solver, self.gates, self.rounding = solver, solver.gates, rounding
        self.kept = list(kept)

    @property
    def _places(self) -> list[int]:
        """The numbers of the groups of tokens that something reads, in order."""
        _, numbers = self.gates.split(range(len(self.gates.groups)))
        return [number for number in numbers if not self.gates.is_removed(number)]

    def _reader(self, number: int) -> int:
        first = len(self.gates.split(self.gates.groups)[0])
        return self.gates.token_places[number - first].reader

    @cached_property
    def first_patches(self) -> Tensor | None:
        """The patches that the stem embeds; None: all."""
        _, groups = self.gates.split(self.gates.groups)
        if not groups or groups[0].site != STEM_OUT or not self._places:
            return None
        keep = torch.zeros(groups[0].size, dtype=torch.bool)
        read = self.kept[self._places[0]]
        keep[: len(read)] = read
        return keep

    @cached_property
    def base(self) -> Plan:
        """The network without the sub-layers and patches that are gone already."""
        entries: dict[str, dict[str, Tensor]] = {}
        if self.gates.removed:
            entries["block"] = _nothing(self.gates.removed)
        if self.first_patches is not None:
            prefix = self.solver.architecture.prefix
            whole = torch.cat([torch.ones(prefix, dtype=torch.bool), self.first_patches])
            entries["token"] = {STEM_OUT: whole}
        return plan(self.solver.architecture, StructuredMask(entries, scale="kept"))

    def losses(self, depth: bool) -> Losses:
        """What is lost, in the unit of the saliencies; with `depth` sub-layers may be removed."""
        scores: dict[str, dict[str, Tensor]] = {}
        kept: dict[str, dict[str, Tensor]] = {}
        rows = zip(self.gates.groups, self.solver.saliency, self.kept, strict=True)
        for number, (group, values, keep) in enumerate(rows):
            if group.dimension != "token" and not self.gates.is_removed(number):
                scores.setdefault(group.dimension, {})[group.site] = values
                kept.setdefault(group.dimension, {})[group.site] = keep
        gone = {}
        if depth:
            pinned = scoring_branches(self.solver.architecture)
            gone = {
                branch.name: self.solver.branch_saliency.get(branch.name, 0.0)
                for branch in self.base.architecture.branches
                if branch.core.kind in self.rounding.removable and branch.name not in pinned
            }
        architecture, round_to = self.base.architecture, self.rounding.round_to
        return scored_losses(
            architecture, scores, round_to, self._token_losses(), kept=kept, gone=gone
        )

    def _token_losses(self) -> dict[int, list[float]]:
        """The loss of each number of tokens at the stem and behind each attention, if learned."""
        architecture, places = self.base.architecture, self._places
        if self.first_patches is None:
            return {}
        steps = [row[0].step for row in self.base.branches]
        found = {STEM: self._row(places[0], self.first_patches)}
        for number in architecture.attention_steps():
            later = [place for place in places if self._reader(place) > steps[number]]
            if later:
                found[number] = self._row(later[0], self.first_patches)
        return found

    def _row(self, place: int, present: Tensor) -> list[float]:
        """The loss of each number of tokens at a place, where some patches are present."""
        order, prefix = self._leaving(place, present), self.base.architecture.prefix
        sums = [0.0, *self.solver.saliency[place][order].clamp(min=0.0).cumsum(0).tolist()]
        most = len(order)
        return [
            sums[min(most, max(0, most + prefix - count))]
            for count in range(self.base.architecture.tokens + 1)
        ]

    def _leaving(self, place: int, present: Tensor) -> Tensor:
        """The patches that are present at a place, from the first to leave to the last."""
        values, keep = self.solver.saliency[place], self.kept[place]
        patches = torch.nonzero(present[: len(values)]).flatten()
        patches = patches[values[patches].argsort(stable=True)]
        return patches[keep[patches].to(torch.uint8).argsort(stable=True)]

    @property
    def options(self) -> SolveOptions:
        """How the dynamic programme searches."""
        prefix = self.base.architecture.prefix
        sets = [self.kept[place] for place in self._places]
        levels = tuple(prefix + int(keep.sum()) for keep in sets)
        return SolveOptions(precision=self.rounding.precision, levels=levels)

    def solved(self, limits: Limits, *, depth: bool) -> Frozen:
        """The masks that the dynamic programme chooses."""
        losses = self.losses(depth)
        architecture, table = self.base.architecture, self.rounding.table
        found = solve_architecture(architecture, losses, limits, table, self.options)
        removed = tuple(name for name, option in found.options.items() if option.removes)
        return self.frozen(self._chosen(found, losses), removed)

    def _chosen(self, solution: Solution, losses: Losses) -> list[Tensor]:
        chosen = [keep.clone() for keep in self.kept]
        for number, group in enumerate(self.gates.groups):
            if self.gates.is_removed(number) or group.dimension == "token":
                continue
            if (group.dimension, group.site) == ("embed", SHARED):
                assert losses.embed_order is not None
                chosen[number] = torch.ones(group.size, dtype=torch.bool)
                chosen[number][losses.embed_order[: group.size - solution.embed]] = False
            elif (option := solution.options.get(group.site)) and not option.removes:
                for curve in losses.sublayers[group.site].curves:
                    if curve.dimension == group.dimension:
                        chosen[number] = curve.keep(option.widths[group.dimension])
        return self._with_tokens(chosen, (solution.stem_tokens, *solution.counts))

    def _with_tokens(self, chosen: list[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """The nested sets of patches for the tokens behind the stem and each step."""
        if self.first_patches is None:
            return chosen
        _, every = self.gates.split(range(len(self.gates.groups)))
        alive = self._places
        # Places in front of the first reader that is left have what it reads.
        present = self._read_at(alive[0], self.first_patches, counts)
        for place in every:
            if place in alive:
                present = self._read_at(place, present, counts)
            chosen[place] = present[: self.gates.groups[place].size].clone()
        return chosen

    def _read_at(self, place: int, present: Tensor, counts: Sequence[int]) -> Tensor:
        """The patches that are read at a place, of those that are present before it."""
        # The number of steps that are left before the reader.
        number = sum(row[0].step < self._reader(place) for row in self.base.branches)
        count = counts[number] - self.base.architecture.prefix
        order = self._leaving(place, present)
        # Behind the last attention only what the head reads is left, and nothing reads it.
        keep = torch.zeros(self.gates.groups[place].size, dtype=torch.bool)
        keep[order[len(order) - max(1, min(count, len(order))) :]] = True
        return keep

    def frozen(self, kept: list[Tensor], removed: tuple[str, ...]) -> Frozen:
        """Masks with their latency by the table and the saliency that they lose."""
        mask = self.gates.mask(kept)
        if removed or self.gates.removed:
            entries = {**mask.kept, "block": _nothing({*removed, *self.gates.removed})}
            mask = StructuredMask(entries, scale="kept")
        architecture = plan(self.solver.architecture, mask).architecture
        latency = self.rounding.table.latency_ms(network_shape(architecture))
        return Frozen(kept, removed, latency, self._lost(kept, removed))

    def _lost(self, kept: Sequence[Tensor], removed: Sequence[str]) -> float:
        total = sum(self.solver.branch_saliency.get(name, 0.0) for name in removed)
        present: Tensor | None = None
        for number, (group, keep) in enumerate(zip(self.gates.groups, kept, strict=True)):
            if self.gates.is_removed(number) or group.site in removed:
                continue
            gone = ~keep
            if group.dimension == "token":
                # A patch loses what leaving costs where it leaves.
                gone = gone if present is None else gone & present[: len(gone)]
                present = keep
            total += float(self.solver.saliency[number][gone].sum())
        return total


def _nothing(names: Collection[str]) -> dict[str, Tensor]:
    return {name: torch.zeros(1, dtype=torch.bool) for name in sorted(names)}
