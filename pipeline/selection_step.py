"""The choice of patches for each image: `masks.tokens` with predictors or class attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..compress.masks.masked import MaskedModel
from ..compress.network.architecture import Architecture
from ..compress.network.modules.model import CompactModel
from ..compress.network.modules.select import Choices
from ..compress.tokens.select import (
    DEFAULT_RATIO,
    OptionNames,
    SelectMethod,
    SelectRequest,
    with_selects,
)
from ..compress.train.dense import Distillation
from ..compress.train.objectives import PREDICTING, Objective, SelectionSettings, make_objective
from ..core.console import status
from ..core.errors import InputError
from .masks_section import MasksSection
from .recipe import Recipe

DEFAULT_LR, DEFAULT_WEIGHT = 1e-3, 2.0
NAMES = OptionNames(
    'masks.tokens = "{}"',
    "masks.token_ratio",
    "masks.token_stages",
    "masks.token_rule",
    "masks.token_counts",
    instead='masks.tokens = "dynamicvit" or "dps"',
)


def with_selections(model: CompactModel, section: MasksSection, seed: int) -> CompactModel:
    """Add the selections of `[masks]` to a network; predictors have random weights.

    Args:
        model: The network, with any widths.
        section: The method, the stages and the ratio or the counts.
        seed: Of the weights.

    Returns:
        A new network.

    Raises:
        InputError: A stage does not exist, leaves no patch, or the network allows none; the message
            has the reason.
    """
    if section.tokens == "dps" and model.architecture.drops_tokens:
        raise InputError("masks.tokens: dps needs a dense network, this one drops tokens by place")
    request = SelectRequest(
        cast("SelectMethod", section.tokens),
        ratio=section.token_ratio or DEFAULT_RATIO,
        stages=section.token_stages,
        rule=section.token_rule,
        counts=section.token_counts,
        seed=seed,
        names=NAMES,
    )
    return with_selects(model, request)


def require_selections(model: CompactModel, recipe: Recipe) -> CompactModel:
    """Check the stages and counts of `[masks]`, and that predictors are trained.

    Args:
        model: The dense network.
        recipe: All settings.

    Returns:
        The network whose widths are learned: with selections, unless they come later.

    Raises:
        InputError: They do not fit the network, or no phase trains the predictors.
    """
    section = recipe.masks
    if not section.selects_tokens:
        return model
    selecting = with_selections(model, section, recipe.train.seed)
    require_counts(selecting.architecture, section)
    first = section.order == "widths-first"
    trained = section.alone_epochs or recipe.finetune.epochs
    trained = trained or (section.width_epochs and not first)
    if section.tokens in PREDICTING and not trained:
        raise InputError(
            f'masks.tokens = "{section.tokens}": nothing trains its predictors; set '
            'finetune.epochs, method = "learned", or tokens = "class-attention" with token_ratio'
        )
    return model if first else selecting


def require_counts(architecture: Architecture, section: MasksSection) -> None:
    """Check that the largest bucket is what the last selection of a network keeps.

    Args:
        architecture: The network with its selections.
        section: The buckets.

    Raises:
        InputError: It keeps another number, or a cut of widths has removed it.
    """
    counts = section.token_buckets
    if counts is None:
        return
    shown = f"masks.token_buckets = {list(counts)}"
    if not architecture.selects:
        raise InputError(
            f"{shown}: the cut network has no selection left, since every attention behind them is "
            "removed; leave token_buckets out and continue with --resume, or keep more widths"
        )
    last = architecture.selects[-1]
    if last.patches != counts[-1]:
        raise InputError(
            f"{shown}: the largest is {counts[-1]}, and the last selection ({last.name}) keeps "
            f"{last.patches} patches in training; write {last.patches} as the last number, or set "
            "masks.token_ratio or masks.token_counts"
        )


def selection_objective(
    recipe: Recipe,
    teacher: CompactModel,
    distillation: Distillation | None,
    total_steps: int,
    *,
    alone: bool = False,
    lr: float | None = None,
) -> Objective:
    """The objective of the method of `[masks]`.

    Args:
        recipe: The sections `[masks]` and `[train]`.
        teacher: The baseline.
        distillation: How its outputs are learned; None: they are not.
        total_steps: The number of optimizer steps of the phase.
        alone: Whether only the choice of patches is trained.
        lr: The rate of predictors (default: that of the recipe).

    Returns:
        A new objective.
    """
    section = recipe.masks
    rate = lr or section.token_lr or DEFAULT_LR
    weight = DEFAULT_WEIGHT if section.token_ratio_weight is None else section.token_ratio_weight
    method = cast("SelectMethod", section.tokens)
    settings = SelectionSettings(method, lr=rate, alone=alone, ratio_weight=weight)
    return make_objective(
        settings,
        total_steps,
        teacher,
        label_smoothing=recipe.train.label_smoothing,
        distillation=distillation,
    )


def show_selections(model: CompactModel, section: MasksSection, *, quiet: bool) -> None:
    """Print what each selection keeps."""
    architecture = model.architecture
    counts = ", ".join(f"{each.name} {each.patches}" for each in architecture.selects)
    text = f"{counts} of {architecture.patches}, for each image"
    if not counts:
        text = "no selection is left, since every attention behind them is removed"
    status(f"patches by {section.tokens}: {text}", quiet=quiet)


def same_choices_error(reference: MaskedModel, model: CompactModel, images: Tensor) -> float:
    """Largest difference of a masked network and its cut where both keep the same patches.

    Equal scores to the last digit decide differently in two orders of summation, so the cut is
    given the choices of the masked network.

    Args:
        reference: The network that computes with the mask.
        model: The network after the cut.
        images: (images, channels, height, width).

    Returns:
        It is relative to the largest output of the reference.
    """
    recorded = Choices()
    with torch.inference_mode():
        wanted = reference.eval()(images, recorded)
        # Selections behind which nothing reads patches are not in the cut network.
        given = recorded.found[: len(model.architecture.selects)]
        found = model.eval()(images, Choices(given=given))
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))
