"""Kept counts snapped to multiples that a target computes fast, within a budget: a step on the
mask, before training ends.

Every group of the mask stands on a ladder of good counts: multiples of `round_to` for `embed` and
`ffn`; for `qk` and `v` the per-head widths whose product with the kept heads is such a multiple.
All groups first step down to the rung below; then they go up to the rung above where they came
from, the most saliency per cost first, as the budget allows; then further up while a rung still
fits. What is left of the budget goes to the hidden units of one FFN after the other, in finer
multiples.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.groups import SHARED, sites, tied_units
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture
from ..network.axes import POOL_SITES
from ..network.count import count_macs, count_params
from .plan import plan

Saliency = Mapping[str, Mapping[str, Tensor]]
Cost = Callable[[StructuredMask], int]

ROUNDED = ("embed", "qk", "v", "ffn")
# A budget counts as met when at most this share of it is left over.
SLACK = 0.01


def params_cost(architecture: Architecture) -> Cost:
    """Parameters of what a mask leaves of this network."""
    return lambda mask: count_params(plan(architecture, mask).architecture)


def macs_cost(architecture: Architecture) -> Cost:
    """Multiply-adds, one image, of what a mask leaves of this network."""
    return lambda mask: count_macs(plan(architecture, mask).architecture)


def snap(
    mask: StructuredMask,
    architecture: Architecture,
    round_to: int,
    *,
    saliency: Saliency | None = None,
    cost: Cost | None = None,
    budget: int | None = None,
) -> StructuredMask:
    """The mask with its counts on multiples of `round_to`, costing at most `budget` and, where FFN
    units allow it, no more than 1 % less.

    `saliency[dimension][site]`: a score a unit, shapes as in the mask, higher is kept first;
    without it, units return in the order of their index. `cost` defaults to parameters, `budget` to
    what the mask costs as it is. Groups that keep nothing stay so; heads and blocks are left alone.
    Errors: InputError when even the smallest rungs cost more than the budget.
    """
    if round_to < 1:
        raise InputError(f"round_to = {round_to}: give a whole number of at least 1")
    mask.check(architecture)
    cost = cost or params_cost(architecture)
    budget = cost(mask) if budget is None else budget
    groups = _groups(mask, architecture, round_to, saliency or {})
    counts = [group.below(group.count) for group in groups]
    climb = _Climb(mask, groups, counts, cost, budget)
    climb.down()
    everyone = range(len(groups))
    climb.up(everyone, until=SLACK, limit=[group.above(group.count - 1) for group in groups])
    climb.up(everyone, until=SLACK)
    hidden = [number for number in everyone if groups[number].dimension == "ffn"]
    finer = round_to // 2
    while finer >= 1 and climb.slack > SLACK:
        for number in hidden:
            groups[number].rungs = _rungs(groups[number].total, finer, groups[number].count)
        climb.up(hidden, until=SLACK)
        finer //= 2
    return climb.mask(note={**mask.note, "round_to": str(round_to)})


@dataclass
class _Group:
    """One entry of the mask, counted in units that go together (`members`, mostly one index a
    unit).

    `order` (rows, total) lists the units from the one kept first to the one kept last; `scores` in
    that order.
    """

    dimension: str
    site: str
    total: int
    count: int
    rungs: list[int]
    order: Tensor
    scores: Tensor
    members: Tensor
    flat: bool

    def below(self, count: int) -> int:
        """The highest rung at most `count`, or the lowest one."""
        return self.rungs[max(0, bisect_right(self.rungs, count) - 1)]

    def above(self, count: int) -> int | None:
        """The next rung."""
        place = bisect_right(self.rungs, count)
        return self.rungs[place] if place < len(self.rungs) else None

    def before(self, count: int) -> int | None:
        """The rung before."""
        place = bisect_right(self.rungs, count - 1)
        return self.rungs[place - 1] if place else None

    def worth(self, low: int, high: int) -> float:
        """Saliency of the units between two counts."""
        return float(self.scores[:, low:high].sum())

    def keep(self, count: int) -> Tensor:
        """The mask entry that keeps the first `count` units."""
        units = torch.zeros(self.order.shape, dtype=torch.bool).scatter_(
            1, self.order[:, :count], True
        )
        keep = torch.zeros(len(units), self.members.numel(), dtype=torch.bool)
        keep[:, self.members] = units[:, :, None].expand(-1, -1, self.members.shape[1])
        return keep[0] if self.flat else keep


class _Climb:
    """Moves groups along their ladders under a budget."""

    def __init__(
        self, mask: StructuredMask, groups: list[_Group], counts: list[int], cost: Cost, budget: int
    ) -> None:
        self._source, self._groups, self._counts, self._cost, self._budget = (
            mask,
            groups,
            counts,
            cost,
            budget,
        )
        self._spent = cost(self.mask())

    @property
    def slack(self) -> float:
        """The share of the budget that is not spent."""
        return (self._budget - self._spent) / max(self._budget, 1)

    def mask(
        self, move: tuple[int, int] | None = None, note: Mapping[str, str] | None = None
    ) -> StructuredMask:
        """The mask at the present counts, with one group moved."""
        kept = {dimension: dict(entries) for dimension, entries in self._source.kept.items()}
        for number, group in enumerate(self._groups):
            count = move[1] if move is not None and move[0] == number else self._counts[number]
            kept[group.dimension][group.site] = group.keep(count)
        return StructuredMask(
            kept, scale=self._source.scale, note=self._source.note if note is None else note
        )

    def down(self) -> None:
        """Step down, the least saliency per cost first, until the budget holds."""
        while self._spent > self._budget:
            best: tuple[float, int, int, int] | None = None
            for number, group in enumerate(self._groups):
                lower = group.before(self._counts[number])
                if lower is None:
                    continue
                spent = self._cost(self.mask((number, lower)))
                if spent >= self._spent:
                    continue
                density = group.worth(lower, self._counts[number]) / (self._spent - spent)
                if best is None or density < best[0]:
                    best = (density, number, lower, spent)
            if best is None:
                raise InputError(
                    f"the smallest good widths still cost {self._spent}, more than the budget {self._budget}; "
                    "lower round_to or raise the budget"
                )
            _, number, self._counts[number], self._spent = best

    def up(
        self, numbers: Sequence[int], *, until: float, limit: Sequence[int | None] | None = None
    ) -> None:
        """Step up, the most saliency per cost first, while the budget holds and more than `until`
        of it is left.
        """
        # Cost and saliency of a step change little while others move, so a step is priced again
        # only when its turn comes.
        queue: list[tuple[float, int, int]] = []
        for number in numbers:
            self._offer(queue, number, limit)
        while queue and self.slack > until:
            _, number, count = heapq.heappop(queue)
            spent = self._cost(self.mask((number, count)))
            if spent <= self._budget:
                self._counts[number], self._spent = count, spent
                self._offer(queue, number, limit)

    def _offer(
        self, queue: list[tuple[float, int, int]], number: int, limit: Sequence[int | None] | None
    ) -> None:
        group, count = self._groups[number], self._counts[number]
        higher = group.above(count)
        most = None if limit is None else limit[number]
        if higher is not None and (most is None or higher <= most):
            price = max(1, self._cost(self.mask((number, higher))) - self._spent)
            heapq.heappush(queue, (-group.worth(count, higher) / price, number, higher))


def _groups(
    mask: StructuredMask, architecture: Architecture, round_to: int, saliency: Saliency
) -> list[_Group]:
    groups = []
    for dimension, site, keep in mask:
        block = mask.get("block", site)
        if (
            dimension not in ROUNDED
            or not bool(keep.any())
            or (block is not None and not bool(block.all()))
        ):
            continue
        rows = keep if keep.ndim == 2 else keep[None]
        members = tied_units(architecture, dimension, site)
        units = rows[:, members].all(dim=-1)
        count, (total, size) = int(units[0].sum()), members.shape
        step = round_to
        if dimension in ("qk", "v"):
            heads = _kept_heads(mask, architecture, site)
            if heads == 0:
                continue
            step = round_to // math.gcd(heads, round_to)
        step = math.lcm(step, size) // size
        scores = _scores(saliency.get(dimension, {}), site, rows)[:, members].sum(dim=-1)
        # Kept units come before removed ones, and among equals the earlier index.
        order = torch.argsort(
            scores + units * (scores.abs().max() * 2 + 1), dim=1, descending=True, stable=True
        )
        rungs = _rungs(total, step, count)
        groups.append(
            _Group(
                dimension,
                site,
                total,
                count,
                rungs,
                order,
                scores.gather(1, order),
                members,
                keep.ndim == 1,
            )
        )
    return groups


def _rungs(total: int, step: int, count: int) -> list[int]:
    """Good counts up to `total`: multiples of `step`, and below the first of them halves of it,
    down to one that `count` reaches.
    """
    rungs = {total, *range(step, total + 1, step)}
    part = step
    while part > 1 and part > count:
        part = max(1, part // 2)
        rungs.add(min(part, total))
    return sorted(rungs)


def _kept_heads(mask: StructuredMask, architecture: Architecture, site: str) -> int:
    """Heads that stay at a site; for a shared entry, at the sites that share it (their greatest
    common divisor).
    """
    found = sites(architecture, "head")
    kept = 0
    for name in [name for name in found if name not in POOL_SITES] if site == SHARED else [site]:
        heads = mask.get("head", name)
        kept = math.gcd(kept, found[name] if heads is None else int(heads.sum()))
    return kept


def _scores(entries: Mapping[str, Tensor], site: str, rows: Tensor) -> Tensor:
    """(rows, total) scores at a site: the entry itself, the shared one, or for a shared site the
    sum of all.
    """
    if site in entries:
        found = entries[site]
    elif SHARED in entries and site not in POOL_SITES:
        found = entries[SHARED]
    elif site == SHARED and any(name not in POOL_SITES for name in entries):
        shared = [entry for name, entry in entries.items() if name not in POOL_SITES]
        found = torch.stack(
            [entry.reshape(-1, entry.shape[-1]).sum(dim=0) for entry in shared]
        ).sum(dim=0)
    else:
        found = torch.ones(rows.shape[1])
    found = found.detach().float().cpu().reshape(-1, found.shape[-1])
    if found.shape[1] != rows.shape[1]:
        raise InputError(
            f"saliency at {site} has {found.shape[1]} scores, the mask has {rows.shape[1]} units"
        )
    if found.shape[0] != rows.shape[0]:
        found = found.sum(dim=0, keepdim=True).expand_as(rows)
    return torch.nan_to_num(found)
