"""The pass over the images from which cuts of any size start: statistics and error curves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lift import lift
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from .absorption import Absorption, Errors, Preceding, absorbs
from .allocation import Cost
from .budgets import Precision
from .error_curves import Curve, Statistics, rotated_curves
from .saved_state import SavedState, copy_checked, damaged, fingerprint_of
from .sensitivity import WEIGHING_IMAGES, stream_weights, weighing_batch
from .stream import Activations, Stream, check_images, has_output_projection
from .stream_rotation import StreamMoment, stream_obstacle

# Share of the images that is kept for the check at the end.
CHECKED = 0.125
Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrimOptions:
    """How `trim` chooses widths.

    Attributes:
        round_to: Widths of ffn, qk, v and embed are multiples of it (runtimes are fastest at 16).
        patches: Share of the patch tokens in what has to be preserved: 0 for a classifier (the
            default of a network with a head), 1 for dense prediction. None: 0 with a head, 0.5
            without.
        compensate: Refit the output projections after the cut.
        cost: Cost of a sub-layer in any unit, or the `costs_s` of a cost table, with which costs
            are milliseconds. With `kind="cost"` the budget is in that unit; with `macs` or
            `params` it is a share of the dense cost.
        seed: Seed of the random projections.
        precision: Of the weights in a file, for `kind="file"`: "fp32", "fp16" or "int8".
        stream: Whether the residual stream may be rotated and narrowed where that loses least. The
            network's tokens are then in another basis; its outputs are not.
    """

    round_to: int = 16
    patches: float | None = None
    compensate: bool = True
    cost: Cost | Mapping[str, float] | None = None
    seed: int = 0
    precision: Precision = "fp32"
    stream: bool = True


DEFAULTS = TrimOptions()


@dataclass(frozen=True)
class PredictedSubLayer:
    """What is predicted for one sub-layer.

    Attributes:
        weight: The error of the features for one unit of squared error of the stream behind it.
        curves: Its error curves.
        absorber: The sub-layer before it, which can take over its linear part; None if none can.
        absorbed: Squared errors of the removed sub-layer, by the units that the absorber keeps.
    """

    weight: float
    curves: tuple[Curve, ...]
    absorber: str | None = None
    absorbed: Errors = ()


@dataclass(frozen=True)
class Prediction:
    """What a cut of any size starts from: one pass over the images serves all budgets.

    Attributes:
        source: The dense network.
        rotated: The same function with its heads in the basis in which it is cut.
        curves: The prediction for each sub-layer.
        stream: The weighted second moment of what is written to the stream, (embed, embed); None
            if the stream cannot be rotated.
        fitting: The images that the widths and the refit come from.
        checking: The images that were held out for the check.
        options: The options of the pass.
        state: Where finished parts are saved.
    """

    source: CompactModel
    rotated: CompactModel
    curves: Mapping[str, PredictedSubLayer]
    stream: Tensor | None
    fitting: Tensor
    checking: Tensor
    options: TrimOptions
    state: SavedState = field(default_factory=SavedState)


@torch.inference_mode(False)
def predict(
    model: nn.Module,
    images: Tensor,
    *,
    options: TrimOptions = DEFAULTS,
    resume: Path | str | None = None,
    progress: Stage | None = None,
) -> Prediction:
    """Rotate the heads and predict the error of every width, for cuts of any size.

    Args:
        model: A supported Vision Transformer, with or without a head; it is not modified.
        images: Unlabeled images, as for `trim`.
        options: See `TrimOptions`.
        resume: As for `trim`.
        progress: As for `trim`.

    Returns:
        The rotated network with its error curves, for `trim_to`.

    Raises:
        InputError: The images do not fit, or `resume` is the folder of another cut.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    source = lift(model).eval()
    source.architecture.require_no_selects("a cut without training")
    check_images(source, images)
    held_out = max(1, round(CHECKED * len(images))) if len(images) > 1 else 0
    fitting, checking = images[held_out:], images[:held_out] if held_out else images
    report = progress or (lambda name, done, total: None)
    state = SavedState()
    if resume is not None:
        parts = (options.round_to, options.patches, options.seed)
        state = SavedState.open(resume, fingerprint_of(source, images, parts))
    weights = _weights(source, fitting, options, state, report)
    rotated = copy.deepcopy(source)
    stream = None if stream_obstacle(source.architecture) else StreamMoment(source.architecture)
    running = _Pass(rotated, Stream(rotated, fitting), weights, options.round_to, stream, state)
    while not running.stream.finished:
        running.step()
        report("predict", running.stream.position, len(rotated.steps))
    total = None if stream is None else stream.total
    return Prediction(source, rotated, running.found, total, fitting, checking, options, state)


def _weights(
    source: CompactModel, images: Tensor, options: TrimOptions, state: SavedState, report: Stage
) -> list[float]:
    saved = state.load("weights")
    if saved is not None:
        weights = saved[0]
        if not _are_numbers(weights) or len(weights) != len(source.steps) + 1:
            raise damaged(state.path("weights"), "not a number for each depth")
        return list(weights)
    patches = options.patches
    if patches is None:
        patches = 0.0 if source.architecture.head is not None else 0.5
    weighing = images[:WEIGHING_IMAGES]
    total = -(-len(weighing) // weighing_batch(source))
    batches = iter(range(1, total + 1))
    weights = stream_weights(
        source,
        weighing,
        patches=patches,
        seed=options.seed,
        progress=lambda: report("weigh", next(batches), total),
    )
    state.save("weights", weights)
    return weights


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(each, float | int) for each in values)


class _Pass:
    """Runs the dense network step by step and predicts each sub-layer."""

    def __init__(
        self,
        rotated: CompactModel,
        stream: Stream,
        weights: Sequence[float],
        round_to: int,
        moment: StreamMoment | None,
        state: SavedState,
    ) -> None:
        self.rotated, self.stream, self.weights = rotated, stream, weights
        self.round_to, self.moment, self.state = round_to, moment, state
        self.found: dict[str, PredictedSubLayer] = {}
        self._preceding: Preceding | None = None
        if moment is not None:
            moment.add_stem(stream, weights[0])

    def step(self) -> None:
        """Predict the sub-layers of the next step, or load them, and run it."""
        number = self.stream.position
        step = list(self.stream.step)
        branches = [branch for branch in step if has_output_projection(branch)]
        weight, name = self.weights[number + 1], f"predict-{number:04d}"
        saved = self.state.load(name)
        statistics = {branch.spec.name: Statistics(branch) for branch in branches}
        preceding = Preceding(step[0]) if absorbs(step) else None
        absorption = self._absorption(branches if len(step) == 1 else [])
        loaded = saved is not None
        moment = self.moment
        before = None if moment is None else moment.total.clone()
        if moment is not None:
            moment.weight = weight

        def add(branch: Branch, seen: Activations) -> None:
            if not loaded or preceding is not None:
                statistics[branch.spec.name].add(seen)
            if preceding is not None:
                preceding.add(seen)
            if absorption is not None and not loaded:
                absorption.add(seen)
            if moment is not None and not loaded:
                moment.add(branch, seen)

        skips = loaded and self.state.has(f"predict-{number + 1:04d}")
        self.stream.advance(None if skips else add)
        if saved is not None:
            self._restore(name, *saved, branches, weight)
        else:
            for branch in branches:
                rows = rotated_curves(
                    self.rotated.architecture,
                    branch,
                    statistics[branch.spec.name],
                    round_to=self.round_to,
                )
                errors = () if absorption is None else absorption.errors()
                absorber = absorption.preceding.branch.spec.name if absorption and errors else None
                self.found[branch.spec.name] = PredictedSubLayer(weight, rows, absorber, errors)
            added = None if moment is None or before is None else moment.total - before
            self._save(name, branches, added)
        self._preceding = None if skips else preceding
        if self._preceding is not None:
            own = step[0].spec.name
            self._preceding.finish(statistics[own].covariance, self.found[own].curves)

    def _absorption(self, branches: Sequence[Branch]) -> Absorption | None:
        if self._preceding is None or len(branches) != 1 or branches[0].writes is not None:
            return None
        return Absorption(self._preceding)

    def _save(self, name: str, branches: Sequence[Branch], moment: Tensor | None) -> None:
        tensors: dict[str, Tensor] = {} if moment is None else {"moment": moment}
        record = []
        for number, branch in enumerate(branches):
            found = self.found[branch.spec.name]
            curves = []
            for curve in found.curves:
                tensors[f"{number}.{curve.dimension}"] = curve.order
                curves.append([curve.dimension, list(curve.widths), list(curve.errors)])
            record.append(
                {
                    "name": branch.spec.name,
                    "curves": curves,
                    "absorber": found.absorber,
                    "absorbed": [list(pair) for pair in found.absorbed],
                }
            )
            tensors |= {f"{number}/{key}": each for key, each in branch.state_dict().items()}
        self.state.save(name, record, tensors)

    def _restore(
        self,
        name: str,
        record: Any,
        tensors: Mapping[str, Tensor],
        branches: Sequence[Branch],
        weight: float,
    ) -> None:
        path = self.state.path(name)
        try:
            for number, (row, branch) in enumerate(zip(record, branches, strict=True)):
                if row["name"] != branch.spec.name:
                    raise ValueError(f"sub-layer {row['name']!r}")
                curves = []
                for dimension, widths, errors in row["curves"]:
                    order = tensors[f"{number}.{dimension}"]
                    if order.shape[-1] != widths[0] or len(widths) != len(errors):
                        raise ValueError(f"curve {dimension}")
                    curves.append(
                        Curve(dimension, tuple(map(int, widths)), tuple(map(float, errors)), order)
                    )
                pairs = tuple((int(units), float(error)) for units, error in row["absorbed"])
                self.found[branch.spec.name] = PredictedSubLayer(
                    weight, tuple(curves), row["absorber"], pairs
                )
                inside = {
                    key.removeprefix(f"{number}/"): each
                    for key, each in tensors.items()
                    if key.startswith(f"{number}/")
                }
                copy_checked(path, branch.state_dict(), inside)
            if self.moment is not None:
                self.moment.total += tensors["moment"]
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise damaged(path, str(error)) from None
