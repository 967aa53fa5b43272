"""Which weights of the matrices become zero: by magnitude, or at random as a comparison.

The units are single weights, or whole rows or columns. Every choice removes as many units as hold
at most the wanted share of weights; single weights hit it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture, AttentionSpec, FfnSpec

Granularity = Literal["weight", "row", "column"]
Ranking = Literal["global", "layerwise", "random", "shuffled"]
WeightScope = Literal["all", "attention", "ffn"]
LEAVES = {"attention": ("q", "k", "v", "gate", "out"), "ffn": ("fc1", "gate", "fc2")}


@dataclass(frozen=True)
class WeightOptions:
    """How weights are chosen, as for `WeightMask.from_magnitude`.

    Attributes:
        sparsity: The share of the weights in scope that become zero.
        granularity: What becomes zero as a whole.
        ranking: What is ranked against each other.
        scope: The matrices.
        seed: For the random rankings.

    Raises:
        InputError: An unknown word, or a share out of range.
    """

    sparsity: float
    granularity: Granularity = "weight"
    ranking: Ranking = "global"
    scope: WeightScope = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise InputError(f"sparsity = {self.sparsity}: give a share between 0 and 1, e.g. 0.9")
        for name, known in (
            ("granularity", get_args(Granularity)),
            ("ranking", get_args(Ranking)),
            ("scope", get_args(WeightScope)),
        ):
            found = getattr(self, name)
            if found not in known:
                raise InputError(f"{name} = {found!r}: choose one of {', '.join(known)}")

    def note(self) -> dict[str, str]:
        """The options as texts."""
        names = ("sparsity", "granularity", "ranking", "scope", "seed")
        return {name: str(getattr(self, name)) for name in names}


@dataclass
class _Matrix:
    """The units of one matrix.

    Attributes:
        name: Its parameter.
        kept: Booleans in its shape, before this choice.
        scores: (units,), lowest removed first.
        costs: (units,), the weights that each unit has left; 0: it is gone already.
        granularity: What a unit is.
    """

    name: str
    kept: Tensor
    scores: Tensor
    costs: Tensor
    granularity: Granularity

    @property
    def alive(self) -> Tensor:
        """The indices of the units that have weights left."""
        return torch.nonzero(self.costs).flatten()

    def without(self, units: Tensor) -> Tensor:
        """The entry of the mask after units are removed."""
        kept = self.kept.clone()
        if self.granularity == "weight":
            kept.view(-1)[units] = False
        elif self.granularity == "row":
            kept[units] = False
        else:
            kept[:, units] = False
        return kept


def matrix_names(architecture: Architecture, scope: WeightScope) -> list[str]:
    """The parameters of a scope, in the order of the network.

    Raises:
        InputError: The network has none.
    """
    found = []
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            core = branch.core
            kind = "attention" if isinstance(core, AttentionSpec) else "ffn"
            if not isinstance(core, AttentionSpec | FfnSpec) or scope not in ("all", kind):
                continue
            leaves = [leaf for leaf in LEAVES[kind] if leaf != "gate" or core.gated]
            found += [f"steps.{number}.{position}.core.{leaf}.weight" for leaf in leaves]
    if not found:
        raise InputError(f"scope = {scope!r}: this network has no such sub-layer")
    return found


def kept_weights(
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    options: WeightOptions,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Choose the weights to keep.

    Args:
        architecture: The network.
        weights: Its parameters by name.
        options: How they are chosen.
        within: Earlier entries, whose zeros stay zero.

    Returns:
        Booleans by parameter, for each matrix of the scope.

    Raises:
        InputError: The earlier entries have more zeros than `options.sparsity`.
    """
    names = matrix_names(architecture, options.scope)
    matrices = [
        _matrix(name, weights[name], (within or {}).get(name), options.granularity)
        for name in names
    ]
    total = sum(matrix.kept.numel() for matrix in matrices)
    zeros = total - sum(int(matrix.costs.sum()) for matrix in matrices)
    budget = round(options.sparsity * total) - zeros
    if budget < 0:
        raise InputError(
            f"sparsity = {options.sparsity}: {zeros} of {total} weights are zero already, a share "
            f"of {zeros / total:.4f}; give a larger sparsity"
        )
    if options.ranking == "layerwise":
        gone = [_lowest([matrix], _own_budget(matrix, options.sparsity))[0] for matrix in matrices]
    else:
        gone = _lowest(matrices, budget)
    if options.ranking in ("random", "shuffled"):
        gone = _drawn(matrices, [len(units) for units in gone], options)
    return {
        matrix.name: matrix.without(units) for matrix, units in zip(matrices, gone, strict=True)
    }


def round_sparsities(sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each of several rounds that remove equal shares of what is left."""
    kept = 1.0 - sparsity
    return [1.0 - kept ** (number / rounds) for number in range(1, rounds)] + [sparsity]


def _matrix(name: str, weight: Tensor, kept: Tensor | None, granularity: Granularity) -> _Matrix:
    weight = weight.detach().float().cpu()
    keep = torch.ones(weight.shape, dtype=torch.bool) if kept is None else kept.cpu()
    if granularity == "weight":
        return _Matrix(name, keep, weight.abs().flatten(), keep.flatten().long(), granularity)
    across = 1 if granularity == "row" else 0
    return _Matrix(name, keep, weight.square().mean(dim=across), keep.sum(dim=across), granularity)


def _own_budget(matrix: _Matrix, sparsity: float) -> int:
    zeros = matrix.kept.numel() - int(matrix.costs.sum())
    return max(0, round(sparsity * matrix.kept.numel()) - zeros)


def _lowest(matrices: Sequence[_Matrix], budget: int) -> list[Tensor]:
    """The units of the lowest scores that together hold at most `budget` weights, by matrix."""
    alive = [matrix.alive for matrix in matrices]
    pairs = list(zip(matrices, alive, strict=True))
    scores = torch.cat([matrix.scores[units] for matrix, units in pairs])
    costs = torch.cat([matrix.costs[units] for matrix, units in pairs])
    order = scores.argsort(stable=True)
    count = int((costs[order].cumsum(0) <= budget).sum())
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[:count]] = True
    parts = chosen.split([len(units) for units in alive])
    return [units[part] for units, part in zip(alive, parts, strict=True)]


def _drawn(
    matrices: Sequence[_Matrix], counts: Sequence[int], options: WeightOptions
) -> list[Tensor]:
    """As many units of each matrix, at random."""
    generator = torch.Generator().manual_seed(options.seed)
    if options.ranking == "shuffled":
        counts = _exchanged(matrices, counts, generator)
    found = []
    for matrix, count in zip(matrices, counts, strict=True):
        alive = matrix.alive
        found.append(alive[torch.randperm(len(alive), generator=generator)[:count]])
    return found


def _exchanged(
    matrices: Sequence[_Matrix], counts: Sequence[int], generator: torch.Generator
) -> list[int]:
    """The counts, which changed places among matrices of equal numbers of equal units.

    A matrix loses no more than it has left; others of its size lose the rest.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place, matrix in enumerate(matrices):
        size = matrix.kept.numel() // len(matrix.scores)
        groups.setdefault((len(matrix.scores), size), []).append(place)
    result = list(counts)
    for places in groups.values():
        order = torch.randperm(len(places), generator=generator).tolist()
        rest = 0
        for place, other in zip(places, order, strict=True):
            left, wanted = len(matrices[place].alive), counts[places[other]]
            result[place] = min(left, wanted)
            rest += wanted - result[place]
        for place in places:
            more = min(rest, len(matrices[place].alive) - result[place])
            result[place], rest = result[place] + more, rest - more
    return result
