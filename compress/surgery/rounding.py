"""Rounding of kept counts to multiples that a target computes fast, within a budget.

Every group of a mask has a list of allowed counts: multiples of `round_to` for `embed` and `ffn`;
for `qk` and `v` the widths of a head whose product with the kept heads is such a multiple.

1. All groups are rounded down.
2. Groups go up to the next count above the original one, the most saliency per cost first, as the
   budget allows.
3. Groups go further up while a count still fits.
4. The rest of the budget goes to the hidden units of FFNs, in finer multiples.
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
from ..network.axes import has_own_mask
from ..network.count import count_macs, count_params
from .plan import plan

Saliency = Mapping[str, Mapping[str, Tensor]]
Cost = Callable[[StructuredMask], int]

ROUNDED = ("embed", "qk", "v", "ffn")
# A budget counts as met when at most this share of it is left over.
SLACK = 0.01


def params_cost(architecture: Architecture) -> Cost:
    """A function from a mask to the parameters of this network after the cut."""
    return lambda mask: count_params(plan(architecture, mask).architecture)


def macs_cost(architecture: Architecture) -> Cost:
    """A function from a mask to the multiply-adds of one image after the cut."""
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
    """Round the counts of a mask to multiples of `round_to`, at a cost of at most `budget`.

    Where FFN units allow it, at most 1 % of the budget is left over. Groups that keep nothing stay
    empty; heads and blocks are not changed.

    Args:
        mask: The mask to round.
        architecture: The network that it is for.
        round_to: The multiple, at least 1.
        saliency: `saliency[dimension][site]`, a score for each unit in the shapes of the mask;
            higher is kept first. Without it units return in the order of their index.
        cost: The cost of a mask (default: the parameters after the cut).
        budget: The cost not to exceed (default: that of `mask`).

    Returns:
        A mask of the same entries, with `round_to` in its note.

    Raises:
        InputError: The mask does not fit, or even the smallest counts exceed the budget.
    """
    if round_to < 1:
        raise InputError(f"round_to = {round_to}: give a whole number of at least 1")
    mask.check(architecture)
    cost = cost or params_cost(architecture)
    budget = cost(mask) if budget is None else budget
    groups = _groups(mask, architecture, round_to, saliency or {})
    counts = [group.at_most(group.count) for group in groups]
    search = _Search(mask, groups, counts, cost, budget)
    search.reduce()
    everyone = range(len(groups))
    search.extend(everyone, limit=[group.above(group.count - 1) for group in groups])
    search.extend(everyone)
    hidden = [number for number in everyone if groups[number].dimension == "ffn"]
    finer = round_to // 2
    while finer >= 1 and search.slack > SLACK:
        for number in hidden:
            group = groups[number]
            group.allowed = _allowed_counts(group.total, finer, group.count)
        search.extend(hidden)
        finer //= 2
    return search.mask(note={**mask.note, "round_to": str(round_to)})


@dataclass
class _Group:
    """One entry of the mask.

    Attributes:
        dimension: The dimension of the entry.
        site: Its site.
        total: The number of its units.
        count: The number of units that the mask keeps.
        allowed: The allowed counts, ascending.
        order: (rows, total), the units from the first one to keep to the last one.
        scores: (rows, total), the saliency of the units in that order.
        members: (units, members), the indices of each unit.
        flat: Whether the entry has no axis of heads.
    """

    dimension: str
    site: str
    total: int
    count: int
    allowed: list[int]
    order: Tensor
    scores: Tensor
    members: Tensor
    flat: bool

    def at_most(self, count: int) -> int:
        """The highest allowed count up to `count`, or else the lowest one."""
        return self.allowed[max(0, bisect_right(self.allowed, count) - 1)]

    def above(self, count: int) -> int | None:
        """The next allowed count above `count`, if there is one."""
        place = bisect_right(self.allowed, count)
        return self.allowed[place] if place < len(self.allowed) else None

    def below(self, count: int) -> int | None:
        """The next allowed count below `count`, if there is one."""
        place = bisect_right(self.allowed, count - 1)
        return self.allowed[place - 1] if place else None

    def saliency(self, low: int, high: int) -> float:
        """The saliency of the units between two counts."""
        return float(self.scores[:, low:high].sum())

    def keep(self, count: int) -> Tensor:
        """The mask entry that keeps the first `count` units."""
        units = torch.zeros(self.order.shape, dtype=torch.bool).scatter_(
            1, self.order[:, :count], True
        )
        keep = torch.zeros(len(units), self.members.numel(), dtype=torch.bool)
        keep[:, self.members] = units[:, :, None].expand(-1, -1, self.members.shape[1])
        return keep[0] if self.flat else keep


class _Search:
    """A greedy search over the allowed counts of all groups, under a budget."""

    def __init__(
        self, mask: StructuredMask, groups: list[_Group], counts: list[int], cost: Cost, budget: int
    ) -> None:
        self._source, self._groups, self._counts = mask, groups, counts
        self._cost, self._budget = cost, budget
        self._spent = cost(self.mask())

    @property
    def slack(self) -> float:
        """The share of the budget that is not spent."""
        return (self._budget - self._spent) / max(self._budget, 1)

    def mask(
        self, move: tuple[int, int] | None = None, note: Mapping[str, str] | None = None
    ) -> StructuredMask:
        """The mask at the current counts, with one group moved to another count."""
        kept = {dimension: dict(entries) for dimension, entries in self._source.kept.items()}
        for number, group in enumerate(self._groups):
            count = move[1] if move is not None and move[0] == number else self._counts[number]
            kept[group.dimension][group.site] = group.keep(count)
        note = self._source.note if note is None else note
        return StructuredMask(kept, scale=self._source.scale, note=note)

    def reduce(self) -> None:
        """Reduce counts, the least saliency per cost first, until the budget holds."""
        while self._spent > self._budget:
            best: tuple[float, int, int, int] | None = None
            for number, group in enumerate(self._groups):
                lower = group.below(self._counts[number])
                if lower is None:
                    continue
                spent = self._cost(self.mask((number, lower)))
                if spent >= self._spent:
                    continue
                density = group.saliency(lower, self._counts[number]) / (self._spent - spent)
                if best is None or density < best[0]:
                    best = (density, number, lower, spent)
            if best is None:
                raise InputError(
                    f"the smallest allowed widths still cost {self._spent}, "
                    f"more than the budget {self._budget}; lower round_to or raise the budget"
                )
            _, number, self._counts[number], self._spent = best

    def extend(self, numbers: Sequence[int], limit: Sequence[int | None] | None = None) -> None:
        """Raise counts, up to `limit`, the most saliency per cost first, within the budget."""
        # A cost changes little while other groups move, so it is updated only when popped.
        queue: list[tuple[float, int, int]] = []
        for number in numbers:
            self._push(queue, number, limit)
        while queue and self.slack > SLACK:
            _, number, count = heapq.heappop(queue)
            spent = self._cost(self.mask((number, count)))
            if spent <= self._budget:
                self._counts[number], self._spent = count, spent
                self._push(queue, number, limit)

    def _push(
        self, queue: list[tuple[float, int, int]], number: int, limit: Sequence[int | None] | None
    ) -> None:
        group, count = self._groups[number], self._counts[number]
        higher = group.above(count)
        most = None if limit is None else limit[number]
        if higher is not None and (most is None or higher <= most):
            extra = max(1, self._cost(self.mask((number, higher))) - self._spent)
            heapq.heappush(queue, (-group.saliency(count, higher) / extra, number, higher))


def _groups(
    mask: StructuredMask, architecture: Architecture, round_to: int, saliency: Saliency
) -> list[_Group]:
    found = []
    for dimension, site, keep in mask:
        block = mask.get("block", site)
        removed = not bool(keep.any()) or (block is not None and not bool(block.all()))
        if dimension not in ROUNDED or removed:
            continue
        step = round_to
        if dimension in ("qk", "v"):
            heads = _kept_heads(mask, architecture, site)
            if heads == 0:
                continue
            step = round_to // math.gcd(heads, round_to)
        members = tied_units(architecture, dimension, site)
        rows = keep if keep.ndim == 2 else keep[None]
        scores = _scores(saliency.get(dimension, {}), site, rows)
        found.append(_group(dimension, site, keep, members, scores, step))
    return found


def _group(
    dimension: str, site: str, keep: Tensor, members: Tensor, scores: Tensor, step: int
) -> _Group:
    """The group of an entry, of whose indices (not units) a multiple of `step` is to be kept."""
    rows = keep if keep.ndim == 2 else keep[None]
    units, scores = rows[:, members].all(dim=-1), scores[:, members].sum(dim=-1)
    count, (total, size) = int(units[0].sum()), members.shape
    allowed = _allowed_counts(total, math.lcm(step, size) // size, count)
    # Kept units come before removed ones, and among equals the earlier index.
    ranked = scores + units * (scores.abs().max() * 2 + 1)
    order = torch.argsort(ranked, dim=1, descending=True, stable=True)
    scores = scores.gather(1, order)
    flat = keep.ndim == 1
    return _Group(dimension, site, total, count, allowed, order, scores, members, flat)


def _allowed_counts(total: int, step: int, count: int) -> list[int]:
    """`total`, multiples of `step`, and halves of `step` down to one that `count` reaches."""
    allowed = {total, *range(step, total + 1, step)}
    part = step
    while part > 1 and part > count:
        part = max(1, part // 2)
        allowed.add(min(part, total))
    return sorted(allowed)


def _kept_heads(mask: StructuredMask, architecture: Architecture, site: str) -> int:
    """The heads that a site keeps; for a shared entry, the common divisor over its sites."""
    found = sites(architecture, "head")
    kept = 0
    for name in [name for name in found if not has_own_mask(name)] if site == SHARED else [site]:
        heads = mask.get("head", name)
        kept = math.gcd(kept, found[name] if heads is None else int(heads.sum()))
    return kept


def _scores(entries: Mapping[str, Tensor], site: str, rows: Tensor) -> Tensor:
    """(rows, total) scores at a site: its own entry, else the shared one, else 1 for every unit.

    At a shared site without an entry they are the sum over all sites.
    """
    if site in entries:
        found = entries[site]
    elif SHARED in entries and not has_own_mask(site):
        found = entries[SHARED]
    elif site == SHARED and any(not has_own_mask(name) for name in entries):
        shared = [entry for name, entry in entries.items() if not has_own_mask(name)]
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
