"""The three trainings of the chain: the dense baseline, the masks, the compact model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compress.data.splits import DataSplits, stratified_indices
from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.masks.weight_mask import WeightMask
from ..compress.network.files import TOKENS_FILE, TRIM_FILE, load, save
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.trim import Trimmed
from ..compress.surgery.compactor import compact, output_error
from ..compress.train.augment import seed_everything
from ..compress.train.dense import DenseTask, Distillation
from ..compress.train.later_cost import LaterCost
from ..compress.train.mask_task import MaskTask
from ..compress.train.objectives import Objective
from ..compress.train.schedule import Schedule
from ..compress.train.selection_task import SelectionTask
from ..compress.train.vtp_task import SPARSITY, VtpTask
from ..core.storage import replace_file
from .latency_loop import trim_to_latency
from .latency_table import recipe_table
from .latency_training import measured_trial, verified
from .learned_settings import learned_settings, within_reach
from .masks_section import RANKING, MasksSection
from .phases import HISTORY as HISTORY
from .phases import RunContext as RunContext
from .phases import (
    dense_options,
    distillation,
    epoch_steps,
    known_outputs,
    phase_settings,
    run_phase,
    size_metrics,
)
from .recipe import Recipe
from .recipe_sections import BaselineSection, FinetuneSection
from .run_folder import RunFolder
from .saliency_step import ranked_mask
from .selection_step import same_choices_error, selection_objective
from .token_step import CutTokens, cut_tokens, width_section
from .trim_step import exact_cut_error, start_section, trim_baseline, trim_record

# Files and folders of the run.
BASELINE, COMPACT, CUT = "baseline", "compact", "cut"
MASK, CUT_PARITY = "mask.safetensors", "cut-parity.json"
# Of a closed-form cut: the dense network in the basis in which it was cut, or with the blocks that
# a choice of tokens refitted.
ROTATED = "rotated"
# Of `masks.start = "one-shot"`: the network that mask learning started from.
START = "start"
PARITY_IMAGES = 64


@dataclass(frozen=True)
class Cut:
    """The result of mask learning.

    Attributes:
        model: The baseline, cut by the learned masks and not fine-tuned.
        mask: What was kept of the baseline.
        max_relative_error: Largest difference between the logits of the masked baseline and of
            `model`, relative to the largest logit.
    """

    model: CompactModel
    mask: StructuredMask
    max_relative_error: float


def train_baseline(dense: CompactModel, context: RunContext, *, resume: bool) -> CompactModel:
    """Train the dense model in place for the epochs of `[baseline]`, and save it in baseline/."""
    _train_dense(dense, "baseline", context, teacher=None, resume=resume)
    if context.writes:
        save(dense, context.folder / BASELINE, overwrite=True)
    return dense.eval()


def learn_masks(baseline: CompactModel, round_to: int, context: RunContext, *, resume: bool) -> Cut:
    """Learn the masks and cut the baseline by them.

    Args:
        baseline: The trained dense model; it is also the teacher.
        round_to: Kept widths are multiples of this.
        context: The run. Its folder receives mask.safetensors, cut/ and cut-parity.json.
        resume: Continue from the training checkpoint of an earlier attempt.

    Returns:
        The cut model and its mask.
    """
    recipe = context.recipe
    if recipe.masks.method == "closed-form":
        cut = closed_form_cut(baseline, recipe.masks, round_to, context, resume=resume)
    elif recipe.masks.method in RANKING:
        cut = ranked_cut(baseline, round_to, context)
    else:
        start = start_network(baseline, round_to, context, resume=resume)
        cut = learned_cut(baseline, start, round_to, context, resume=resume)
    if context.writes:
        save_cut(cut, context.folder)
    return cut


def learned_cut(
    baseline: CompactModel,
    start: CompactModel,
    round_to: int,
    context: RunContext,
    *,
    resume: bool,
    later: LaterCost | None = None,
) -> Cut:
    """Learn the masks of a network and cut it by them.

    Args:
        baseline: The teacher; the budget is a share of it.
        start: The network to cut.
        round_to: Kept widths are multiples of this.
        context: The run.
        resume: Continue from the training checkpoint of an earlier attempt.
        later: As for `mask_task`.

    Returns:
        The cut model and its mask of `start`.
    """
    recipe = context.recipe
    known = known_outputs(baseline, context, recipe.masks.augmentation, start)
    data = context.data
    trial = measured_trial(baseline, start, round_to, context, resume=resume)
    trial = within_reach(trial, baseline, start, round_to, context)
    task = mask_task(
        *(baseline, data, recipe, round_to),
        known=known,
        start=start,
        later=later,
        latency_ms=None if trial is None else trial.table_ms,
    )
    # A budget has a schedule of its own, so the learning rate decays once. With a fixed lambda it
    # restarts, as in Tredese 2023, "Structured Pruning of Vision Transformers at Training Time".
    kind = "cosine" if recipe.masks.lambda_ is None else "restarts"
    schedule = Schedule(kind, restart_epochs=recipe.masks.restart_epochs, min_lr=1e-8)  # type: ignore[arg-type]
    # The task itself decides which epoch may be the best one and when to stop.
    augmentation = recipe.masks.augmentation
    settings = phase_settings(context, recipe.masks.epochs, augmentation, schedule, None)
    run_phase(task, context, settings, resume)
    if trial is not None and isinstance(task, MaskTask):
        verified(task, baseline, context, trial)
    model, mask = task.result(), task.mask()
    return Cut(model, mask, cut_error(task, model, data.val.floats(slice(0, PARITY_IMAGES))))


def ranked_cut(baseline: CompactModel, round_to: int, context: RunContext) -> Cut:
    """The cut of `masks.method = "l1"`, `"l2"` and `"random"`."""
    recipe = context.recipe
    mask = ranked_mask(baseline, recipe.masks, round_to, recipe.train.seed)
    model = compact(baseline, mask, last_queries=baseline.architecture.last_queries).eval()
    images = context.data.val.floats(slice(0, PARITY_IMAGES))
    return Cut(model, mask, output_error(masked(baseline, mask), model, images))


def closed_form_cut(
    baseline: CompactModel,
    section: MasksSection,
    round_to: int,
    context: RunContext,
    *,
    resume: bool,
) -> Cut:
    """The cut of `masks.method = "closed-form"`; also writes rotated/ and trim.json.

    With tokens chosen before, start/ is the network without the dropped ones.

    Args:
        baseline: The dense model.
        section: The budget.
        round_to: Kept widths are multiples of this.
        context: The run.
        resume: Continue a choice of tokens that an earlier attempt began.

    Returns:
        The cut model and its mask of rotated/, or of the baseline where that is not written.
    """
    folder, dense = context.folder, baseline.architecture
    images = context.data.val.floats(slice(0, PARITY_IMAGES))
    tokens = _token_cut(baseline, context, resume=resume)
    if tokens is not None:
        section = width_section(section, baseline, tokens.model)
        if 1.0 in (section.params, section.macs):
            # The tokens alone meet the budget.
            if tokens.source is not baseline:
                save(tokens.source, folder / ROTATED, overwrite=True)
            mask = tokens.choice.mask
            return Cut(tokens.model, mask, exact_cut_error(tokens.source, mask, images))
        baseline = tokens.model
    if section.has_latency:
        unlabeled, table = drawn_images(section, context), recipe_table(context.recipe, dense)
        found = trim_to_latency(baseline, unlabeled, section, round_to, table, context)
    else:
        found = _trimmed(baseline, section, round_to, context)
    return trimmed_cut(found, context)


def trimmed_cut(found: Trimmed, context: RunContext) -> Cut:
    """The cut of a closed form; writes rotated/ and trim.json."""
    folder, images = context.folder, context.data.val.floats(slice(0, PARITY_IMAGES))
    cut = Cut(found.model, found.mask, exact_cut_error(found.rotated, found.mask, images))
    save(found.rotated, folder / ROTATED, overwrite=True)
    replace_file(folder / TRIM_FILE, trim_record(found))
    return cut


def start_network(
    baseline: CompactModel, round_to: int, context: RunContext, *, resume: bool
) -> CompactModel:
    """The network that mask learning starts from; a closed-form cut is saved in start/.

    Args:
        baseline: The dense model.
        round_to: Kept widths are multiples of this.
        context: The run.
        resume: Load start/ if it is there.

    Returns:
        The baseline, or what is in start/.
    """
    section, folder = context.recipe.masks, context.folder
    if section.start == "dense" and not section.chooses_tokens:
        return baseline
    with context.host.processes.main_first():
        if context.writes and not (resume and (folder / START).is_dir()):
            tokens = _token_cut(baseline, context, resume=resume)
            if section.start == "one-shot":
                model = baseline if tokens is None else tokens.model
                widths = start_section(width_section(section, baseline, model))
                found = _trimmed(model, widths, round_to, context)
                save(found.model, folder / START, overwrite=True)
                replace_file(folder / TRIM_FILE, trim_record(found))
    return load(folder / START)


def _token_cut(baseline: CompactModel, context: RunContext, *, resume: bool) -> CutTokens | None:
    """The baseline without the tokens that `masks.tokens` drops before widths; None if none are.

    Writes start/ and tokens.json, and the blocks that are refitted to training/tokens/.
    """
    section, seed = context.recipe.masks, context.recipe.train.seed
    if not section.chooses_tokens:
        return None
    state = context.folder / "training/tokens"
    if not resume:
        shutil.rmtree(state, ignore_errors=True)
    images = drawn_images(section, context)
    found = cut_tokens(baseline, images, section, seed, state=state, quiet=context.quiet)
    save(found.model, context.folder / START, overwrite=True)
    replace_file(context.folder / TOKENS_FILE, found.record())
    return found


def _trimmed(
    baseline: CompactModel, section: MasksSection, round_to: int, context: RunContext
) -> Trimmed:
    images = drawn_images(section, context)
    return trim_baseline(baseline, images, section, round_to, quiet=context.quiet)


def drawn_images(section: MasksSection, context: RunContext) -> Tensor:
    """The unlabeled training images of `[masks]`, normalized."""
    train, count = context.data.train, min(section.images, len(context.data.train))
    return train.floats(stratified_indices(train.targets, count, context.recipe.train.seed)[0])


def save_cut(cut: Cut, folder: RunFolder) -> None:
    """Save a cut as `load_cut` reads it."""
    save(cut.model, folder / CUT, overwrite=True)
    cut.mask.save(folder / MASK)
    record = json.dumps({"max_relative_error": cut.max_relative_error})
    replace_file(folder / CUT_PARITY, record + "\n")


def mask_task(
    baseline: CompactModel,
    data: DataSplits,
    recipe: Recipe,
    round_to: int,
    *,
    known: Mapping[bytes, Tensor] | None = None,
    start: CompactModel | None = None,
    later: LaterCost | None = None,
    latency_ms: float | None = None,
) -> MaskTask | VtpTask:
    """Create the training task of `[masks]` on a copy of the baseline.

    Args:
        baseline: The dense model; it is also the teacher.
        data: Its training images determine the number of steps.
        recipe: The sections `[masks]`, `[distill]` and `[train]`.
        round_to: Kept widths are multiples of this.
        known: Outputs of the teacher that need not be computed again.
        start: The network whose masks are learned, a cut of the baseline (default: the baseline).
            The budget is a share of the baseline. Where it chooses patches for each image, it
            is trained by the objective of that method.
        later: What is added to the cut network under the same budget (default: nothing).
        latency_ms: The latency by the table, if it is not that of the recipe.

    Returns:
        The task, not trained yet.

    Raises:
        InputError: No mask meets the budget; the message gives the smallest feasible one.
    """
    section = recipe.masks
    start = start or baseline
    settings = learned_settings(recipe, baseline, start, round_to, latency_ms)
    steps = section.epochs * epoch_steps(recipe, data)
    model, teacher = copy.deepcopy(start), distillation(baseline, recipe, known)
    if section.method == "vtp":
        sparsity = SPARSITY if section.sparsity is None else section.sparsity
        return VtpTask(model, settings, sparsity, distillation=teacher)
    objective = None
    if start.architecture.selects:
        objective = selection_objective(recipe, baseline, teacher, steps)
    return MaskTask(model, settings, steps, distillation=teacher, objective=objective, later=later)


def finetune(
    cut: CompactModel,
    baseline: CompactModel,
    context: RunContext,
    *,
    resume: bool,
    weights: WeightMask | None = None,
) -> CompactModel:
    """Train a copy of the cut model for the epochs of `[finetune]`.

    Args:
        cut: The model after the cut.
        baseline: The dense model, used as the teacher.
        context: The run. Its folder receives compact/.
        resume: Continue from the training checkpoint of an earlier attempt.
        weights: Single weights that it does not keep stay zero.

    Returns:
        The compact model in eval mode.
    """
    model = copy.deepcopy(cut)
    known = known_outputs(baseline, context, context.recipe.finetune.augmentation, model)
    teacher = distillation(baseline, context.recipe, known)
    objective = None
    if model.architecture.selects:
        # Predictors have the rate of all weights in this phase.
        recipe, section = context.recipe, context.recipe.finetune
        steps = section.epochs * epoch_steps(recipe, context.data)
        objective = selection_objective(recipe, baseline, teacher, steps, lr=section.lr)
    _train_dense(
        model,
        "finetune",
        context,
        teacher=teacher,
        objective=objective,
        weights=weights,
        resume=resume,
    )
    if context.writes:
        save(model, context.folder / COMPACT, overwrite=True)
    return model.eval()


def cut_error(task: MaskTask | VtpTask, model: CompactModel, images: Tensor) -> float:
    """Largest difference between masked and cut network, relative to the largest logit."""
    network, mask = task.reference()
    error = same_choices_error if model.architecture.selects else output_error
    return error(masked(network, mask), model, images)


def load_cut(folder: RunFolder) -> Cut:
    """Load what `learn_masks` saved in the run folder."""
    parity = json.loads((folder / CUT_PARITY).read_text(encoding="utf-8"))
    model, mask = load(folder / CUT), StructuredMask.load(folder / MASK)
    return Cut(model, mask, float(parity["max_relative_error"]))


def seed_weights(recipe: Recipe) -> None:
    """Seed the initial weights of the dense model."""
    seed_everything(recipe.train.seed)


def _train_dense(
    model: CompactModel,
    phase: str,
    context: RunContext,
    *,
    teacher: Distillation | None,
    objective: Objective | None = None,
    weights: WeightMask | None = None,
    resume: bool,
) -> None:
    """Train `model` in place as its section of the recipe describes, if it has any epochs."""
    recipe = context.recipe
    section: BaselineSection | FinetuneSection = getattr(recipe, phase)
    if not section.epochs:
        return
    options: dict[str, Any] = {
        "phase": phase,
        "lr": section.lr,
        "weight_decay": section.weight_decay,
        "optimizer": recipe.train.optimizer,
        "metrics": size_metrics(model),
        "options": dense_options(recipe.train, model),
    }
    if objective is None:
        smoothing = recipe.train.label_smoothing
        task = DenseTask(
            model, label_smoothing=smoothing, distillation=teacher, weights=weights, **options
        )
    else:
        task = SelectionTask(model, objective, **options)
    rewind = section.rewind if isinstance(section, FinetuneSection) else None
    schedule = Schedule("cosine", section.warmup_epochs, rewind=rewind)
    settings = phase_settings(
        context, section.epochs, section.augmentation, schedule, section.patience_epochs
    )
    run_phase(task, context, settings, resume)
