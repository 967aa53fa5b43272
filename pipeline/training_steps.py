"""The three trainings of the chain: the dense baseline, the masks, and the fine-tuning of what is
left.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compress.data.splits import DataSplits
from ..compress.masks.budget import Budget
from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import load, save
from ..compress.network.modules.model import CompactModel
from ..compress.train.augment import seed_everything
from ..compress.train.dense import DenseTask, Distillation
from ..compress.train.loop import Schedule, TrainSettings, fit
from ..compress.train.mask_task import MaskSettings, MaskTask
from ..core.storage import replace_file
from .recipe import Recipe
from .recipe_sections import BaselineSection, FinetuneSection
from .run_folder import RunFolder

BASELINE, MASK, CUT, COMPACT, CUT_PARITY = (
    "baseline",
    "mask.safetensors",
    "cut",
    "compact",
    "cut-parity.json",
)
HISTORY = "history.jsonl"
PARITY_IMAGES = 64


@dataclass(frozen=True)
class Cut:
    """What mask learning leaves behind: the model cut by its masks, what was kept of the baseline,
    and how far the cut moved the logits.
    """

    model: CompactModel
    mask: StructuredMask
    max_relative_error: float


def train_baseline(
    dense: CompactModel,
    data: DataSplits,
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool,
    quiet: bool,
) -> CompactModel:
    """The dense model, trained by `[baseline]` where it asks for epochs; saved in baseline/."""
    _train_dense(
        dense, "baseline", recipe.baseline, None, data, recipe, folder, resume=resume, quiet=quiet
    )
    save(dense, folder / BASELINE, overwrite=True)
    return dense.eval()


def learn_masks(
    baseline: CompactModel,
    data: DataSplits,
    recipe: Recipe,
    round_to: int,
    folder: RunFolder,
    *,
    resume: bool,
    quiet: bool,
) -> Cut:
    """Learn what may go, cut it out; mask.safetensors says what was kept, cut/ is the smaller
    model.
    """
    task = mask_task(copy.deepcopy(baseline), baseline, data, recipe, round_to)
    # A budget follows its own ramp, so the learning rate falls once; the source's lambda recipe
    # restarts.
    kind = "cosine" if recipe.masks.lambda_ is None else "restarts"
    schedule = Schedule(kind, restart_epochs=recipe.masks.restart_epochs, min_lr=1e-8)  # type: ignore[arg-type]
    # The task itself says when an epoch may be the best and when to stop.
    settings = _settings(
        recipe, recipe.masks.epochs, recipe.masks.augmentation, schedule, None, quiet
    )
    _fit(task, data, settings, folder, resume)
    model, mask = task.result(), task.mask()
    error = cut_error(task, model, data.val.floats(slice(0, PARITY_IMAGES)))
    save(model, folder / CUT, overwrite=True)
    mask.save(folder / MASK)
    replace_file(folder / CUT_PARITY, json.dumps({"max_relative_error": error}) + "\n")
    return Cut(model, mask, error)


def mask_task(
    model: CompactModel, teacher: CompactModel, data: DataSplits, recipe: Recipe, round_to: int
) -> MaskTask:
    """The task of `[masks]`. Errors: InputError for a budget that no mask can meet, with the
    smallest feasible one.
    """
    section = recipe.masks
    kind, ratio = (
        ("params", section.params) if section.params is not None else ("macs", section.macs)
    )
    settings = MaskSettings(
        budget=None if ratio is None else Budget("params" if kind == "params" else "macs", ratio),
        lambda_=section.lambda_,
        sharing=section.sharing,
        fixed=section.fixed,
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

    return MaskTask(model, settings, steps, distillation=distillation(teacher, recipe))


def finetune(
    cut: CompactModel,
    baseline: CompactModel,
    data: DataSplits,
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool,
    quiet: bool,
) -> CompactModel:
    """Train the cut model by `[finetune]`; saved in compact/."""
    model = copy.deepcopy(cut)
    _train_dense(
        model,
        "finetune",
        recipe.finetune,
        distillation(baseline, recipe),
        data,
        recipe,
        folder,
        resume=resume,
        quiet=quiet,
    )
    save(model, folder / COMPACT, overwrite=True)
    return model.eval()


def _train_dense(
    model: CompactModel,
    phase: str,
    section: BaselineSection | FinetuneSection,
    teacher: Distillation | None,
    data: DataSplits,
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool,
    quiet: bool,
) -> None:
    """Train `model` in place by its section of the recipe, where that asks for epochs."""
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
    )
    schedule = Schedule("cosine", section.warmup_epochs)
    settings = _settings(
        recipe, section.epochs, section.augmentation, schedule, section.patience_epochs, quiet
    )
    _fit(task, data, settings, folder, resume)


def distillation(teacher: CompactModel, recipe: Recipe) -> Distillation | None:
    """The dense model as teacher, unless `[distill]` is off."""
    section = recipe.distill
    if not section.enabled:
        return None
    return Distillation(teacher, alpha=section.alpha, temperature=section.temperature)


def cut_error(task: MaskTask, model: CompactModel, images: Tensor) -> float:
    """Largest difference between the masked network and the cut one, relative to the largest
    logit.
    """
    network, mask = task.reference()
    with torch.inference_mode():
        wanted, found = masked(network, mask).eval()(images), model(images)
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))


def load_cut(folder: RunFolder) -> Cut:
    """What `learn_masks` left in the run folder."""
    parity = json.loads((folder / CUT_PARITY).read_text(encoding="utf-8"))
    return Cut(
        load(folder / CUT), StructuredMask.load(folder / MASK), float(parity["max_relative_error"])
    )


def seed_weights(recipe: Recipe) -> None:
    """Seed what builds the untrained model."""
    seed_everything(recipe.train.seed)


def _settings(
    recipe: Recipe,
    epochs: int,
    augmentation: str,
    schedule: Schedule,
    patience: int | None,
    quiet: bool,
) -> TrainSettings:
    train = recipe.train
    return TrainSettings(
        epochs=epochs,
        batch_size=train.batch_size,
        seed=train.seed,
        augmentation=augmentation,  # type: ignore[arg-type]
        label_smoothing=train.label_smoothing,
        schedule=schedule,
        patience_epochs=patience,
        matmul_precision=train.matmul_precision,
        threads=train.threads,
        quiet=quiet,
    )


def _fit(
    task: MaskTask | DenseTask,
    data: DataSplits,
    settings: TrainSettings,
    folder: RunFolder,
    resume: bool,
) -> None:
    training = folder / f"training/{task.phase}"
    fit(task, data, settings, training, history=folder / HISTORY, resume=resume)


def _size(model: CompactModel) -> dict[str, float]:
    return {
        "params": float(count_params(model.architecture)),
        "macs": float(count_macs(model.architecture)),
    }
