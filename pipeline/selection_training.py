"""The step `masks` of a run that chooses patches for each image: tokens, widths, or both."""

from __future__ import annotations

from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.network.files import save
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost
from ..compress.train.objectives import PREDICTING
from ..compress.train.schedule import Schedule
from ..compress.train.selection_task import SelectionTask
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
    learned_cut,
    save_cut,
    start_network,
)


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
        model = start if start.architecture.selects else with_selections(start, section, seed)
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

    The budget is that of the result, if selections save the same share of the cut network as of the
    dense one.
    """
    section, seed = context.recipe.masks, context.recipe.train.seed
    whole = with_selections(baseline, section, seed)
    if section.method == "closed-form":
        widths = _widths_section(section, baseline, whole)
        if 1.0 in (widths.params, widths.macs):
            cut = _whole(baseline, context)
        else:
            cut = closed_form_cut(baseline, widths, round_to, context, resume=resume)
    else:
        start = start_network(baseline, round_to, context, resume=resume)
        kind = "params" if section.params is not None else "macs"
        share = network_cost(baseline.architecture, kind) / network_cost(whole.architecture, kind)
        cut = learned_cut(baseline, start, round_to, context, resume=resume, share=share)
    model = with_selections(cut.model, section, seed)
    model = _trained(model, baseline, context, resume=resume)
    return Cut(model, cut.mask, cut.max_relative_error)


def _widths_section(
    section: MasksSection, baseline: CompactModel, whole: CompactModel
) -> MasksSection:
    """The budget of the widths where selections follow; other budgets than shares stay."""
    update = {}
    for kind, share in (("params", section.params), ("macs", section.macs)):
        if share is not None:
            sizes = [network_cost(model.architecture, kind) for model in (baseline, whole)]
            update[kind] = min(1.0, share * sizes[0] / sizes[1])
    return section.model_copy(update=update)


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
    if not epochs:
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
