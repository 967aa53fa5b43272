"""What is lost when a sub-layer is removed and the one before it takes over its linear part.

The update f of a removed sub-layer is approximated by an affine map of the inner activations h of
the sub-layer before it, f ≈ M h + c, which is added to that sub-layer's output projection: no cost
at run time. The map is fitted by ridge least squares and its error measured on batches that the fit
did not see. The refit in `compensation` makes the replacement; this module predicts its error.

References:
    Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer
    Block Linearization", eq. 3 (a linear map, merged into the preceding projection).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network.modules.branch import Branch
from .error_curves import DAMPING, Curve, damped_cholesky
from .stream import Activations, has_output_projection

# Inner activations that are kept for the sub-layer behind them.
KEPT_BYTES = 128 * 2**20
# Every fourth batch measures the error.
HELD_OUT = 4
# Shares of the preceding sub-layer's units at which the error is computed.
SHARES = (1.0, 0.75, 0.5, 0.25)
Errors = tuple[tuple[int, float], ...]


class Preceding:
    """The inner activations of a sub-layer that can take over the linear part of the next one."""

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.inner: list[Tensor] = []
        self.covariance = torch.empty(0)
        self.curve: Curve | None = None
        self._bytes = 0

    def add(self, seen: Activations) -> None:
        """Keep the first batches, as far as memory is set aside for them."""
        size = seen.inner.numel() * seen.inner.element_size()
        if self._bytes + size <= KEPT_BYTES:
            self.inner.append(seen.inner.flatten(0, 1))
            self._bytes += size

    def finish(self, covariance: Tensor, curves: Sequence[Curve]) -> None:
        """Set the covariance of the inner activations, and the curve that orders the units."""
        self.covariance = covariance
        self.curve = next(curve for curve in curves if curve.dimension in ("ffn", "head"))


def absorbs(step: Sequence[Branch]) -> bool:
    """Whether the step's only sub-layer can take over the linear part of the next step."""
    branch = step[0]
    return (
        len(step) == 1
        and has_output_projection(branch)
        and branch.post_norm is None
        and branch.writes is None
    )


class Absorption:
    """Gathers the update of a sub-layer beside the inner activations of the preceding one."""

    def __init__(self, preceding: Preceding) -> None:
        self.preceding = preceding
        self._number = 0
        self._rows = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []
        self._held_out: list[tuple[Tensor, Tensor]] = []

    def add(self, seen: Activations) -> None:
        """Add one batch; batches arrive in the order in which the preceding sub-layer saw them."""
        number, self._number = self._number, self._number + 1
        if number >= len(self.preceding.inner):
            return
        inner, update = self.preceding.inner[number], seen.update.flatten(0, 1)
        if len(inner) != len(update):
            # Tokens leave here, which is not predicted: `errors` stays empty.
            return
        if number % HELD_OUT == HELD_OUT - 1:
            self._held_out.append((inner, update))
            return
        if self._shift is None:
            # Means far above the deviations would be lost in single precision.
            self._shift = inner.mean(dim=0), update.mean(dim=0)
        inner, update = inner - self._shift[0], update - self._shift[1]
        sums = [inner.sum(dim=0), update.sum(dim=0), inner.T @ update]
        self._rows += len(inner)
        doubles = [each.double() for each in sums]
        old = self._sums or [torch.zeros_like(each) for each in doubles]
        self._sums = [a + b for a, b in zip(old, doubles, strict=True)]

    def errors(self) -> Errors:
        """Squared errors per token, by the number of units that the preceding sub-layer keeps.

        Empty if the images are too few to measure them.
        """
        if self._shift is None or not self._held_out:
            return ()
        curve = self.preceding.curve
        assert curve is not None
        inner_mean, update_mean, products = (each / self._rows for each in self._sums)
        cross = products - inner_mean[:, None] * update_mean
        inner_mean, update_mean = inner_mean + self._shift[0], update_mean + self._shift[1]
        units, found = curve.widths[0], []
        for share in SHARES:
            width = max((each for each in curve.widths if each <= share * units), default=0)
            if width == 0:
                break
            kept = curve.keep(width)
            kept = kept.repeat_interleave(len(cross) // len(kept))
            found.append((width, self._error(kept, inner_mean, update_mean, cross)))
        return tuple(found)

    def _error(self, kept: Tensor, inner_mean: Tensor, update_mean: Tensor, cross: Tensor) -> float:
        factor, _ = damped_cholesky(self.preceding.covariance[kept][:, kept], DAMPING)
        linear = torch.cholesky_solve(cross[kept], factor)
        total, rows = 0.0, 0
        for inner, update in self._held_out:
            near = (inner[:, kept] - inner_mean[kept].to(inner)) @ linear.to(inner)
            total += float((update - update_mean.to(update) - near).double().square().sum())
            rows += len(inner)
        return total / rows


def absorbed_error(errors: Errors, width: int) -> float | None:
    """The error where the preceding sub-layer keeps `width` units; None if not predicted."""
    at = [error for units, error in errors if units <= width]
    return at[0] if at else None
