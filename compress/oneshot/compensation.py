"""Refit the remaining output projections, so that the stream follows the dense one.

For each sub-layer of the compact network, in order, with H its inner activations and R the dense
stream after the sub-layer minus the compact stream before it:

    W', b' = argmin ||R - (W' H + b')||² + λ ||W' - W||²

The inputs come from the compact prefix, so that a layer also repairs what earlier ones changed.
The bias is free and unpenalized; λ is a share of the mean variance of H, chosen on held-out images.
The step is no identity: it changes weights, and reports by how much the stream came nearer.

References:
    Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.3.
    Wu et al. 2026, "GRAIL: Post-hoc Compensation by Linear Reconstruction for Compressed Networks".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..masks.mask import StructuredMask
from ..network.architecture import AttentionSpec, FfnSpec
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel, build
from ..surgery.plan import plan
from .error_curves import damped_cholesky
from .saved_state import SavedState, copy_checked, damaged
from .stream import Stream, has_output_projection, output_projection

RIDGES = (1e-6, 1e-3, 0.01, 0.03, 0.1, 0.3)
HELD_OUT = 5  # Every fifth batch selects λ.
# Output channels whose layer scale is smaller are left alone: they hardly write to the stream.
LEAST_SCALE = 1e-6
# Inputs of a projection that are kept, so that the sub-layer does not run again after its refit.
KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Fit:
    """What the refit of one sub-layer achieved, on all calibration images.

    Attributes:
        branch: Name of the sub-layer.
        ridge: The chosen λ, as a share of the mean variance of the inner activations.
        before: Squared error of the stream after the sub-layer, as a share of the variance of what
            the sub-layer should add.
        after: The same after the refit; never larger.
    """

    branch: str
    ridge: float
    before: float
    after: float


def compensate(
    compact: nn.Module,
    dense: nn.Module,
    images: Tensor,
    *,
    mask: StructuredMask | None = None,
    progress: Callable[[Fit], None] | None = None,
) -> tuple[CompactModel, tuple[Fit, ...]]:
    """Change the remaining weights of a pruned network so that its stream follows the dense one.

    Only output projections of attention and feed-forward layers change, and their biases.

    Args:
        compact: What `compact` returned; it is not modified.
        dense: The network that it was cut from (for a cut after `rotate`, either of the two).
        images: Some hundred unlabeled images, (images, channels, height, width), normalized as the
            model expects.
        mask: The mask of the cut; needed only if channels of the residual stream were removed.
        progress: Called after every sub-layer.

    Returns:
        The compensated network, of the same shapes (missing output biases are added), and what
        each refit achieved.

    Raises:
        InputError: The networks do not belong together, or the images do not fit.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    source, result = lift(dense).eval(), with_output_biases(lift(compact)).eval()
    for network in (source, result):
        network.architecture.require_no_selects("compensate")
    channels = kept_channels(source, result, mask)
    fits = refit(result, source, images, channels, SavedFits(), progress)
    return result, fits


@dataclass(frozen=True)
class SavedFits:
    """Where the refits of one cut are saved.

    Attributes:
        state: The folder.
        key: Identifies the cut.
    """

    state: SavedState = field(default_factory=SavedState)
    key: str = ""

    def load(self, branch: Branch) -> Fit | None:
        """Set the projection of a branch to the saved refit; None if there is none."""
        name = self._name(branch)
        found = self.state.load(name)
        if found is None:
            return None
        linear = output_projection(branch)
        path = self.state.path(name)
        copy_checked(path, {"weight": linear.weight, "bias": linear.bias}, found[1])
        try:
            return Fit(**{**found[0], "branch": branch.spec.name})
        except TypeError as error:
            raise damaged(path, str(error)) from None

    def save(self, branch: Branch, fit: Fit) -> None:
        """Save the projection of a branch and its record."""
        linear = output_projection(branch)
        tensors = {"weight": linear.weight, "bias": linear.bias}
        self.state.save(self._name(branch), asdict(fit), tensors)

    def _name(self, branch: Branch) -> str:
        return f"fit-{self.key}-{branch.spec.name}"


def refit(
    result: CompactModel,
    source: CompactModel,
    images: Tensor,
    channels: Tensor | None,
    saved: SavedFits,
    progress: Callable[[Fit], None] | None = None,
) -> tuple[Fit, ...]:
    """Refit the output projections of a cut network in place, one after the other.

    Args:
        result: The cut network, with an output bias everywhere.
        source: The network that it was cut from.
        images: (images, channels, height, width).
        channels: The channels of the source's stream that it has; None for all.
        saved: Refits of an earlier run, which are not computed again.
        progress: Called after every sub-layer.

    Returns:
        What each refit achieved.
    """
    wanted, found = Stream(source, images), Stream(_all_tokens(result), images)
    depths = reproduced_depths(source, found.model)
    fits: list[Fit] = []
    places = _shared_places(source, found.model)
    for number in range(len(found.model.steps)):
        while wanted.position < depths[number]:
            wanted.advance()
        tokens = None if places is None else places[: found.queries or found.batches[0].shape[1]]
        if tokens is not None:
            # Both streams begin with what is carried furthest.
            tokens = tokens[: int((tokens < wanted.batches[0].shape[1]).cumprod(0).sum())]
        target = _Target(wanted, channels, following_constants(found.model, number), tokens)
        inner: list[Tensor] | None = None
        for branch in found.step:
            if not has_output_projection(branch) or branch.post_norm is not None:
                continue
            fit = saved.load(branch)
            if fit is None:
                inner = [] if len(found.step) == 1 else None
                fit = _refit(branch, found, target, inner)
                saved.save(branch, fit)
            fits.append(fit)
            if progress is not None:
                progress(fit)
        found.advance_from(inner or ())
    return tuple(fits)


def with_output_biases(model: CompactModel) -> CompactModel:
    """Return a copy in which every output projection has a bias; new ones are zero."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    steps = []
    for number, step in enumerate(model.architecture.steps):
        row = []
        for position, spec in enumerate(step):
            core = spec.core
            if isinstance(core, AttentionSpec | FfnSpec) and not core.out_bias:
                leaf = "out" if isinstance(core, AttentionSpec) else "fc2"
                name = f"steps.{number}.{position}.core.{leaf}"
                weight = state[f"{name}.weight"]
                state[f"{name}.bias"] = weight.new_zeros(len(weight))
                spec = spec.model_copy(update={"core": core.model_copy(update={"out_bias": True})})
            row.append(spec)
        steps.append(tuple(row))
    return build(model.architecture.model_copy(update={"steps": tuple(steps)}), state)


def _shared_places(source: CompactModel, result: CompactModel) -> Tensor | None:
    """For each token behind the stem of `result` its place in `source`; None if none leaves."""
    if not result.architecture.drops_tokens and not source.architecture.drops_tokens:
        return None
    places = result.architecture.places_in(source.architecture)
    if places is None:
        raise InputError(
            "compensate: tokens leave the dense network itself; give the network before the token "
            "mask"
        )
    return torch.tensor(places)


def _all_tokens(model: CompactModel) -> CompactModel:
    """The same modules, computing every token of the last block."""
    result = copy.copy(model)
    result.architecture = model.architecture.model_copy(update={"last_queries": False})
    return result


def reproduced_depths(source: CompactModel, result: CompactModel) -> list[int]:
    """For each compact step the number of dense steps whose output it should reproduce.

    A dense step that was removed is reproduced by the step before it: its best affine
    approximation goes into that step's output projection. This holds also where the removed step
    left a constant behind.
    """
    place = {
        branch.name: number
        for number, step in enumerate(source.architecture.steps)
        for branch in step
    }
    starts = []
    for step in result.architecture.steps:
        unknown = [branch.name for branch in step if branch.name not in place]
        if unknown:
            raise InputError(
                f"compensate: the dense network has no sub-layer {unknown[0]!r}; give the network "
                "that the compact one was cut from"
            )
        starts.append(min(place[branch.name] for branch in step))
    depths, end = [], len(source.steps)
    for start, step in zip(reversed(starts), reversed(result.architecture.steps), strict=True):
        depths.append(end)
        if any(branch.core.kind != "constant" for branch in step):
            end = start
    return depths[::-1]


def following_constants(model: CompactModel, number: int) -> Tensor:
    """What the steps of constants directly behind step `number` add to the stream: (embed,)."""
    total = next(model.parameters()).new_zeros(1, 1, model.architecture.embed)
    with torch.no_grad():
        for step in cast("Sequence[Sequence[Branch]]", model.steps)[number + 1 :]:
            if any(branch.spec.core.kind != "constant" for branch in step):
                break
            for branch in step:
                total = branch.add(total, branch(total))
    return total[0, 0]


def kept_channels(
    source: CompactModel, result: CompactModel, mask: StructuredMask | None
) -> Tensor | None:
    """The dense channels that the compact stream has; None for all."""
    dense, compact = source.architecture.embed, result.architecture.embed
    if dense == compact:
        return None
    # Without a mask: only channels that nothing reads may be missing.
    channels = plan(source.architecture, mask or StructuredMask({})).channels
    if len(channels) != compact:
        what = "the mask of the cut" if mask is None else "the mask that it was cut by"
        raise InputError(
            f"compensate: the compact network has {compact} of {dense} channels, not "
            f"{len(channels)}; give {what}"
        )
    return channels


class _Gram:
    """Sums for the least squares of R on H, centered when they are read.

    The means of the first batch are subtracted from H and R before they are multiplied: activations
    may have means far above their deviations, which single precision would lose.
    """

    def __init__(self, width: int, outputs: int) -> None:
        self.count = 0
        self.shift: tuple[Tensor, Tensor] | None = None
        self.h, self.r = (torch.zeros(size, dtype=torch.float64) for size in (width, outputs))
        self.hh = torch.zeros(width, width, dtype=torch.float64)
        self.hr = torch.zeros(width, outputs, dtype=torch.float64)
        self.rr = torch.zeros(outputs, dtype=torch.float64)

    def add(self, inner: Tensor, wanted: Tensor) -> None:
        inner, wanted = inner.flatten(0, 1), wanted.flatten(0, 1)
        if self.shift is None:
            self.shift = inner.mean(dim=0), wanted.mean(dim=0)
        inner, wanted = inner - self.shift[0], wanted - self.shift[1]
        self.count += len(inner)
        self.h += inner.sum(dim=0, dtype=torch.float64)
        self.r += wanted.sum(dim=0, dtype=torch.float64)
        self.hh += (inner.T @ inner).double()
        self.hr += (inner.T @ wanted).double()
        self.rr += wanted.square().sum(dim=0, dtype=torch.float64)

    def _moved(self, weight: Tensor) -> Tensor:
        """What a bias changes by when H and R are shifted: (outputs,)."""
        assert self.shift is not None
        return weight @ self.shift[0].double() - self.shift[1].double()

    def __add__(self, other: _Gram) -> _Gram:
        total = _Gram(len(self.h), len(self.r))
        total.count, total.shift = self.count + other.count, self.shift
        for name in ("h", "r", "hh", "hr", "rr"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def centered(self) -> tuple[Tensor, Tensor]:
        """Covariances of H with itself and with R: (width, width), (width, outputs)."""
        n = self.count
        h, r = self.h / n, self.r / n
        return self.hh / n - h[:, None] * h, self.hr / n - h[:, None] * r

    def solve(self, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weight (outputs, width) nearest to `weight` that fits R, and its bias."""
        hh, hr = self.centered()
        factor, penalty = damped_cholesky(hh, ridge)
        fitted = torch.cholesky_solve(hr + penalty * weight.T, factor).T
        return fitted, self.bias(fitted)

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias for a weight."""
        return (self.r - weight @ self.h) / self.count - self._moved(weight)

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error per output channel: (outputs,)."""
        n, bias = self.count, bias + self._moved(weight)
        square = (weight @ (self.hh / n) * weight).sum(dim=1)
        cross = (weight * (self.hr / n).T).sum(dim=1)
        means = bias.square() + 2 * bias * (weight @ self.h - self.r) / n
        return (self.rr / n + square - 2 * cross + means).clamp(min=0)

    def variance(self) -> Tensor:
        """Of R, per output channel: (outputs,)."""
        return (self.rr / self.count - (self.r / self.count).square()).clamp(min=0)


@dataclass(frozen=True)
class _Target:
    """The dense stream that a step should reproduce, without the constants behind the step."""

    stream: Stream
    channels: Tensor | None
    constants: Tensor
    # The places in the dense stream of the first tokens that the step computes; None: all.
    tokens: Tensor | None = None

    def batch(self, number: int) -> Tensor:
        """(batch, tokens, channels of the compact stream)."""
        found = self.stream.batches[number]
        if self.tokens is not None:
            found = found.index_select(1, self.tokens)
        if self.channels is not None:
            found = found.index_select(-1, self.channels)
        return found - self.constants


def _refit(
    branch: Branch,
    found: Stream,
    wanted: _Target,
    kept: list[Tensor] | None,
) -> Fit:
    """Refit one projection; its inputs are appended to `kept` as far as memory is set aside."""
    linear = output_projection(branch)
    fit, held_out = (_Gram(linear.in_features, linear.out_features) for _ in range(2))
    scale = _scale(branch)
    for number, (x, inner, update) in enumerate(found.inner(branch)):
        rest = wanted.batch(number)
        rest = rest - _with_siblings(branch, found, x, number)[:, : rest.shape[1]]
        if branch.writes is not None:
            rest = rest.index_select(-1, branch.writes)
        assert rest.shape[1] <= update.shape[1]
        if kept is not None and (number + 1) * inner.numel() * inner.element_size() <= KEPT_BYTES:
            kept.append(inner)
        part = held_out if number % HELD_OUT == HELD_OUT - 1 else fit
        part.add(inner[:, : rest.shape[1]], rest / scale)
        held_out.shift = fit.shift
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    everything = fit + held_out if held_out.count else fit
    ridge = _best_ridge(fit, held_out, weight) if held_out.count else RIDGES[-2]
    refitted = everything.solve(weight, ridge)
    weights = scale.double().square()
    before = float((everything.error(weight, bias) * weights).sum())
    after = float((everything.error(*refitted) * weights).sum())
    if after < before:
        # Channels that hardly write keep their weights: dividing by their scale would blow them up.
        writing = (_layer_scale(branch, linear).abs() >= LEAST_SCALE)[:, None]
        with torch.no_grad():
            linear.weight.copy_(torch.where(writing, refitted[0].to(linear.weight), linear.weight))
            linear.bias.copy_(torch.where(writing[:, 0], refitted[1].to(linear.bias), linear.bias))
    spread = float((everything.variance() * weights).sum()) or 1.0
    return Fit(branch.spec.name, ridge, before / spread, min(after, before) / spread)


def _best_ridge(fit: _Gram, held_out: _Gram, weight: Tensor) -> float:
    """The ridge whose solution on the one part fits the other part best.

    The error falls and then rises with the ridge, so the search walks down from the middle.
    """
    errors: dict[int, float] = {}

    def error(place: int) -> float:
        if place not in errors:
            solution = fit.solve(weight, RIDGES[place])
            errors[place] = float(held_out.error(*solution).sum())
        return errors[place]

    place = len(RIDGES) // 2
    for step in (-1, 1):
        while 0 <= place + step < len(RIDGES) and error(place + step) < error(place):
            place += step
    return RIDGES[place]


def _with_siblings(branch: Branch, stream: Stream, x: Tensor, number: int) -> Tensor:
    """The stream with the updates of the other branches of the same step."""
    with torch.no_grad():
        whole = stream.batches[number]
        queries = stream.queries
        updates = [(other, other(whole, queries)) for other in stream.step if other is not branch]
        total = x
        for other, y in updates:
            total = other.add(total, y)
    return total


def _layer_scale(branch: Branch, linear: nn.Linear) -> Tensor:
    if branch.layer_scale is None:
        return torch.ones(linear.out_features)
    return branch.layer_scale.detach()


def _scale(branch: Branch) -> Tensor:
    scale = _layer_scale(branch, output_projection(branch))
    return torch.where(scale.abs() < LEAST_SCALE, torch.ones_like(scale), scale)
