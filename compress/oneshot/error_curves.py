"""Predicted error of each width of each sub-layer, in closed form where there is one.

Errors are squared norms of the change of the residual stream, per token, after the best affine
compensation in the sub-layer's output projection.

References:
    Frantar et al. 2022, "Optimal Brain Compression", eq. 3 and 4 (removal with compensation).
    Meng et al. 2024, "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with
    Combinatorial Optimization" (groups of units).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..masks.groups import tied_units
from ..network.architecture import Architecture, AttentionSpec, FfnSpec
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from .rotation import HeadMoments, HeadRotation, head_rotation, key_heads, rotates_qk, rotates_v
from .stream import Activations, Moments, output_projection

# Ridge of the covariances, as a share of their mean variance.
DAMPING = 0.01
# FFN units that are removed between two updates of the inverse covariance.
UNITS_A_STEP = 16
# Images on which the truncation of queries and keys is measured.
MEASURED_IMAGES = 64


@dataclass(frozen=True)
class Curve:
    """Errors of one dimension of one sub-layer.

    Attributes:
        dimension: "ffn", "head", "qk" or "v".
        widths: The numbers of units that may remain, falling; the first is all of them.
        errors: The squared error of the stream per token, for each of `widths`; rising from 0.
        order: The units from the first to remove to the last; for qk and v (heads, columns).
    """

    dimension: str
    widths: tuple[int, ...]
    errors: tuple[float, ...]
    order: Tensor

    def keep(self, width: int) -> Tensor:
        """Booleans of the `width` units that remain, shaped as a mask entry."""
        removed = self.order.shape[-1] - width
        keep = torch.ones(self.order.shape, dtype=torch.bool)
        keep.scatter_(-1, self.order[..., :removed], False)
        return keep[0] if keep.ndim == 2 and bool((keep == keep[0]).all()) else keep


class Statistics:
    """Sums over the calibration images for the curves of one sub-layer, added batch by batch."""

    def __init__(self, branch: Branch) -> None:
        core = branch.spec.core
        self.heads = HeadMoments(core) if isinstance(core, AttentionSpec) else None
        self._units = Moments(core.hidden) if isinstance(core, FfnSpec) else None
        self._samples: list[Activations] = []
        self._images = 0

    def add(self, seen: Activations) -> None:
        """Add one batch."""
        if self._units is not None:
            self._units.add(seen.inner.flatten(0, 1))
        if self.heads is not None:
            self.heads.add(seen)
            if self._images < MEASURED_IMAGES:
                self._samples.append(replace(seen, stream=seen.stream[:0], update=seen.update[:0]))
                self._images += len(seen.inner)

    @property
    def covariance(self) -> Tensor:
        """The covariance of what the output projection reads: (width, width)."""
        moments = self._units if self.heads is None else self.heads.outputs
        assert moments is not None
        return moments.covariance[0]

    @property
    def samples(self) -> Sequence[Activations]:
        """Activations of some images, on which queries and keys are truncated."""
        return self._samples


def rotated_curves(
    architecture: Architecture, branch: Branch, statistics: Statistics, *, round_to: int
) -> tuple[Curve, ...]:
    """Rotate an attention in place, and return the error curves of any sub-layer.

    Args:
        architecture: The network that the branch belongs to.
        branch: An attention or feed-forward sub-layer; its function stays the same.
        statistics: Those of the sub-layer on the dense stream.
        round_to: Widths of qk, v and ffn are multiples of it, or whole.

    Returns:
        A curve per dimension that can be cut.
    """
    spec, core = branch.spec.core, branch.core
    if isinstance(spec, FfnSpec):
        return (_ffn_curve(branch, statistics.covariance, round_to),)
    assert isinstance(spec, AttentionSpec)
    assert isinstance(core, Attention)
    assert statistics.heads is not None
    rotation = head_rotation(core, statistics.heads)
    qk = _qk_curve(architecture, branch, statistics, rotation, round_to)
    rotation.apply(core)
    covariance = rotation.turned_outputs(spec, statistics.covariance)
    found = [_head_curve(branch, covariance)]
    if qk is not None:
        found.append(qk)
    if rotates_v(spec) and spec.v > round_to:
        found.append(_v_curve(branch, covariance, round_to))
    return tuple(found)


def stream_rows(branch: Branch) -> Tensor:
    """The output projection in units of the residual stream: (written channels, inputs)."""
    weight = output_projection(branch).weight.detach().double()
    if branch.layer_scale is not None:
        weight = weight * branch.layer_scale.detach().double()[:, None]
    if branch.post_norm is not None and branch.post_norm.weight is not None:
        # The norm divides by the row's deviation, which is taken from the weights themselves.
        deviation = weight.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
        weight = weight / deviation * branch.post_norm.weight.detach().double()[:, None]
    return weight


def remove_units(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the inputs of a linear layer one by one, least error first.

    Removing input j and refitting the others raises the squared error of the output by
    ||w_j||² / P_jj, with P the inverse covariance (Frantar et al. 2022, eq. 3).

    Args:
        weight: (outputs, inputs).
        covariance: Of the inputs, (inputs, inputs).

    Returns:
        The inputs in order of removal, and the total error after each removal; both (inputs,).
    """
    count = len(covariance)
    weight, inverse = weight.clone(), _inverse(covariance)
    alive = torch.arange(count)
    order, errors, total = [], [], 0.0
    while len(alive):
        # The next removals come from the best candidates, so that P is updated once for several.
        scores = weight.square().sum(dim=0) / inverse.diagonal()
        size = min(max(UNITS_A_STEP, count // 48), len(alive))
        candidates = torch.argsort(scores, stable=True)[: 2 * size]
        chosen, increases = _least(weight[:, candidates], inverse[candidates][:, candidates], size)
        for increase in increases:
            total += increase
            errors.append(total)
        gone = candidates[chosen]
        order.append(alive[gone])
        weight, inverse, rest = _without(weight, inverse, gone)
        alive = alive[rest]
    return torch.cat(order), torch.tensor(errors, dtype=torch.float64)


def _least(weight: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Greedy removal of `count` among a few inputs: their indices, and what each one adds."""
    weight, inverse = weight.clone(), inverse.clone()
    gone = torch.zeros(len(inverse), dtype=torch.bool)
    chosen, increases = [], []
    for _ in range(count):
        scores = weight.square().sum(dim=0) / inverse.diagonal().clamp(min=1e-30)
        scores[gone] = torch.inf
        unit = int(scores.argmin())
        chosen.append(unit)
        increases.append(max(float(scores[unit]), 0.0))
        gone[unit] = True
        row = inverse[unit] / inverse[unit, unit]
        weight -= weight[:, unit : unit + 1] * row
        inverse -= inverse[:, unit : unit + 1] * row
    return torch.tensor(chosen), increases


def remove_heads(weight: Tensor, covariance: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Remove the heads in front of an output projection one by one, least error first.

    Args:
        weight: (outputs, heads * width).
        covariance: Of the concatenated heads, (heads * width, heads * width).
        heads: Their number.

    Returns:
        The heads in order of removal, and the total error after each removal; both (heads,).
    """
    weight, inverse = weight.clone(), _inverse(covariance)
    alive, width = list(range(heads)), len(covariance) // heads
    order, errors, total = [], [], 0.0
    while alive:
        blocks = torch.arange(len(alive) * width).view(-1, width)
        squares = inverse[blocks[:, :, None], blocks[:, None, :]]
        columns = weight[:, blocks].permute(1, 2, 0)
        scores = (torch.linalg.solve(squares, columns) * columns).sum(dim=(1, 2))
        place = int(scores.argmin())
        total += max(float(scores[place]), 0.0)
        order.append(alive.pop(place))
        errors.append(total)
        weight, inverse, _ = _without(weight, inverse, blocks[place])
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)


def _inverse(covariance: Tensor) -> Tensor:
    return torch.cholesky_inverse(damped_cholesky(covariance, DAMPING)[0])


def damped_cholesky(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factor a covariance with a share of its mean diagonal added to the diagonal.

    Few images give a covariance of low rank. Its smallest eigenvalues are rounding errors of the
    sums, which a change of basis may have scaled up to below zero by more than the damping; it then
    grows until the factor exists.

    Args:
        covariance: (width, width), finite.
        damping: The share.

    Returns:
        The factor, (width, width), and what was added to the diagonal.
    """
    added = damping * float(covariance.diagonal().mean()) + 1e-12
    for _ in range(8):
        damped = covariance.clone()
        damped.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        added *= 10
    else:
        # Not finite, or no covariance: the message of the library says which.
        factor = torch.linalg.cholesky(damped)
    return factor, added


def _without(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove inputs: the refitted weight, the others' inverse covariance, and their indices."""
    kept = torch.ones(len(inverse), dtype=torch.bool)
    kept[gone] = False
    rest = torch.nonzero(kept).flatten()
    if not len(rest):
        return weight[:, rest], inverse[rest][:, rest], rest
    cross = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, rest])
    inner = inverse[rest]
    return weight[:, rest] - weight[:, gone] @ cross, inner[:, rest] - inner[:, gone] @ cross, rest


def _ffn_curve(branch: Branch, covariance: Tensor, round_to: int) -> Curve:
    spec = branch.spec.core
    assert isinstance(spec, FfnSpec)
    order, errors = remove_units(stream_rows(branch), covariance)
    widths = _multiples(spec.hidden, round_to, least=0)
    return Curve("ffn", widths, _at(errors, spec.hidden, widths), order)


def _head_curve(branch: Branch, covariance: Tensor) -> Curve:
    spec = branch.spec.core
    assert isinstance(spec, AttentionSpec)
    order, errors = remove_heads(stream_rows(branch), covariance, spec.heads)
    widths = tuple(range(spec.heads, -1, -1))
    return Curve("head", widths, _at(errors, spec.heads, widths), order)


def _v_curve(branch: Branch, covariance: Tensor, round_to: int) -> Curve:
    """After `rotate` the columns of values are uncorrelated, and ordered by their error."""
    spec = branch.spec.core
    assert isinstance(spec, AttentionSpec)
    each = covariance.diagonal() * stream_rows(branch).square().sum(dim=0)
    tail = each.view(spec.heads, spec.v).sum(dim=0).flip(0).cumsum(dim=0)
    order = torch.arange(spec.v - 1, -1, -1).repeat(spec.heads, 1)
    widths = _multiples(spec.v, round_to, least=round_to)
    return Curve("v", widths, _at(tail, spec.v, widths), order)


def _qk_curve(
    architecture: Architecture,
    branch: Branch,
    statistics: Statistics,
    rotation: HeadRotation,
    round_to: int,
) -> Curve | None:
    """The measured change of the attention's output, since the softmax has no closed form.

    None if the columns are too few to remove any.
    """
    core, spec = branch.core, branch.spec.core
    assert isinstance(core, Attention)
    assert isinstance(spec, AttentionSpec)
    assert statistics.heads is not None
    if spec.qk <= round_to:
        return None
    order = _qk_order(architecture, branch, statistics.heads)
    # Rope turns pairs of columns, so an odd width is not possible.
    pair = tied_units(architecture, "qk", branch.spec.name).shape[1]
    step = -(-round_to // pair) * pair
    # Where norms act on the columns, a narrow head is not what the truncation shows.
    least = step if rotates_qk(spec) else max(step, spec.qk // 2)
    widths = _multiples(spec.qk, step, least=least)
    totals = torch.zeros(len(widths), dtype=torch.float64)
    rows, scale = 0, stream_rows(branch)
    for seen in statistics.samples:
        assert seen.qkv is not None
        q, k = rotation.turned(spec, *seen.qkv[:2])
        for number, width in enumerate(widths[1:], start=1):
            change = _truncated(core, (q, k, seen.qkv[2]), order, width)
            if seen.gate is not None:
                change = change * seen.gate
            totals[number] += _squared((change - seen.inner).flatten(0, 1), scale)
        rows += seen.inner.shape[0] * seen.inner.shape[1]
    return Curve("qk", widths, tuple((totals / rows).tolist()), order)


def _truncated(
    core: Attention, qkv: tuple[Tensor, Tensor, Tensor], order: Tensor, width: int
) -> Tensor:
    """Concatenated head outputs with the last `width` columns of `order` only, before any gate."""
    q, k, v = qkv
    columns = order[:, order.shape[1] - width :]
    each = columns.repeat_interleave(q.shape[1] // len(columns), dim=0)
    # Queries may be fewer than keys, where tokens leave the stream.
    q, k = (
        x.gather(-1, each[None, :, None, :].expand(x.shape[0], -1, x.shape[2], -1)) for x in (q, k)
    )
    with torch.no_grad():
        y = core.attend(q, k, v)
        if core.head_norm is not None:
            y = core.head_norm(y)
        if core.differential is not None:
            y = y * core.differential.gain
        y = y.transpose(1, 2).flatten(2)
        return y if core.out_norm is None else core.out_norm(y)


def _squared(rows: Tensor, scale: Tensor) -> float:
    return float((rows @ scale.to(rows).T).double().square().sum())


def _qk_order(architecture: Architecture, branch: Branch, moments: HeadMoments) -> Tensor:
    """The columns of each head from the least to the most important: (heads, qk)."""
    spec = branch.spec.core
    assert isinstance(spec, AttentionSpec)
    if rotates_qk(spec):
        return torch.arange(spec.qk - 1, -1, -1).repeat(spec.heads, 1)
    q_squares, k_squares = (
        each.second_moment.diagonal(dim1=1, dim2=2).view(spec.heads, spec.parts, spec.qk)
        for each in (moments.queries, moments.keys)
    )
    # Rope turns pairs of columns, which stay or go as one.
    units = tied_units(architecture, "qk", branch.spec.name)
    scores = (
        q_squares.sum(dim=1)[:, units].sum(-1) * k_squares.sum(dim=1)[:, units].sum(-1)
    ).sqrt()
    if spec.kv_of is not None:
        owners = torch.tensor(key_heads(spec))
        scores = torch.stack([scores[owners == owner].sum(dim=0) for owner in owners])
    return units[scores.argsort(dim=1, stable=True)].flatten(1)


def _multiples(width: int, round_to: int, *, least: int) -> tuple[int, ...]:
    """The width, and the multiples of `round_to` below it, falling."""
    steps = range((width - 1) // round_to * round_to, least - 1, -round_to)
    return (width, *steps)


def _at(errors: Tensor, size: int, widths: Sequence[int]) -> tuple[float, ...]:
    """The errors after size - width removals."""
    return tuple(0.0 if width == size else float(errors[size - width - 1]) for width in widths)
