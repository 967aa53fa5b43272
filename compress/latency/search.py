"""The search over the widths of the stream, with budgets of bytes and memory beside the latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ..network.architecture import Architecture
from ..oneshot.allocation import Option
from ..oneshot.choice import true_errors
from ..tokens.counts import STEM
from .chain import Chain, chain_of, total
from .losses import Losses
from .problem import (
    Levels,
    activation_bytes,
    stem_choices,
    sublayer_choices,
    token_levels,
    weight_precision,
)
from .programme import (
    Numbers,
    Plan,
    Stage,
    lower_bound,
    plan_of,
    solve_quickly,
    solve_stages,
)
from .reach import MB, Reach
from .solution import DEFAULTS, Limits, Solution, SolveOptions

# How often the losses of removed sub-layers are taken again beside the widths just chosen; steps
# of the price of bytes; caps of the memory of activations that are tried.
PRICINGS, BYTE_PRICES, MEMORY_CAPS = 2, 12, 6


def solve_architecture(
    architecture: Architecture,
    losses: Losses,
    limits: Limits,
    table: CostTable | None,
    options: SolveOptions = DEFAULTS,
) -> Solution:
    """Do what `solve` does, for an architecture and validated budgets.

    Args:
        architecture: The network.
        losses: What each choice loses.
        limits: The budgets.
        table: The cost table; needed by a limit of the latency.
        options: See `SolveOptions`.

    Returns:
        The choice.

    Raises:
        InputError: A budget cannot be met.
    """
    if architecture.selects and table is not None:
        table.require_selections()
    search = _Search(architecture, losses, limits, table, options)
    best: Solution | None = None
    chosen: Mapping[str, Option] | None = None
    for _ in range(PRICINGS):
        found = search.run(chosen)
        if found is None:
            break
        errors = true_errors(losses.sublayers, found.options)
        # What the leaving tokens lose is the rest.
        priced = sum(option.error for option in found.options.values())
        found = replace(found, loss=found.loss - priced + sum(errors.values()))
        if best is None or found.loss < best.loss:
            best = found
        if not any(option.removes for option in found.options.values()):
            break
        chosen = found.options
    if best is None:
        obstacle = search.reach(search.chains()).obstacle()
        assert obstacle is not None, "what can be reached is found"
        raise InputError(obstacle)
    return best


def smallest_latency_ms(
    architecture: Architecture,
    losses: Losses,
    table: CostTable,
    limits: Limits | None = None,
    options: SolveOptions = DEFAULTS,
) -> float:
    """The smallest latency that any choice has by the table, in milliseconds.

    Args:
        architecture: The network.
        losses: The widths to choose from.
        table: The cost table.
        limits: Budgets of bytes and memory that the choice meets; that of the latency makes no
            difference.
        options: See `SolveOptions`.

    Returns:
        The latency; infinite if nothing meets the budgets.
    """
    search = _Search(architecture, losses, limits or Limits(1.0), table, options)
    return search.reach(search.chains()).least_ms()


def require_limits(
    architecture: Architecture,
    losses: Losses,
    limits: Limits,
    table: CostTable | None,
    options: SolveOptions = DEFAULTS,
    *,
    named: Mapping[str, str] | None = None,
) -> None:
    """Check that some choice meets all budgets, whatever it loses.

    Args:
        architecture: The network.
        losses: The widths to choose from.
        limits: The budgets.
        table: The cost table; needed by a limit of the latency.
        options: See `SolveOptions`.
        named: The budgets as the user gave them, such as "--file-mb 3", by their names in `Limits`.

    Raises:
        InputError: No choice does; the message names the budget, and the least that can be met.
    """
    if architecture.selects and table is not None:
        table.require_selections()
    search = _Search(architecture, losses, limits, table, options)
    obstacle = search.reach(search.chains()).obstacle(named)
    if obstacle is not None:
        raise InputError(obstacle)


class _Search:
    """The search over the widths of the stream, for one network and its budgets."""

    def __init__(
        self,
        architecture: Architecture,
        losses: Losses,
        limits: Limits,
        table: CostTable | None,
        options: SolveOptions,
    ) -> None:
        self.architecture, self.losses, self.limits = architecture, losses, limits
        self.table, self.options = table, options
        self.levels: Levels = token_levels(
            architecture,
            free=options.tokens and bool(losses.tokens),
            more=options.levels,
        )
        self.number_bytes = activation_bytes(table, options.precision)

    def widths(self) -> list[tuple[int, float]]:
        """The widths of the stream and what each loses, the widest first."""
        found = {self.architecture.embed: 0.0, **self.losses.embed}
        return sorted(found.items(), reverse=True)

    def chains(self, chosen: Mapping[str, Option] | None = None) -> list[Chain]:
        """The sub-layers at each width of the stream."""
        precision = weight_precision(self.table, self.options.precision)
        choices = sublayer_choices(self.architecture, self.losses, chosen)
        if self.levels.free and STEM in self.losses.tokens:
            choices = [stem_choices(self.architecture), *choices]
        given = self.architecture, self.losses, choices, self.levels, self.table, precision
        return [chain_of(*given, stream) for stream in self.widths()]

    def run(self, chosen: Mapping[str, Option] | None) -> Solution | None:
        """The best solution over all widths of the stream; None if none is within the budgets."""
        chains = self.chains(chosen)
        bounds = [self._bound(chain) for chain in chains]
        best: Solution | None = None
        for number in np.argsort(bounds, kind="stable"):
            if not math.isfinite(bounds[number]) or (
                best is not None and bounds[number] >= best.loss
            ):
                break
            loss = math.inf if best is None else best.loss
            best = self._solved(chains[number], loss) or best
        if best is not None:
            return best
        # Prices and caps of memory are coarse; where budgets barely can be met, another way does.
        found = self.reach(chains).found()
        return None if found is None else self._solution(*found)

    def reach(self, chains: Sequence[Chain]) -> Reach:
        """What these widths of the stream can reach at least."""
        return Reach(chains, self.table, self.limits, self.number_bytes)

    def _bound(self, chain: Chain) -> float:
        """A loss that no solution at this width falls below."""
        budget, most = (
            chain.left_ms(self.limits.latency_ms, self.table),
            self._most_bytes(chain, 0.0),
        )
        bounds = [0.0]
        if budget is not None:
            bounds.append(lower_bound(chain.stages(chain.times), budget))
        if math.isfinite(most):
            bounds.append(lower_bound(chain.stages(chain.bytes), most))
        return chain.stream_loss + max(bounds)

    def _most_bytes(self, chain: Chain, activations: float) -> float:
        """What the weights of the sub-layers may take beside so many bytes of activations."""
        limits, most = self.limits, math.inf
        if limits.file_mb is not None:
            most = limits.file_mb * MB
        if limits.peak_memory_mb is not None:
            most = min(most, limits.peak_memory_mb * MB - activations)
        return most - chain.ends_bytes

    def _solved(self, chain: Chain, best: float) -> Solution | None:
        """The solution at a width of the stream; None if none is better than the loss `best`."""
        each = self.number_bytes
        caps: list[float] = [math.inf]
        if self.limits.peak_memory_mb is not None:
            caps = np.linspace(chain.caps[-1], chain.caps[0], MEMORY_CAPS).tolist()
        found: tuple[Plan, float] | None = None
        for cap in caps:
            most = self._most_bytes(chain, each * cap if math.isfinite(cap) else 0.0)
            plan = self._within(chain, most, cap, quickly=len(caps) > 1)
            if plan is not None and (found is None or plan.loss < found[0].loss):
                found = plan, cap
        if found is None or found[0].loss + chain.stream_loss >= best:
            return None
        if len(caps) > 1:
            most = self._most_bytes(chain, each * found[1])
            plan = self._within(chain, most, found[1], quickly=False)
            if plan is not None and plan.loss < found[0].loss:
                found = plan, found[1]
        return self._solution(chain, found[0])

    def _within(
        self, chain: Chain, most_bytes: float, most_peak: float, *, quickly: bool
    ) -> Plan | None:
        """The least loss within the latency, so many bytes, and so many numbers in memory."""
        budget, bins = chain.left_ms(self.limits.latency_ms, self.table), self.options.bins
        if budget is None:
            stages = chain.stages(chain.bytes, most_peak)
            if quickly:
                return solve_quickly(stages, most_bytes)
            return solve_stages(stages, most_bytes, bins)
        stages = chain.stages(chain.times, most_peak)
        plan = solve_quickly(stages, budget) if quickly else solve_stages(stages, budget, bins)
        if plan is None or total(chain.bytes, plan) <= most_bytes:
            return plan
        return self._priced_bytes(chain, stages, budget, most_bytes, quickly=quickly)

    def _priced_bytes(
        self,
        chain: Chain,
        stages: Sequence[Stage],
        budget: float,
        most_bytes: float,
        *,
        quickly: bool,
    ) -> Plan | None:
        """The least loss within the latency at the lowest price per byte that meets the limit."""
        finite = [stage.losses[np.isfinite(stage.losses)].max(initial=0.0) for stage in stages]
        low, high = 0.0, max([1e-30, *map(float, finite)]) / max(most_bytes, 1.0)
        best: Plan | None = None
        for _ in range(BYTE_PRICES):
            price = high if best is None else 0.5 * (low + high)
            plan = solve_quickly(_taxed(stages, chain.bytes, price), budget)
            if plan is not None and total(chain.bytes, plan) <= most_bytes:
                best, high = plan_of(stages, plan.choices), price
            elif best is None:
                low, high = high, 8.0 * high
            else:
                low = price
        if best is None or quickly:
            return best
        plan = solve_stages(_taxed(stages, chain.bytes, high), budget, self.options.bins)
        if plan is None or total(chain.bytes, plan) > most_bytes:
            return best
        return min(best, plan_of(stages, plan.choices), key=lambda each: each.loss)

    def _solution(self, chain: Chain, plan: Plan) -> Solution:
        options, counts = {}, list(self.architecture.step_tokens(last_queries=False))
        embedded = self.architecture.tokens
        loss, latency = 0.0, 0.0
        rows = zip(chain.choices, chain.grids, chain.times, plan.choices, strict=True)
        for choices, grid, times, (pair, option) in rows:
            error = float(choices.losses[option])
            time = float(times[pair, option])
            loss += error + float(grid.leaving[pair, 0])
            latency += time
            if choices.embeds:
                embedded = int(grid.computed[pair, 0])
                continue
            if choices.selection is not None:
                continue
            counts[choices.step] = int(grid.computed[pair, 0])
            if choices.name in self.losses.sublayers:
                options[choices.name] = Option(choices.widths[option], error, time)
        size = total(chain.bytes, plan) + chain.ends_bytes
        table = self.table
        return Solution(
            options=options,
            stem_tokens=embedded,
            counts=tuple(np.minimum.accumulate([embedded, *counts]).tolist()[1:]),
            embed=chain.embed,
            latency_ms=None if table is None else table.corrected_ms(latency + chain.ends_ms),
            loss=loss + chain.stream_loss,
            stream_loss=chain.stream_loss,
            file_bytes=size,
            losses=self.losses,
        )


def _taxed(stages: Sequence[Stage], amounts: Sequence[Numbers], price: float) -> list[Stage]:
    """The stages with a price for another amount in their losses."""
    rows = zip(stages, amounts, strict=True)
    return [replace(stage, losses=stage.losses + price * amount) for stage, amount in rows]
