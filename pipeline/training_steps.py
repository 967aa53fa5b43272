"""The three trainings of the chain: the dense baseline, the masks, the compact model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..compress.data.splits import DataSplits, stratified_indices
from ..compress.masks.budget import Budget
from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import TOKENS_FILE, TRIM_FILE, load, save
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost
from ..compress.oneshot.trim import Trimmed
from ..compress.surgery.compactor import output_error
from ..compress.train.augment import seed_everything
from ..compress.train.dense import DenseTask, Distillation, teacher_outputs
from ..compress.train.loop import fit
from ..compress.train.mask_settings import MaskSettings
from ..compress.train.mask_task import MaskTask
from ..compress.train.precision import arithmetic
from ..compress.train.regularization import DenseOptions
from ..compress.train.schedule import Schedule
from ..compress.train.settings import TrainSettings
from ..core.console import progress_bar
from ..core.storage import replace_file
from .masks_section import MasksSection
from .recipe import Recipe
from .recipe_sections import BaselineSection, FinetuneSection
from .run_folder import RunFolder
from .token_step import cut_tokens, token_record, width_section
from .train_section import TrainSection
from .training_host import TrainingHost
from .trim_step import exact_cut_error, start_section, trim_baseline, trim_record

# Files and folders of the run.
BASELINE, COMPACT, CUT = "baseline", "compact", "cut"
MASK, CUT_PARITY, HISTORY = "mask.safetensors", "cut-parity.json", "history.jsonl"
# Of a closed-form cut: the dense network in the basis in which it was cut.
ROTATED = "rotated"
# Of `masks.start = "one-shot"`: the network that mask learning started from.
START = "start"
PARITY_IMAGES = 64
TEACHER_BATCH = 128


@dataclass(frozen=True)
class RunContext:
    """What every step of a run reads: its recipe, its data and its folder."""

    recipe: Recipe
    data: DataSplits
    folder: RunFolder
    quiet: bool = False
    host: TrainingHost = field(default_factory=TrainingHost)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.host.processes.is_main


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
        return _trim(baseline, round_to, context)
    start = _start(baseline, round_to, context, resume=resume)
    known = _teacher_outputs(baseline, context, recipe.masks.augmentation)
    task = mask_task(baseline, context.data, recipe, round_to, known=known, start=start)
    # A budget has a schedule of its own, so the learning rate decays once. With a fixed lambda it
    # restarts, as in Tredese 2023, "Structured Pruning of Vision Transformers at Training Time".
    kind = "cosine" if recipe.masks.lambda_ is None else "restarts"
    schedule = Schedule(kind, restart_epochs=recipe.masks.restart_epochs, min_lr=1e-8)  # type: ignore[arg-type]
    # The task itself decides which epoch may be the best one and when to stop.
    settings = _settings(context, recipe.masks.epochs, recipe.masks.augmentation, schedule, None)
    _fit(task, context, settings, resume)
    model, mask = task.result(), task.mask()
    error = cut_error(task, model, context.data.val.floats(slice(0, PARITY_IMAGES)))
    cut = Cut(model, mask, error)
    if context.writes:
        _save_cut(cut, context.folder)
    return cut


def _trim(baseline: CompactModel, round_to: int, context: RunContext) -> Cut:
    """The cut of `masks.method = "closed-form"`; also writes rotated/ and trim.json.

    With tokens chosen before, start/ is the network without the dropped ones.
    """
    folder, section = context.folder, context.recipe.masks
    images = context.data.val.floats(slice(0, PARITY_IMAGES))
    tokens = _without_tokens(baseline, context)
    if tokens is not None:
        start, mask = tokens
        section = width_section(section, baseline, start)
        if 1.0 in (section.params, section.macs):
            # The tokens alone meet the budget.
            cut = Cut(start, mask, exact_cut_error(baseline, mask, images))
            _save_cut(cut, folder)
            return cut
        baseline = start
    found = _trimmed(baseline, section, round_to, context)
    cut = Cut(found.model, found.mask, exact_cut_error(found.rotated, found.mask, images))
    save(found.rotated, folder / ROTATED, overwrite=True)
    replace_file(folder / TRIM_FILE, trim_record(found))
    _save_cut(cut, folder)
    return cut


def _start(
    baseline: CompactModel, round_to: int, context: RunContext, *, resume: bool
) -> CompactModel:
    """The network that mask learning starts from; a closed-form cut is saved in start/."""
    section, folder = context.recipe.masks, context.folder
    if section.start == "dense" and not section.chooses_tokens:
        return baseline
    with context.host.processes.main_first():
        if context.writes and not (resume and (folder / START).is_dir()):
            tokens = _without_tokens(baseline, context)
            if section.start == "one-shot":
                model = baseline if tokens is None else tokens[0]
                widths = start_section(width_section(section, baseline, model))
                found = _trimmed(model, widths, round_to, context)
                save(found.model, folder / START, overwrite=True)
                replace_file(folder / TRIM_FILE, trim_record(found))
    return load(folder / START)


def _without_tokens(
    baseline: CompactModel, context: RunContext
) -> tuple[CompactModel, StructuredMask] | None:
    """The baseline without the tokens that `masks.tokens` drops before widths, and their mask.

    Writes start/ and tokens.json. None if none are.
    """
    section, seed = context.recipe.masks, context.recipe.train.seed
    if not section.chooses_tokens:
        return None
    images = _drawn(section, context)
    model, choice = cut_tokens(baseline, images, section, seed, quiet=context.quiet)
    save(model, context.folder / START, overwrite=True)
    replace_file(context.folder / TOKENS_FILE, token_record(choice))
    return model, choice.mask


def _trimmed(
    baseline: CompactModel, section: MasksSection, round_to: int, context: RunContext
) -> Trimmed:
    images = _drawn(section, context)
    return trim_baseline(baseline, images, section, round_to, quiet=context.quiet)


def _drawn(section: MasksSection, context: RunContext) -> Tensor:
    """The unlabeled training images of `[masks]`, normalized."""
    train = context.data.train
    count = min(section.images, len(train))
    return train.floats(stratified_indices(train.targets, count, context.recipe.train.seed)[0])


def _save_cut(cut: Cut, folder: RunFolder) -> None:
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
) -> MaskTask:
    """Create the training task of `[masks]` on a copy of the baseline.

    Args:
        baseline: The dense model; it is also the teacher.
        data: Its training images determine the number of steps.
        recipe: The sections `[masks]`, `[distill]` and `[train]`.
        round_to: Kept widths are multiples of this.
        known: Outputs of the teacher that need not be computed again.
        start: The network whose masks are learned, a cut of the baseline (default: the baseline).
            The budget is a share of the baseline.

    Returns:
        The task, not trained yet.

    Raises:
        InputError: No mask meets the budget; the message gives the smallest feasible one.
    """
    section = recipe.masks
    start = start or baseline
    budget = None
    for kind, share in (("params", section.params), ("macs", section.macs)):
        if share is not None:
            sizes = [network_cost(model.architecture, kind) for model in (baseline, start)]
            budget = Budget(kind, min(1.0, share * sizes[0] / sizes[1]))  # type: ignore[arg-type]
    settings = MaskSettings(
        budget=budget,
        lambda_=section.lambda_,
        sharing=section.sharing,
        fixed=section.fixed,
        tokens=section.tokens == "learned" and "token" not in section.fixed,
        lr=section.lr,
        score_lr=section.score_lr,
        weight_decay=section.weight_decay,
        label_smoothing=recipe.train.label_smoothing,
        optimizer=recipe.train.optimizer,
        size_patience_epochs=section.patience_epochs,
        round_to=round_to,
        attention_overhead_macs=section.attention_overhead_macs,
        ffn_overhead_macs=section.ffn_overhead_macs,
    )
    steps = section.epochs * (len(data.train) // min(recipe.train.batch_size, len(data.train)))
    model, teacher = copy.deepcopy(start), distillation(baseline, recipe, known)
    return MaskTask(model, settings, steps, distillation=teacher)


def finetune(
    cut: CompactModel, baseline: CompactModel, context: RunContext, *, resume: bool
) -> CompactModel:
    """Train a copy of the cut model for the epochs of `[finetune]`.

    Args:
        cut: The model after the cut.
        baseline: The dense model, used as the teacher.
        context: The run. Its folder receives compact/.
        resume: Continue from the training checkpoint of an earlier attempt.

    Returns:
        The compact model in eval mode.
    """
    model = copy.deepcopy(cut)
    known = _teacher_outputs(baseline, context, context.recipe.finetune.augmentation)
    teacher = distillation(baseline, context.recipe, known)
    _train_dense(model, "finetune", context, teacher=teacher, resume=resume)
    if context.writes:
        save(model, context.folder / COMPACT, overwrite=True)
    return model.eval()


def _teacher_outputs(
    teacher: CompactModel, context: RunContext, augmentation: str
) -> dict[bytes, Tensor]:
    """The logits of all training images, if every epoch shows the same ones; else none."""
    train, distill = context.data.train, context.recipe.distill
    if augmentation != "none" or not distill.enabled or distill.alpha == 0.0:
        return {}
    if not train.decoded:
        # As many outputs as a large data set has images would fill the memory.
        return {}
    if not context.host.placement.waits or context.host.processes.count > 1:
        # A GPU computes them faster than images are compared; a process needs a share of them.
        return {}
    starts = range(0, len(train), TEACHER_BATCH)
    batches = (train.floats(slice(start, start + TEACHER_BATCH)) for start in starts)
    threads = context.recipe.train.threads
    with (
        arithmetic(context.recipe.train.matmul_precision, threads, teacher),
        progress_bar("outputs of the teacher", len(train), quiet=context.quiet) as report,
    ):
        return teacher_outputs(teacher, batches, report)


def distillation(
    teacher: CompactModel, recipe: Recipe, known: Mapping[bytes, Tensor] | None = None
) -> Distillation | None:
    """Distillation from the dense model, or None where `[distill]` is disabled."""
    section = recipe.distill
    if not section.enabled:
        return None
    return Distillation(teacher, section.alpha, section.temperature, known or {})


def cut_error(task: MaskTask, model: CompactModel, images: Tensor) -> float:
    """Largest difference between masked and cut network, relative to the largest logit."""
    network, mask = task.reference()
    return output_error(masked(network, mask), model, images)


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
    resume: bool,
) -> None:
    """Train `model` in place as its section of the recipe describes, if it has any epochs."""
    recipe = context.recipe
    section: BaselineSection | FinetuneSection = getattr(recipe, phase)
    if not section.epochs:
        return
    task = DenseTask(
        model,
        phase=phase,
        lr=section.lr,
        weight_decay=section.weight_decay,
        label_smoothing=recipe.train.label_smoothing,
        optimizer=recipe.train.optimizer,
        distillation=teacher,
        metrics=_size(model),
        options=dense_options(recipe.train, model),
    )
    schedule = Schedule("cosine", section.warmup_epochs)
    settings = _settings(
        context, section.epochs, section.augmentation, schedule, section.patience_epochs
    )
    _fit(task, context, settings, resume)


def dense_options(section: TrainSection, model: CompactModel) -> DenseOptions:
    """The options of a dense training that `[train]` describes.

    Patches are not dropped at random from a network from which some leave by a mask.
    """
    return DenseOptions(
        ema=section.ema,
        layer_decay=section.layer_decay,
        drop_path=section.drop_path,
        patch_drop=0.0 if model.architecture.drops_tokens else section.patch_drop,
    )


def _settings(
    context: RunContext,
    epochs: int,
    augmentation: str,
    schedule: Schedule,
    patience_epochs: int | None,
) -> TrainSettings:
    train = context.recipe.train
    return TrainSettings(
        epochs=epochs,
        batch_size=train.batch_size,
        seed=train.seed,
        augmentation=augmentation,  # type: ignore[arg-type]
        label_smoothing=train.label_smoothing,
        schedule=schedule,
        patience_epochs=patience_epochs,
        grad_clip=train.grad_clip or None,
        matmul_precision=train.matmul_precision,
        threads=train.threads,
        quiet=context.quiet,
        placement=context.host.placement,
        accumulate=train.accumulate,
        workers=train.workers,
        checkpoint_s=60.0 * train.checkpoint_minutes,
    )


def _fit(
    task: MaskTask | DenseTask, context: RunContext, settings: TrainSettings, resume: bool
) -> None:
    folder, host = context.folder, context.host
    checkpoints = folder / f"training/{task.phase}"
    fit(
        task,
        context.data,
        settings,
        checkpoints,
        history=folder / HISTORY,
        resume=resume,
        progress=host.progress,
        processes=host.processes,
    )


def _size(model: CompactModel) -> dict[str, float]:
    architecture = model.architecture
    return {"params": float(count_params(architecture)), "macs": float(count_macs(architecture))}
