"""What a network can reach at least: whether its budgets can be met, and which of them cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...targets.cost_table import CostTable
from .chain import EQUAL, Chain, total
from .programme import Plan, solve_quickly
from .solution import Limits

# Caps of the memory of activations that are tried for a choice, and again around the best one.
CAPS = 12
MB = 1e6


@dataclass(frozen=True)
class Lean:
    """A choice of few bytes: all of its weights, and the largest memory with its activations."""

    chain: Chain
    plan: Plan
    weights: float
    peak: float


@dataclass(frozen=True)
class Reach:
    """What can be reached at some widths of the stream.

    Attributes:
        chains: The sub-layers at each width.
        table: The cost table; None without a latency.
        limits: The budgets.
        number_bytes: Bytes of a number of activations, times the images of an inference.
    """

    chains: Sequence[Chain]
    table: CostTable | None
    limits: Limits
    number_bytes: float

    def least_ms(self) -> float:
        """The smallest latency within the other budgets; infinite if nothing meets them."""
        assert self.table is not None
        least = min(self._fastest_ms(), default=math.inf)
        return self.table.corrected_ms(least) if math.isfinite(least) else math.inf

    def found(self) -> tuple[Chain, Plan] | None:
        """Some choice within all budgets; None if there is none."""
        for chain in self.chains:
            lean = self._leanest(chain)
            if lean is not None and self._fits(lean):
                return chain, lean.plan
            fast = self._fastest(chain)
            if fast is not None:
                budget_ms = self._budget_ms(chain)
                if budget_ms is None or total(chain.times, fast) <= budget_ms * (1 + EQUAL):
                    return chain, fast
        return None

    def obstacle(self, named: Mapping[str, str] | None = None) -> str | None:
        """State which budget cannot be met, and the least that can; None if all can at once.

        Args:
            named: The budgets as the user gave them, by their names in `Limits`.
        """
        limits, table = self.limits, self.table
        texts = {**limits.texts(), **(named or {})}
        if limits.latency_ms is not None and table is not None:
            least = replace(self, limits=Limits(limits.latency_ms)).least_ms()
            if least > limits.latency_ms * (1 + EQUAL):
                return (
                    f"{texts['latency_ms']}: the smallest latency that can be reached is "
                    f"{_rounded_up(least)} ms ({table.title}); give a larger budget"
                )
        if self.found() is not None:
            return None
        for name, what in (
            ("file_mb", "weights that can be reached{} are"),
            ("peak_memory_mb", "memory of weights and activations that can be reached{} is"),
        ):
            if getattr(limits, name) is None:
                continue
            alone = replace(self, limits=Limits(limits.latency_ms, **{name: getattr(limits, name)}))
            if alone.found() is None:
                # The latency is the reason where the budget can be met without it.
                free = replace(alone, limits=replace(alone.limits, latency_ms=None))
                within = "" if free.found() is None else f" within {texts['latency_ms']}"
                return (
                    f"{texts[name]}: the smallest {what.format(within)} "
                    f"{_rounded_up(alone.least_bytes(name) / MB)} MB; give a larger budget"
                )
        start = f"{', '.join(texts.values())}: no network meets all of them at once; "
        least = math.inf if table is None or limits.latency_ms is None else self.least_ms()
        if table is None or not math.isfinite(least):
            return f"{start}give larger budgets"
        return (
            f"{start}the smallest latency within the others is {_rounded_up(least)} ms "
            f"({table.title}); give larger budgets"
        )

    def least_bytes(self, name: str) -> float:
        """The fewest bytes within the latency.

        Args:
            name: "file_mb": of the weights; "peak_memory_mb": of weights and activations.
        """
        lean = [each for each in map(self._leanest, self.chains) if each is not None]
        sizes = [each.weights if name == "file_mb" else each.peak for each in lean]
        return min(sizes, default=math.inf)

    def _fits(self, lean: Lean) -> bool:
        limits = self.limits
        pairs = ((lean.weights, limits.file_mb), (lean.peak, limits.peak_memory_mb))
        return all(most is None or size <= most * MB * (1 + EQUAL) for size, most in pairs)

    def _budget_ms(self, chain: Chain) -> float | None:
        """The latency of the sub-layers; None without a limit."""
        return chain.left_ms(self.limits.latency_ms, self.table)

    def _leanest(self, chain: Chain) -> Lean | None:
        """The choice of least memory within the latency, and within the size of a file if any is.

        Without a limit of the memory, that of the fewest bytes.
        """
        if self.limits.peak_memory_mb is None:
            return self._lean(chain, math.inf)
        places = _spread(0, len(chain.caps) - 1, CAPS)
        first = self._leanest_of(chain, places)
        if first is None:
            return None
        number = places.index(first[1])
        near = places[max(0, number - 1)], places[min(len(places) - 1, number + 1)]
        second = self._leanest_of(chain, _spread(*near, CAPS))
        return first[0] if second is None else min(first[0], second[0], key=self._rank)

    def _leanest_of(self, chain: Chain, places: Sequence[int]) -> tuple[Lean, int] | None:
        """The choice of least memory with one of these caps of it, and the place of its cap."""
        pairs = [(self._lean(chain, float(chain.caps[place])), place) for place in places]
        found = [(lean, place) for lean, place in pairs if lean is not None]
        return min(found, key=lambda pair: self._rank(pair[0]), default=None)

    def _rank(self, lean: Lean) -> tuple[bool, float]:
        most = self.limits.file_mb
        return most is not None and lean.weights > most * MB * (1 + EQUAL), lean.peak

    def _lean(self, chain: Chain, cap: float) -> Lean | None:
        """The choice of fewest bytes within the latency and so many numbers in memory."""
        budget_ms = self._budget_ms(chain)
        amounts = chain.bytes if budget_ms is None else chain.times
        most = math.inf if budget_ms is None else budget_ms
        stages = chain.stages(amounts, cap, chain.bytes)
        if not math.isfinite(most):
            # Any choice is within an infinite budget; the losses are the bytes.
            most = sum(float(amount.max(initial=0.0)) for amount in amounts) + 1.0
        plan = solve_quickly(stages, most)
        if plan is None:
            return None
        weights = total(chain.bytes, plan) + chain.ends_bytes
        pairs = zip(chain.peaks, plan.choices, strict=True)
        largest = max((float(peak[choice]) for peak, choice in pairs), default=0.0)
        return Lean(chain, plan, weights, weights + self.number_bytes * largest)

    def _fastest(self, chain: Chain) -> Plan | None:
        """The choice of least time within the size of a file and the memory."""
        best: Plan | None = None
        for most_bytes, cap in self._sizes(chain):
            stages = chain.stages(chain.bytes, cap, chain.times)
            plan = solve_quickly(stages, most_bytes)
            if plan is not None and (best is None or plan.loss < best.loss):
                best = plan
        return best

    def _fastest_ms(self) -> Iterator[float]:
        for chain in self.chains:
            plan = self._fastest(chain)
            if plan is not None:
                yield plan.loss + chain.ends_ms

    def _sizes(self, chain: Chain) -> Iterator[tuple[float, float]]:
        """Pairs of the bytes that sub-layers may have, and the numbers that are in memory."""
        limits = self.limits
        file_bytes = math.inf if limits.file_mb is None else limits.file_mb * MB
        if limits.peak_memory_mb is None:
            caps = [math.inf]
        else:
            caps = chain.caps[_spread(0, len(chain.caps) - 1, CAPS)].tolist()
        for cap in caps:
            most = file_bytes
            if limits.peak_memory_mb is not None:
                most = min(most, limits.peak_memory_mb * MB - self.number_bytes * cap)
            if math.isinf(most):
                most = sum(float(each.max(initial=0.0)) for each in chain.bytes) + chain.ends_bytes
            yield most - chain.ends_bytes, cap


def _spread(low: int, high: int, count: int) -> list[int]:
    """At most `count` places from `low` to `high`, both among them."""
    return sorted({round(place) for place in np.linspace(low, high, count)})


def _rounded_up(value: float) -> str:
    """Four digits, not below the value, so that a budget of it can be met."""
    if not (value > 0 and math.isfinite(value)):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit - EQUAL) * unit:.4g}"
