"""The step `masks` of a run that chooses patches for each image: tokens, widths, or both."""

from __future__ import annotations

import torch

from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.network.architecture import Architecture, SelectSpec
from ..compress.network.files import save
from ..compress.network.modules.model import CompactModel
from ..compress.network.select_specs import ATTENTION_SCORERS, scoring_branches
from ..compress.oneshot.allocation import network_cost
from ..compress.oneshot.budgets import file_bytes
from ..compress.tokens.select import stage_of
from ..compress.train.later_cost import LaterCost
from ..compress.train.objectives import PREDICTING
from ..compress.train.schedule import Schedule
from ..compress.train.selection_losses import channel_obstacle
from ..compress.train.selection_task import SelectionTask
from ..core.console import status
from .masks_section import MasksSection
from .phases import (
    RunContext,
    dense_options,
    distillation,
    epoch_steps,
    known_outputs,
    phase_settings,
    run_phase,
    size_metrics,
)
from .recipe import Recipe
from .selection_step import (
    same_choices_error,
    selection_objective,
    show_selections,
    with_selections,
)
from .training_steps import (
    PARITY_IMAGES,
    START,
    Cut,
    closed_form_cut,
    drawn_images,
    learned_cut,
    save_cut,
    start_network,
    trimmed_cut,
)
from .trim_step import trim_baseline


def learn_selections(
    baseline: CompactModel, round_to: int, context: RunContext, *, resume: bool
) -> Cut:
    """Learn which patches to keep of each image, and the widths, in the order of `[masks]`.

    Args:
        baseline: The trained dense model; it is also the teacher.
        round_to: Kept widths are multiples of this.
        context: The run. Its folder receives mask.safetensors, cut/ and cut-parity.json, and
            start/, the network with selections before the cut of widths.
        resume: Continue from the training checkpoints of an earlier attempt.

    Returns:
        The network with selections and its widths, and the mask of the widths: of start/, or with
        widths first of the baseline.
    """
    section, seed = context.recipe.masks, context.recipe.train.seed
    if section.keeps_widths:
        model = with_selections(baseline, section, seed)
        cut = _whole(_trained(model, baseline, context, resume=resume), context)
    elif section.order == "widths-first":
        cut = _widths_first(baseline, round_to, context, resume=resume)
    else:
        start = start_network(baseline, round_to, context, resume=resume)
        # A run that was killed behind this has them in start/ already.
        model = start
        if not start.architecture.selects:
            model = LaterSelections(with_selections(baseline, section, seed), section, seed)(start)
        show_missing_loss(model, baseline, context.recipe, quiet=context.quiet)
        if section.order == "tokens-first":
            model = _trained(model, baseline, context, resume=resume)
        if context.writes:
            save(model, context.folder / START, overwrite=True)
        cut = learned_cut(baseline, model, round_to, context, resume=resume)
    show_selections(cut.model, section, quiet=context.quiet)
    if context.writes:
        save_cut(cut, context.folder)
    return cut


def _widths_first(
    baseline: CompactModel, round_to: int, context: RunContext, *, resume: bool
) -> Cut:
    """Widths without selections, then selections at these widths.

    The budget is that of the result, so each cut is counted with its selections.
    """
    section, seed = context.recipe.masks, context.recipe.train.seed
    selecting = LaterSelections(with_selections(baseline, section, seed), section, seed)
    if section.method == "closed-form":
        cut = _closed_form(baseline, selecting, round_to, context, resume=resume)
    else:
        start = start_network(baseline, round_to, context, resume=resume)
        kind = "params" if section.params is not None else "macs"
        later = LaterCost(
            lambda architecture: network_cost(selecting.architecture(architecture), kind),
            scoring_branches(selecting.architecture(start.architecture)),
        )
        cut = learned_cut(baseline, start, round_to, context, resume=resume, later=later)
    model = selecting(cut.model)
    show_missing_loss(model, baseline, context.recipe, quiet=context.quiet)
    model = _trained(model, baseline, context, resume=resume)
    return Cut(model, cut.mask, cut.max_relative_error)


def _closed_form(
    baseline: CompactModel,
    selecting: LaterSelections,
    round_to: int,
    context: RunContext,
    *,
    resume: bool,
) -> Cut:
    """The cut of widths that meets the budget with selections; also writes rotated/."""
    section = context.recipe.masks
    if section.has_latency:
        # They save time, so the latency without them is a bound.
        return closed_form_cut(baseline, section, round_to, context, resume=resume)

    def count(architecture: Architecture) -> float:
        found = selecting.architecture(architecture)
        if section.file_mb is not None:
            return file_bytes(found, section.file_precision or "fp32")
        kind = "params" if section.params is not None else "macs"
        return network_cost(found, kind) / network_cost(baseline.architecture, kind)

    amount = section.params or section.macs
    if amount is not None and count(baseline.architecture) <= amount:
        # Selections alone meet the budget.
        return _whole(baseline, context)
    images, quiet = drawn_images(section, context), context.quiet
    found = trim_baseline(baseline, images, section, round_to, count=count, quiet=quiet)
    return trimmed_cut(found, context)


def show_missing_loss(
    model: CompactModel, baseline: CompactModel, recipe: Recipe, *, quiet: bool
) -> None:
    """Show that DynamicViT's loss on tokens is left out, where tokens cannot be compared.

    Args:
        model: The network that is trained from here on.
        baseline: The teacher.
        recipe: The method, and whether there is a teacher.
        quiet: Print nothing.
    """
    if recipe.masks.tokens != "dynamicvit" or not recipe.distill.enabled:
        return
    reason = channel_obstacle(model.architecture, baseline.architecture)
    if model.architecture.selects and reason is not None:
        status(
            f'masks.tokens = "dynamicvit": the loss on tokens is left out: {reason}; the other '
            "terms of the loss stay",
            quiet=quiet,
        )


class LaterSelections:
    """Adds to a cut of the dense network the selections of the dense network.

    One goes with the last attention behind it, and with the attention that scores its patches.

    Args:
        whole: The dense network with its selections.
        section: The method.
        seed: Of the weights.
    """

    def __init__(self, whole: CompactModel, section: MasksSection, seed: int) -> None:
        self.selects, self.section, self.seed = whole.architecture.selects, section, seed

    def __call__(self, model: CompactModel) -> CompactModel:
        """A cut with its selections; the model itself if none is left."""
        staying = [each for each in self.selects if _fits(each, model.architecture)]
        if not staying:
            return model
        places = {
            "token_stages": tuple(stage_of(each) for each in staying),
            "token_counts": tuple(each.patches for each in staying),
            "token_rule": None,
        }
        return with_selections(model, self.section.model_copy(update=places), self.seed)

    def architecture(self, architecture: Architecture) -> Architecture:
        """The architecture of a cut with its selections."""
        with torch.device("meta"):
            return self(CompactModel(architecture)).architecture


def _fits(select: SelectSpec, cut: Architecture) -> bool:
    """Whether a cut network can score the patches of a selection, and reads those that it keeps."""
    stage, ends, attentions = stage_of(select), cut.block_ends, cut.attention_steps()
    at = ends[stage - 1] if stage else 0
    if select.scorer in ATTENTION_SCORERS:
        own = [number for number in attentions if at <= number < ends[stage]]
        if not own:
            return False
        at = own[0] + 1
    return not cut.pooled_prefix or any(number >= at for number in attentions)


def _whole(model: CompactModel, context: RunContext) -> Cut:
    """The cut that keeps every width."""
    mask = StructuredMask({})
    images = context.data.val.floats(slice(0, PARITY_IMAGES))
    return Cut(model, mask, same_choices_error(masked(model, mask), model, images))


def _trained(
    model: CompactModel, baseline: CompactModel, context: RunContext, *, resume: bool
) -> CompactModel:
    """Train the selections of a network alone, if the recipe has epochs for it."""
    section = context.recipe.masks
    epochs = section.alone_epochs
    if not epochs or not model.architecture.selects:
        return model.eval()
    task = selection_task(model, baseline, context, epochs)
    # As in DynamicViT's code, 5 of 30 epochs: random predictors would saturate at the full rate.
    warmup = epochs / 6 if section.tokens in PREDICTING else 0.0
    schedule = Schedule("cosine", warmup_epochs=warmup, min_lr=1e-8)
    settings = phase_settings(context, epochs, section.augmentation, schedule, None)
    run_phase(task, context, settings, resume)
    return task.model.eval()


def selection_task(
    model: CompactModel, baseline: CompactModel, context: RunContext, epochs: int
) -> SelectionTask:
    """The training task of the selections of a network, at fixed widths.

    Args:
        model: The network with selections, trained in place.
        baseline: The teacher.
        context: The run.
        epochs: The number of epochs.

    Returns:
        The task, not trained yet.
    """
    recipe, section = context.recipe, context.recipe.masks
    known = known_outputs(baseline, context, section.augmentation, model)
    teacher, steps = (
        distillation(baseline, recipe, known),
        epochs * epoch_steps(recipe, context.data),
    )
    objective = selection_objective(recipe, baseline, teacher, steps, alone=True)
    return SelectionTask(
        model,
        objective,
        lr=section.lr,
        weight_decay=section.weight_decay,
        optimizer=recipe.train.optimizer,
        metrics=size_metrics(model),
        options=dense_options(recipe.train, model),
    )
