"""Control coefficients on the inputs of projections: how much each unit counts, from 0 to 1.

A projection W reads X diag(a) in place of X, so that the coefficients are columns' factors of W and
vanish into it. Units whose coefficients stay below a threshold are removed.

References:
    Zhu, Tang, Han 2021, "Vision Transformer Pruning" (VTP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture, AttentionSpec, Indices
from ..network.axes import Axis, parameter_axes, stream_channels
from ..network.cost import CostKind, live_cost
from .gates import Gates
from .groups import Sharing
from .masked_parameters import Values

# Rows of queries, whose factors act on the products of queries and keys.
_QUERIES = ("core.q.weight", "core.q.bias", "pool.query")


class Coefficients(Gates):
    """A coefficient for every unit of the residual stream, of heads and of FFNs.

    Heads as a whole have none. Neither have the columns of queries that a norm follows, since it
    would undo a factor.

    Args:
        architecture: The network.
        sharing: "residual" or "full".
        fixed: Dimensions that are kept whole (default: none).

    Raises:
        InputError: The sharing is "unshared", whose masks of what is written no projection reads;
            or everything is fixed.
    """

    def __init__(
        self,
        architecture: Architecture,
        sharing: Sharing = "residual",
        fixed: Sequence[str] = (),
    ) -> None:
        if sharing == "unshared":
            raise InputError(
                'sharing = "unshared": control coefficients are on what projections read, and '
                'independent masks are on what they write, too; choose "residual" or "full"'
            )
        cores = [branch.core for branch in architecture.branches]
        normed = any(isinstance(core, AttentionSpec) and core.q_norm is not None for core in cores)
        kept = (*fixed, "head", *(["qk"] if normed else []))
        super().__init__(architecture, sharing, tuple(dict.fromkeys(kept)))

    def project(self) -> None:
        """Return every coefficient to the range from 0 to 1; call it after each step."""
        with torch.no_grad():
            for scores in self.scores:
                scores.clamp_(0.0, 1.0)

    def total(self) -> Tensor:
        """The sum of all coefficients, which sparsity training penalises."""
        return torch.stack([scores.sum() for scores in self.scores]).sum()

    def kept_within(
        self, architecture: Architecture, kind: CostKind, limit: int
    ) -> tuple[list[Tensor], float]:
        """The units above the threshold at which a budget is met.

        Args:
            architecture: The network.
            kind: What the budget is of, "params" or "macs".
            limit: The largest cost; at least that of one unit in every group.

        Returns:
            Booleans of every group, with at least the best unit of each, and the threshold: the
            smallest coefficient that is kept.
        """
        units = [
            group.gather(scores.detach().cpu())
            for group, scores in zip(self.groups, self.scores, strict=True)
        ]
        order = sorted(
            (-float(value), place / len(values), number, unit)
            for number, values in enumerate(units)
            # Of equal coefficients, every group keeps the same share.
            for place, unit in enumerate(values.argsort(descending=True, stable=True).tolist())
            for value in [values[unit]]
        )
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            live = self.counter(self._first(order, units, middle))
            if int(live_cost(architecture, live, kind)) <= limit:
                low = middle
            else:
                high = middle - 1
        threshold = -order[low - 1][0] if low else max(float(values.max()) for values in units)
        return self._first(order, units, low), threshold

    def _first(
        self, order: Sequence[tuple[float, float, int, int]], units: Sequence[Tensor], count: int
    ) -> list[Tensor]:
        """Booleans of the first units of an order, and of the best one of each group."""
        kept = [torch.zeros(group.size, dtype=torch.bool) for group in self.groups]
        best = [(number, int(values.argmax())) for number, values in enumerate(units)]
        for number, unit in [*best, *((number, unit) for *_, number, unit in order[:count])]:
            kept[number][self.groups[number].members[unit]] = True
        return kept

    def _masks(self) -> list[Tensor]:
        return [
            group.spread(group.gather(scores))
            for group, scores in zip(self.groups, self.scores, strict=True)
        ]


def scaled_projections(
    architecture: Architecture, parameters: Mapping[str, Tensor], values: Values
) -> dict[str, Tensor]:
    """The projections with the factors of the units that they read: W diag(a).

    The factor of a query column is on the column itself, so that it acts on its product with k.

    Args:
        architecture: The network.
        parameters: Its parameters by name.
        values: `values(dimension, site)` returns a factor per unit, or None where there is none.

    Returns:
        The changed parameters by name.
    """
    channels = stream_channels(architecture)
    changed: dict[str, Tensor] = {}
    for name, axes in parameter_axes(architecture).items():
        tensor = parameters.get(name)
        if tensor is None:
            continue
        if name.endswith(_QUERIES):
            factors = values("qk", axes[0].site)
            if factors is not None:
                rows = factors.repeat(tensor.shape[0] // len(factors))
                changed[name] = tensor * rows.reshape(-1, *[1] * (tensor.ndim - 1))
                tensor = changed[name]
        if tensor.ndim == 2 and len(axes) == 2 and name.endswith(".weight"):
            columns = _columns(axes[-1], tensor.shape[-1], values, channels)
            if columns is not None:
                changed[name] = tensor * columns
    return changed


def _columns(
    axis: Axis, size: int, values: Values, channels: Mapping[str, Indices | None]
) -> Tensor | None:
    """Factors on the inputs of a projection, (size,), or None."""
    if axis.dimension in ("embed", "embed*2"):
        found, indices = values("embed", axis.site), channels.get(axis.site)
        if found is not None and indices is not None:
            found = found[list(indices)]
    elif axis.dimension == "ffn":
        found = values("ffn", axis.site)
    else:
        found = values("v", axis.site) if axis.dimension == "head*v" else None
    return None if found is None else found.repeat(size // len(found))
