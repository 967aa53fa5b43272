"""The costs of a table by nonnegative least squares, and the choice of what to measure next.

Errors are relative, so each network counts alike. The tile is the one with the least error of
points that were left out of the fit, one at a time. The next points are those that the fit is least
sure of: a large leverage, near points with large residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cost_parts import PARTS, NetworkShape, Numbers
from .cost_parts import network_parts as parts_of
from .cost_table import Correction, CostTable, Errors, MeasuredNetwork

# Ridge of the leverage, as a share of the largest diagonal entry; neighbours whose residuals count.
RIDGE, NEIGHBOURS = 1e-6, 3


@dataclass(frozen=True)
class Fit:
    """Costs fitted to measured networks.

    Attributes:
        tile: Columns that the kernels compute at once.
        costs_ms: Milliseconds per unit of each of `PARTS`, (parts,).
        points: The networks of the fit.
        residuals: Relative error of each, (points,).
    """

    tile: int
    costs_ms: Numbers
    points: tuple[MeasuredNetwork, ...]
    residuals: Numbers

    @property
    def costs(self) -> dict[str, float]:
        """The costs by the name of the part; those that are 0 are left out."""
        pairs = zip(PARTS, self.costs_ms.tolist(), strict=True)
        return {part: cost for part, cost in pairs if cost > 0}

    def predict(self, networks: Sequence[NetworkShape]) -> Numbers:
        """The latency of networks in milliseconds, (networks,), without a correction."""
        rows = np.stack([parts_of(network, self.tile) for network in networks])
        return np.asarray(rows @ self.costs_ms)

    def errors(self, points: Sequence[MeasuredNetwork]) -> Errors | None:
        """The errors of the prediction of these points; None without any."""
        if not points:
            return None
        measured = [point.latency_ms for point in points]
        return Errors.of(self.predict([point.network for point in points]), measured)


def fit_costs(points: Sequence[MeasuredNetwork], tiles: Sequence[int]) -> Fit:
    """Fit the costs of the parts to measured networks.

    Args:
        points: The networks; those of another role than "fit" do not count.
        tiles: The tiles to choose from; the processor's vectors and multiples of them.

    Returns:
        The fit with the tile of least error of left-out points.
    """
    used = tuple(point for point in points if point.role == "fit")
    best: tuple[float, Fit] | None = None
    for tile in tiles:
        rows = relative_rows(used, tile)
        costs = nonnegative_least_squares(rows, np.ones(len(used)))
        residuals = rows @ costs - 1
        # Leaving a point out of a least-squares fit divides its residual by 1 - leverage.
        free = rows[:, costs > 0]
        scaled = free / np.maximum(np.linalg.norm(free, axis=0), 1e-300)
        inside = np.einsum("ij,ij->i", scaled @ np.linalg.pinv(scaled.T @ scaled), scaled)
        left_out = residuals / np.maximum(1 - inside, 0.05)
        score = float(np.abs(left_out).mean())
        if best is None or score < best[0] * (1 - 1e-6):
            best = score, Fit(tile, costs, used, residuals)
    assert best is not None
    return best[1]


def refitted(table: CostTable, measured: Sequence[tuple[NetworkShape, float]]) -> CostTable:
    """The table with costs that networks measured since have changed.

    The points of the table are stated at the speed that these networks show together, and each of
    these counts as much as all points: the network that is searched is near one of them.

    Args:
        table: The table; without points it stays as it is.
        measured: Networks and their latencies in milliseconds.
    """
    points = [
        point.model_copy(update={"role": "fit"})
        for point in table.points
        if point.role in ("fit", "solved")
    ]
    if not points or not measured:
        return table
    parts = [(network, table.parts_ms(latency_ms)) for network, latency_ms in measured]
    if min(rest for _, rest in parts) <= 0:
        return table
    ratios = [rest / table.sum_ms(network) for network, rest in parts]
    speed = float(np.exp(np.mean(np.log(ratios))))
    scaled = [point.model_copy(update={"latency_ms": speed * point.latency_ms}) for point in points]
    new = [
        MeasuredNetwork(network=network, latency_ms=rest) for network, rest in parts for _ in points
    ]
    return table.with_costs(fit_costs([*scaled, *new], [table.tile]).costs)


def relative_rows(points: Sequence[MeasuredNetwork], tile: int) -> Numbers:
    """The amounts of the parts of each network over its latency, (points, parts)."""
    return np.stack([parts_of(point.network, tile) / point.latency_ms for point in points])


def least_sure(fit: Fit, pool: Sequence[NetworkShape], count: int) -> list[int]:
    """Choose what to measure next, each choice given the ones before it.

    Args:
        fit: The present fit.
        pool: The networks to choose from.
        count: How many.

    Returns:
        Indices of the pool: the networks of largest leverage times the residual around them.
    """
    rows = np.stack([parts_of(network, fit.tile) for network in pool])
    rows = rows / np.maximum(rows @ fit.costs_ms, 1e-9)[:, None]
    known = relative_rows(fit.points, fit.tile)
    lengths = np.maximum(np.linalg.norm(np.concatenate([known, rows]), axis=0), 1e-300)
    rows, known = rows / lengths, known / lengths
    information = known.T @ known
    information += RIDGE * information.diagonal().max() * np.eye(len(PARTS))
    spread = _spread(rows, known, fit.residuals)
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        leverage = np.einsum("ij,ij->i", np.linalg.solve(information, rows.T).T, rows)
        score = leverage * spread
        score[chosen] = -1.0
        place = int(score.argmax())
        chosen.append(place)
        information += np.outer(rows[place], rows[place])
    return chosen


def _spread(rows: Numbers, known: Numbers, residuals: Numbers) -> Numbers:
    """The mean square of the residuals of the nearest known points, (rows,), around 1."""
    distances = np.square(rows[:, None] - known[None]).sum(axis=2)
    near = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]
    squares = np.square(residuals)
    level = max(float(squares.mean()), 1e-12)
    return np.asarray(0.5 + squares[near].mean(axis=1) / level)


def fit_correction(predicted: Numbers, measured: Numbers) -> tuple[Correction, Numbers]:
    """Fit what whole networks take beside the sum of their parts.

    Args:
        predicted: The sums of the parts in milliseconds, (networks,).
        measured: The latencies in milliseconds, (networks,).

    Returns:
        scale and offset of least relative squares, and the latency of each network by the
        correction of the others, (networks,).
    """
    found = _line(predicted, measured)
    others = [
        _line(np.delete(predicted, place), np.delete(measured, place))
        for place in range(len(predicted))
    ]
    corrected = [
        other.scale * value + other.offset_ms
        for other, value in zip(others, predicted.tolist(), strict=True)
    ]
    return found, np.array(corrected, dtype=np.float64)


def _line(predicted: Numbers, measured: Numbers) -> Correction:
    rows = np.stack([predicted, np.ones(len(predicted))], axis=1) / measured[:, None]
    scale, offset = np.linalg.lstsq(rows, np.ones(len(measured)), rcond=None)[0].tolist()
    # Latencies that hardly differ do not determine two numbers.
    if len(predicted) < 3 or scale <= 0:
        return Correction(scale=float((measured / predicted).mean()) if len(predicted) else 1.0)
    return Correction(scale=scale, offset_ms=offset)


def nonnegative_least_squares(matrix: Numbers, wanted: Numbers) -> Numbers:
    """Return the x ≥ 0 that minimises ‖matrix · x − wanted‖.

    References:
        Lawson and Hanson 1974, "Solving Least Squares Problems", chapter 23.
    """
    # Columns of equal length give the stopping rule the same meaning for all.
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1.0
    scaled = matrix / lengths
    count = scaled.shape[1]
    free = np.zeros(count, dtype=bool)
    solution = np.zeros(count)
    for _ in range(10 * count):
        slope = scaled.T @ (wanted - scaled @ solution)
        slope[free] = -np.inf
        if free.all() or slope.max() <= 1e-10:
            break
        free[int(slope.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(scaled[:, free], wanted, rcond=None)[0]
            bad = free & (trial <= 0)
            if not bad.any():
                solution = trial
                break
            step = float((solution[bad] / (solution[bad] - trial[bad])).min())
            solution = solution + step * (trial - solution)
            free &= solution > 1e-12
            solution[~free] = 0.0
    return np.asarray(solution / lengths)
