"""What the trainings of a run share: their context, settings, teacher and training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..compress.data.splits import DataSplits
from ..compress.network.count import count_macs, count_params
from ..compress.network.modules.model import CompactModel
from ..compress.train.augment import FIXED_FORMS
from ..compress.train.dense import Distillation, teacher_outputs
from ..compress.train.loop import fit
from ..compress.train.precision import arithmetic
from ..compress.train.regularization import DenseOptions
from ..compress.train.schedule import Schedule
from ..compress.train.settings import TrainSettings
from ..compress.train.task import Task
from ..core.console import progress_bar
from .recipe import Recipe
from .run_folder import RunFolder
from .train_section import TrainSection
from .training_host import TrainingHost

HISTORY = "history.jsonl"
TEACHER_BATCH = 128


@dataclass(frozen=True)
class RunContext:
    """What every step of a run reads: its recipe, its data and its folder."""

    recipe: Recipe
    data: DataSplits
    folder: RunFolder
    quiet: bool = False
    host: TrainingHost = field(default_factory=TrainingHost)
    # By augmentation, for the phases that follow: a run has one teacher.
    outputs: dict[str, dict[bytes, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.host.processes.is_main


def known_outputs(
    teacher: CompactModel, context: RunContext, augmentation: str, student: CompactModel
) -> dict[bytes, Tensor]:
    """The logits of all training images in all their forms, if every epoch shows the same ones.

    Args:
        teacher: The dense network.
        context: The run.
        augmentation: Of the phase.
        student: The network that learns from them.

    Returns:
        Logits (classes,) by `image_key`; none if they are not the same or not read.
    """
    train, distill = context.data.train, context.recipe.distill
    if student.architecture.selects and context.recipe.masks.tokens == "dynamicvit":
        # Its loss has the tokens of the teacher, too, which are computed with the logits.
        return {}
    if augmentation not in FIXED_FORMS or not distill.enabled or distill.alpha == 0.0:
        return {}
    if not train.decoded:
        # As many outputs as a large data set has images would fill the memory.
        return {}
    if not context.host.placement.waits or context.host.processes.count > 1:
        # A GPU computes them faster than images are compared; a process needs a share of them.
        return {}
    if augmentation in context.outputs:
        return context.outputs[augmentation]
    starts = range(0, len(train), TEACHER_BATCH)
    parts = (train.floats(slice(start, start + TEACHER_BATCH)) for start in starts)
    forms = FIXED_FORMS[augmentation]
    batches = (form(images) for images in parts for form in forms)
    section, place, count = context.recipe.train, context.host.placement, len(train) * len(forms)
    with (
        arithmetic(section.matmul_precision, section.threads, teacher, place),
        place.autocast(),
        progress_bar("outputs of the teacher", count, quiet=context.quiet) as report,
    ):
        found = teacher_outputs(teacher, batches, report)
    context.outputs[augmentation] = found
    return found


def distillation(
    teacher: CompactModel, recipe: Recipe, known: Mapping[bytes, Tensor] | None = None
) -> Distillation | None:
    """Distillation from the dense model, or None where `[distill]` is disabled."""
    section = recipe.distill
    if not section.enabled:
        return None
    return Distillation(teacher, section.alpha, section.temperature, known or {})


def dense_options(section: TrainSection, model: CompactModel) -> DenseOptions:
    """The options of a dense training that `[train]` describes.

    Patches are not dropped at random from a network from which some leave by a mask or by choice.
    """
    drops = model.architecture.drops_tokens or bool(model.architecture.selects)
    return DenseOptions(
        ema=section.ema,
        layer_decay=section.layer_decay,
        drop_path=section.drop_path,
        patch_drop=0.0 if drops else section.patch_drop,
    )


def epoch_steps(recipe: Recipe, data: DataSplits) -> int:
    """The number of optimizer steps of an epoch."""
    return len(data.train) // min(recipe.train.batch_size, len(data.train))


def phase_settings(
    context: RunContext,
    epochs: int,
    augmentation: str,
    schedule: Schedule,
    patience_epochs: int | None,
) -> TrainSettings:
    """The settings of a phase.

    Args:
        context: The run, with its section `[train]`.
        epochs: The number of epochs.
        augmentation: The preset.
        schedule: The learning rate schedule.
        patience_epochs: Stop after this number of epochs without a better score; None: never.

    Returns:
        The settings.
    """
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


def run_phase(task: Task, context: RunContext, settings: TrainSettings, resume: bool) -> None:
    """Train a phase, with its checkpoints in training/PHASE of the run folder.

    Args:
        task: The phase.
        context: The run.
        settings: How long and how to train.
        resume: Continue from its checkpoint.
    """
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


def size_metrics(model: CompactModel) -> dict[str, float]:
    """The figures of a network of constant size for the history."""
    architecture = model.architecture
    return {"params": float(count_params(architecture)), "macs": float(count_macs(architecture))}
