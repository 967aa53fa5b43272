"""Which widths to keep: the least predicted error for a budget, over all sub-layers at once.

Errors add up over sub-layers, and so do costs; the cost of an attention depends on its heads, its
qk and its v width jointly. Each sub-layer takes the option with the least error + λ cost, and λ is
found by bisection; what then remains of the budget goes to the upgrades that gain most per cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...core.errors import InputError
from ..network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..network.count import branch_macs, branch_tokens, count_macs, count_params
from ..network.modules.branch import Branch
from .error_curves import Curve

# Cost of a sub-layer: its spec, the width of the stream, tokens that it reads and computes.
Cost = Callable[[BranchSpec, int, int, int], float]
BISECTIONS = 60


@dataclass(frozen=True)
class Option:
    """One choice of widths for a sub-layer: {dimension: width}, its error and its cost."""

    widths: Mapping[str, int]
    error: float
    cost: float

    @property
    def removes(self) -> bool:
        """Whether nothing of the sub-layer remains but a constant."""
        return self.widths.get("ffn") == 0 or self.widths.get("head") == 0


def params_cost(branch: BranchSpec, embed: int, tokens: int, queries: int) -> float:
    """Count the parameters of a sub-layer.

    Args:
        branch: The sub-layer.
        embed: Channels of the residual stream.
        tokens: Unused; costs of all kinds have the same arguments.
        queries: Unused.

    Returns:
        The number of learnable numbers.
    """
    del tokens, queries
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Branch(branch, embed).parameters())


def macs_cost(branch: BranchSpec, embed: int, tokens: int, queries: int) -> float:
    """Count the multiply-adds of a sub-layer for one image.

    Args:
        branch: The sub-layer.
        embed: Channels of the residual stream.
        tokens: Tokens that it reads.
        queries: Tokens that it computes.

    Returns:
        The number of multiply-adds.
    """
    return branch_macs(branch, embed, tokens, queries)


def options(
    spec: BranchSpec,
    curves: Sequence[Curve],
    weight: float,
    cost: Callable[[BranchSpec], float],
    absorbed: float | None = None,
) -> list[Option]:
    """All combinations of the widths of one sub-layer that no other one beats in error and cost.

    Args:
        spec: The dense sub-layer.
        curves: Its error curves.
        weight: What one unit of squared error at its depth costs (see `sensitivity`).
        cost: The cost of a sub-layer.
        absorbed: The squared error of removing it as a whole where the sub-layer before it takes
            over its linear part. None: it leaves a constant.

    Returns:
        The Pareto front, from the dense sub-layer to the cheapest option.
    """
    found = []
    for places in itertools.product(*(range(len(curve.widths)) for curve in curves)):
        widths = {
            curve.dimension: curve.widths[place]
            for curve, place in zip(curves, places, strict=True)
        }
        error = sum(curve.errors[place] for curve, place in zip(curves, places, strict=True))
        narrow = resized_spec(spec, widths)
        if narrow is None and absorbed is not None:
            error = min(error, absorbed)
        found.append(Option(widths, weight * error, 0.0 if narrow is None else cost(narrow)))
    found.sort(key=lambda option: (option.cost, option.error))
    front: list[Option] = []
    for option in found:
        if not front or option.error < front[-1].error:
            front.append(option)
    return front[::-1]


def resized_spec(spec: BranchSpec, widths: Mapping[str, int]) -> BranchSpec | None:
    """The sub-layer with other widths; None if nothing of it remains."""
    core = spec.core
    if isinstance(core, FfnSpec):
        hidden = widths.get("ffn", core.hidden)
        if hidden == 0:
            return None
        norm = core.norm and core.norm.model_copy(update={"width": hidden})
        return spec.model_copy(
            update={"core": core.model_copy(update={"hidden": hidden, "norm": norm})}
        )
    assert isinstance(core, AttentionSpec)
    heads, qk, v = (
        widths.get(name, size)
        for name, size in (("head", core.heads), ("qk", core.qk), ("v", core.v))
    )
    if heads == 0:
        return None
    sizes = {"q_norm": qk, "k_norm": qk, "head_norm": v, "out_norm": heads * v}
    update: dict[str, object] = {"heads": heads, "qk": qk, "v": v}
    for name, size in sizes.items():
        norm = getattr(core, name)
        update[name] = norm and norm.model_copy(update={"width": size})
    # Which key heads remain depends on the heads chosen; the first ones stand for them here.
    update["kv_of"] = core.kv_of and _compressed(core.kv_of[:heads])
    return spec.model_copy(update={"core": core.model_copy(update=update)})


def _compressed(owners: tuple[int, ...]) -> tuple[int, ...]:
    names = sorted(set(owners))
    return tuple(names.index(owner) for owner in owners)


def allocate(choices: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Choose one option per sub-layer: least total error with a total cost of at most `budget`.

    Args:
        choices: The Pareto front of each sub-layer, from `options`.
        budget: The cost that all of them may have together.

    Returns:
        {sub-layer: option}.

    Raises:
        InputError: Even the cheapest options cost more.
    """
    least = sum(front[-1].cost for front in choices.values())
    if least > budget:
        raise InputError(
            f"the budget leaves {budget:.4g} for the sub-layers, and the smallest network that "
            f"can be cut needs {least:.4g}; give a larger budget"
        )
    low, high = 0.0, 1.0
    while _cost(_chosen(choices, high)) > budget:
        high *= 4.0
        if high > 1e30:
            break
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5 if low > 0 else high / 4.0
        if _cost(_chosen(choices, price)) > budget:
            low = price
        else:
            high = price
    return _filled(choices, _chosen(choices, high), budget)


def _chosen(choices: Mapping[str, Sequence[Option]], price: float) -> dict[str, Option]:
    return {
        name: min(front, key=lambda option: option.error + price * option.cost)
        for name, front in choices.items()
    }


def _cost(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def _filled(
    choices: Mapping[str, Sequence[Option]], chosen: dict[str, Option], budget: float
) -> dict[str, Option]:
    """Spend what the bisection left over on the upgrades that gain most per cost."""
    chosen = dict(chosen)
    while True:
        room = budget - _cost(chosen)
        best: tuple[float, str, Option] | None = None
        for name, front in choices.items():
            now = chosen[name]
            for option in front:
                extra, gain = option.cost - now.cost, now.error - option.error
                if gain > 0 and 0 < extra <= room and (best is None or gain / extra > best[0]):
                    best = (gain / extra, name, option)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def branch_costs(
    architecture: Architecture, cost: Cost, gone: Collection[str] = ()
) -> dict[str, Callable[[BranchSpec], float]]:
    """The cost function of each sub-layer, at the number of tokens that it computes.

    Args:
        architecture: The dense network.
        cost: The cost of a sub-layer.
        gone: Sub-layers that are removed. Behind the last attention only the tokens that the head
            reads are computed, so its removal makes others cheaper.

    Returns:
        {sub-layer: cost of its spec}, without those that are removed.
    """

    def at(tokens: int, queries: int) -> Callable[[BranchSpec], float]:
        return lambda spec: cost(spec, architecture.embed, tokens, queries)

    return {
        branch.name: at(tokens, queries)
        for branch, tokens, queries in branch_tokens(architecture, gone)
    }


def smallest_cost(architecture: Architecture, kind: str) -> float:
    """Parameters or multiply-adds of what is never cut: the stem and the head."""
    price = params_cost if kind == "params" else macs_cost
    costs = branch_costs(architecture, price)
    specs = {branch.name: branch for branch in architecture.branches}
    return network_cost(architecture, kind) - sum(cost(specs[name]) for name, cost in costs.items())


def network_cost(architecture: Architecture, kind: str) -> int:
    """Parameters or multiply-adds of a network."""
    return count_params(architecture) if kind == "params" else count_macs(architecture)
