"""Pruning without training as one step: rotate, predict, choose, cut, compensate, check."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ...core.errors import InputError
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, BranchSpec
from ..network.modules.model import CompactModel
from ..surgery.compactor import compact
from .allocation import branch_costs, resized_spec
from .budgets import Budget, Kind, read_budget
from .choice import Choice, choose, mask_of, priced, stream_basis
from .compensation import (
    Fit,
    SavedFits,
    kept_channels,
    refit,
    reproduced_depths,
    with_output_biases,
)
from .prediction import DEFAULTS, Prediction, Stage, TrimOptions, predict
from .report import Check, Comparison, Row, compare_features, measured_errors, table
from .stream_rotation import readbacks, rescaled_norms

__all__ = [
    "Check",
    "Fit",
    "Prediction",
    "Row",
    "Stage",
    "TrimOptions",
    "Trimmed",
    "predict",
    "trim",
    "trim_to",
]


@dataclass(frozen=True)
class Trimmed:
    """The result of `trim`.

    Attributes:
        model: The compact, compensated network.
        rotated: The dense network in the basis in which it was cut.
        mask: What was kept of `rotated`; `compact(rotated, mask)` is the network before
            compensation.
        predicted_error: The expected error of the features, as a share of their variance, before
            anything was cut.
        check: The measured error.
        cost: Cost of the compact network as a share of the dense one.
        widths: The widths that each sub-layer keeps, by dimension.
        fits: What each refit achieved.
        rows: Predicted and measured error of each sub-layer; `table()` is their text.
        stream_error: The part of `predicted_error` that removed channels of the stream cause.
    """

    model: CompactModel
    rotated: CompactModel
    mask: StructuredMask
    predicted_error: float
    check: Check
    cost: float
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fits: tuple[Fit, ...] = ()
    rows: tuple[Row, ...] = ()
    stream_error: float = 0.0

    def table(self) -> str:
        """Predicted beside measured for each sub-layer and the whole, as text for a terminal."""
        lines = [table(self.rows)]
        if self.stream_error:
            lines.append(
                f"residual stream: {self.model.architecture.embed} of "
                f"{self.rotated.architecture.embed} channels, predicted {self.stream_error:.2e}"
            )
        measured = "" if self.check.error is None else f", measured {self.check.error:.2e}"
        lines.append(
            f"features: predicted error {self.predicted_error:.2e} of their variance{measured} on "
            f"{self.check.images} held-out images"
        )
        return "\n".join(lines)


def trim(
    model: nn.Module,
    images: Tensor,
    *,
    macs: float | None = None,
    params: float | None = None,
    budget: float | None = None,
    kind: Kind | None = None,
    options: TrimOptions = DEFAULTS,
    resume: Path | str | None = None,
    progress: Stage | None = None,
) -> Trimmed:
    """Prune a trained network without training, from unlabeled images, in minutes on a CPU.

    Args:
        model: A supported Vision Transformer, with or without a head; it is not modified.
        images: Unlabeled images, (images, channels, height, width), normalized as the model
            expects; 256 are a usable minimum, 500 are better. An eighth is held out for the check.
        macs: Share of the multiply-adds to keep, such as 0.7.
        params: Share of the parameters to keep; instead of `macs`.
        budget: Any budget, with its `kind`; instead of `macs`.
        kind: "macs" or "params" (a share), "file" (bytes of a file with weights of
            `options.precision`, as computed by `budgets.file_bytes`), or "cost" (the unit of
            `options.cost`; milliseconds of all sub-layers with a cost table).
        options: See `TrimOptions`.
        resume: A folder in which finished parts are saved, so that an interrupted call with the
            same model, images and options continues; other budgets use the same pass over the
            images. None: nothing is saved.
        progress: Called with the name of the stage ("weigh", "predict", "compensate"), the steps
            done, and the steps in all.

    Returns:
        The compact network, how it was cut, and how near it comes to the dense one.

    Raises:
        InputError: The images do not fit, the budget is out of reach, or `resume` is the folder
            of another cut.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Frantar et al. 2022, "Optimal Brain Compression"; Kwon et al. 2022, "A Fast Post-Training
        Pruning Framework for Transformers".
    """
    given = {"macs": macs, "params": params, "budget": budget}
    read_budget(given, kind, options.cost, options.precision)
    prediction = predict(model, images, options=options, resume=resume, progress=progress)
    return trim_to(
        prediction, macs=macs, params=params, budget=budget, kind=kind, progress=progress
    )


def trim_to(
    prediction: Prediction,
    *,
    macs: float | None = None,
    params: float | None = None,
    budget: float | None = None,
    kind: Kind | None = None,
    progress: Stage | None = None,
) -> Trimmed:
    """Cut a network to one budget, compensate it and check it.

    Args:
        prediction: What `predict` returned; it is not modified.
        macs: As for `trim`.
        params: As for `trim`.
        budget: As for `trim`.
        kind: As for `trim`.
        progress: As for `trim`.

    Returns:
        The compact network, how it was cut, and how near it comes to the dense one.

    Raises:
        InputError: The budget is out of reach.
    """
    options = prediction.options
    given = {"macs": macs, "params": params, "budget": budget}
    wanted = read_budget(given, kind, options.cost, options.precision)
    report = progress or (lambda name, done, total: None)
    choice = choose(prediction, wanted)
    found = carry_out(prediction, choice, wanted, report)
    if choice.embed is None:
        return found
    # The prediction of a narrower stream is rough, so it has to win when it is measured, too.
    try:
        other = choose(prediction, wanted, stream=False)
    except InputError:
        return found
    rival = carry_out(prediction, other, wanted, report)
    return rival if distance(rival.check) <= distance(found.check) else found


def distance(check: Check) -> float:
    """How far a cut is from the dense network on held-out images: lower is better."""
    return (1.0 - check.cosine) if check.error is None else check.error


def carry_out(prediction: Prediction, choice: Choice, budget: Budget, report: Stage) -> Trimmed:
    """Cut the widths of a choice, refit the output projections, and check the result.

    Args:
        prediction: What `predict` returned; it is not modified.
        choice: The widths.
        budget: Measures the cost of the result.
        report: As `progress` of `trim`.

    Returns:
        The compact network, how it was cut, and how near it comes to the dense one.
    """
    source, options = prediction.source, prediction.options
    rotated = prediction.rotated if choice.turned is None else choice.turned
    mask = mask_of(prediction.curves, choice, rotated.architecture.embed)
    result = compact(rotated, mask, last_queries=bool(rotated.architecture.pooled_prefix) or None)
    if choice.embed is not None:
        result = rescaled_norms(result, rotated.architecture.embed)
    fits: list[Fit] = []
    channels = kept_channels(rotated, result, mask)
    if options.compensate:
        result = with_output_biases(result).eval()
        total = len(result.architecture.branches)

        def done(fit: Fit) -> None:
            fits.append(fit)
            report("compensate", len(fits), total)

        saved = SavedFits(prediction.state, _digest(mask))
        refit(result, rotated, prediction.fitting, channels, saved, done)
    reading = {}
    if choice.embed is not None:
        both = readbacks(prediction.rotated, stream_basis(prediction)[:, : choice.embed])
        reading = {"readback": both[0], "readback_patches": both[1]}
    compared = Comparison(
        dense=rotated,
        compact=result,
        channels=channels,
        depths=reproduced_depths(rotated, result),
        weights={name: each.weight for name, each in prediction.curves.items()},
    )
    dense = priced(source.architecture)
    return Trimmed(
        model=result,
        rotated=rotated,
        mask=mask,
        predicted_error=choice.error,
        check=compare_features(source, result, prediction.checking, **reading),
        cost=budget.network(priced(result.architecture)) / budget.network(dense),
        widths={name: option.widths for name, option in choice.options.items()},
        fits=tuple(fits),
        rows=_rows(dense, choice, budget, measured_errors(compared, prediction.checking)),
        stream_error=choice.stream_error,
    )


def _rows(
    dense: Architecture, choice: Choice, budget: Budget, measured: Mapping[str, float]
) -> tuple[Row, ...]:
    specs = {branch.name: branch for branch in dense.branches}
    found = []
    for name, price in branch_costs(dense, budget.cost).items():
        option = choice.options.get(name)
        if option is None:
            continue
        narrow = resized_spec(specs[name], option.widths)
        cost = 0.0 if narrow is None else price(narrow)
        found.append(
            Row(
                name=name,
                before=_widths(specs[name], option.widths),
                after=option.widths,
                predicted=choice.errors[name],
                measured=measured.get(name),
                cost_share=cost / max(price(specs[name]), 1e-30),
            )
        )
    return tuple(found)


def _widths(spec: BranchSpec, named: Mapping[str, int]) -> dict[str, int]:
    """The dense widths of the dimensions in `named`."""
    core = spec.core
    fields = {"head": "heads", "ffn": "hidden"}
    return {name: int(getattr(core, fields.get(name, name))) for name in named}


def _digest(mask: StructuredMask) -> str:
    """Identifies a cut in the names of its refits."""
    digest = hashlib.sha256()
    for dimension, site, keep in mask:
        digest.update(f"{dimension}/{site}:".encode())
        digest.update(bytes(keep.flatten().tolist()))
    return digest.hexdigest()[:16]
