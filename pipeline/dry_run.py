"""A trial of a recipe: the model, the data and the budget, and estimates from a few steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..compress.data.batch_loader import BatchLoader
from ..compress.data.splits import DataSplits
from ..compress.network.count import count_macs, count_params
from ..compress.train.augment import FIXED_FORMS, Augmentation, seed_everything
from ..compress.train.dense import DenseTask
from ..compress.train.mask_task import MaskTask
from ..compress.train.precision import arithmetic
from ..compress.train.processes import ALONE, require_accelerate, require_shares
from ..compress.train.selection_task import SelectionTask
from ..compress.train.settings import TrainSettings
from ..compress.train.steps import Stepper
from ..compress.train.vtp_task import VtpTask
from ..core.console import status, unit_count
from .phases import dense_options, distillation, epoch_steps
from .recipe import Recipe
from .run import Prepared, prepare
from .selection_step import selection_objective, with_selections
from .training_host import placement_of, require_devices, require_trackers
from .training_steps import mask_task

# At least one step is timed, and at most this many, for about as many seconds.
STEPS, SECONDS = 5, 10.0
# On a CPU a timed step has fewer images than a batch, down to 8, if it has more multiply-adds.
MACS_ON_CPU, LEAST_IMAGES = 5e10, 8
# fp32 values for each weight: itself, its gradient, and the moments of the optimizer.
VALUES_PER_WEIGHT = {"adamw": 4, "muon": 3}


@dataclass(frozen=True)
class PhaseEstimate:
    """The estimate of one training.

    Attributes:
        phase: `baseline`, `tokens`, `masks` or `finetune`.
        epochs: The largest number of epochs; patience may end it earlier.
        steps: The optimizer steps of all epochs.
        step_s: Seconds of a step of the whole batch, images included.
        hours: Of all epochs with their validation, estimated.
        memory_bytes: Of weights, gradients, optimizer and activations in each process, estimated.
    """

    phase: str
    epochs: int
    steps: int
    step_s: float
    hours: float
    memory_bytes: int


@dataclass(frozen=True)
class DryRun:
    """The result of a trial.

    Attributes:
        recipe: The name of the recipe.
        device: Where training would run.
        precision: The type of its matrix products.
        params: The parameters of the dense model.
        macs: Its multiply-adds for one image.
        images: The number of images by split.
        phases: The trainings of the recipe, each with its estimate.
    """

    recipe: str
    device: str
    precision: str
    params: int
    macs: int
    images: dict[str, int]
    phases: tuple[PhaseEstimate, ...]

    @property
    def hours(self) -> float:
        """Of all trainings, estimated."""
        return sum(phase.hours for phase in self.phases)


@dataclass(frozen=True)
class _Timed:
    """What a few steps of one task cost: seconds and bytes for each image of the batch."""

    step_s: float
    loader_s: float
    activation_bytes: float
    weight_bytes: int


def dry_run(recipe: Recipe, *, processes: int = 1, quiet: bool = False) -> DryRun:
    """Try a recipe on this machine; no file of a run is written.

    Args:
        recipe: All settings.
        processes: The number of processes that would train.
        quiet: Show no progress.

    Returns:
        Sizes, and estimates of steps, hours and memory.

    Raises:
        InputError: Something in the recipe is missing here, or does not fit together.
    """
    placement, note = placement_of(recipe.train)
    require_trackers(recipe.train.trackers)
    if processes > 1:
        require_accelerate("--processes")
        require_devices(placement, processes)
    prepared = prepare(recipe, quiet=quiet)
    if note is not None:
        status(note, quiet=quiet)
    images = {part: len(getattr(prepared.data, part)) for part in ("train", "val", "test")}
    require_shares(recipe.train.batch_size, images["train"], processes)
    architecture = prepared.dense.architecture
    return DryRun(
        recipe.name,
        str(placement.device),
        placement.precision,
        count_params(architecture),
        count_macs(architecture),
        images,
        tuple(_phases(prepared, processes, quiet=quiet)),
    )


def lines(found: DryRun) -> Iterator[str]:
    """The result as text."""
    counts = ", ".join(f"{count:,} {part}" for part, count in found.images.items())
    yield (
        f"{found.recipe}: {unit_count(found.params)} parameters, {unit_count(found.macs)} MACs; "
        f"{counts} images; {found.device}, {found.precision}"
    )
    for phase in found.phases:
        yield (
            f"  {phase.phase:9} up to {phase.epochs} epochs, {phase.steps:,} steps of "
            f"{phase.step_s:.3g} s: {_duration(phase.hours)}, "
            f"{phase.memory_bytes / 1e9:.2f} GB (estimated)"
        )
    yield f"  all trainings: {_duration(found.hours)} at most (estimated); nothing was written"


def _duration(hours: float) -> str:
    if hours < 1.0:
        return f"{60.0 * hours:.1f} minutes"
    return f"{hours:.1f} hours"


def _phases(prepared: Prepared, processes: int, *, quiet: bool) -> Iterator[PhaseEstimate]:
    recipe, data = prepared.recipe, prepared.data
    budget = recipe.masks.params or recipe.masks.macs or 1.0
    # The size of the compact model is not known yet; its steps are at most in proportion to it.
    plan = (
        ("baseline", recipe.baseline.epochs, recipe.baseline.augmentation, 1.0),
        ("tokens", recipe.masks.alone_epochs, recipe.masks.augmentation, 1.0),
        (
            "masks",
            recipe.masks.width_epochs or recipe.masks.round_epochs,
            recipe.masks.augmentation,
            1.0,
        ),
        ("finetune", recipe.finetune.epochs, recipe.finetune.augmentation, budget),
    )
    for phase, epochs, augmentation, share in plan:
        if not epochs:
            continue
        status(f"timing steps of {phase}", quiet=quiet)
        timed = _time(prepared, phase, augmentation)
        batch = min(recipe.train.batch_size, len(data.train))
        own, steps = batch / processes, len(data.train) // batch
        compute_s, loader_s = own * share * timed.step_s, own * timed.loader_s
        workers = 0 if data.train.decoded else recipe.train.workers
        # Worker processes read the next batches during a step.
        step_s = max(compute_s, loader_s / workers) if workers else compute_s + loader_s
        # A forward pass is a third of a step.
        validation_s = len(data.val) / processes * share * timed.step_s / 3.0
        part = max(1.0, own / recipe.train.accumulate)
        memory = share * (timed.weight_bytes + part * timed.activation_bytes)
        yield PhaseEstimate(
            phase,
            epochs,
            epochs * steps,
            step_s,
            epochs * (steps * step_s + validation_s) / 3600.0,
            round(memory),
        )


def _task(prepared: Prepared, phase: str, augmentation: str) -> MaskTask | VtpTask | DenseTask:
    recipe = prepared.recipe
    # The outputs of the teacher for images in a few fixed forms are computed once.
    known = augmentation in FIXED_FORMS and placement_of(recipe.train)[0].waits
    if known:
        disabled = recipe.distill.model_copy(update={"enabled": False})
        recipe = recipe.model_copy(update={"distill": disabled})
    section, train, dense = recipe.masks, recipe.train, prepared.dense
    selecting = dense
    if section.selects_tokens and phase != "baseline":
        selecting = with_selections(dense, section, train.seed)
    if phase == "masks" and not section.round_epochs:
        start = dense if section.order == "widths-first" else selecting
        return mask_task(dense, prepared.data, recipe, prepared.round_to, start=start)
    if selecting is not dense:
        teacher, steps = distillation(dense, recipe), epoch_steps(recipe, prepared.data)
        alone = phase == "tokens"
        objective = selection_objective(recipe, dense, teacher, steps, alone=alone)
        options = dense_options(train, selecting)
        return SelectionTask(
            selecting, objective, phase=phase, optimizer=train.optimizer, options=options
        )
    return DenseTask(
        copy.deepcopy(prepared.dense),
        phase=phase,
        optimizer=train.optimizer,
        distillation=distillation(prepared.dense, recipe) if phase == "finetune" else None,
        options=dense_options(train, prepared.dense),
    )


def _time(prepared: Prepared, phase: str, augmentation: str) -> _Timed:
    """Take a few steps of a phase on copies of the model."""
    recipe, data = prepared.recipe, prepared.data
    place = placement_of(recipe.train)[0]
    batch = min(recipe.train.batch_size, len(data.train))
    # A GPU is slower for each image of a small batch, so that the whole part is timed there.
    count = max(1, batch // recipe.train.accumulate)
    if place.waits:
        fitting = int(MACS_ON_CPU / (3 * count_macs(prepared.dense.architecture)))
        count = min(count, max(LEAST_IMAGES, fitting))
    count -= count % 2 if count > 1 else 0
    settings = TrainSettings(1, count, recipe.train.seed, placement=place)
    seed_everything(recipe.train.seed)
    task = _task(prepared, phase, augmentation)
    train = recipe.train
    with arithmetic(train.matmul_precision, train.threads, task.model_for_eval(), place):
        task.place(place)
        try:
            task.train_mode()
            stepper = Stepper(task, settings, ALONE)
            stepper.use(task.optimizer())
            images, targets, loader_s = _batch(data, count, augmentation, recipe)
            images, targets = place.images(images), place.moved(targets)
            with _activations(task.trained()) as sizes:
                stepper.step(images, targets, 0, "")
            step_s = _step_seconds(stepper, images, targets)
        finally:
            task.place(type(place)())
    weights = sum(parameter.numel() for parameter in task.trained().parameters())
    values = VALUES_PER_WEIGHT[recipe.train.optimizer] + (task.distillation is not None)
    return _Timed(
        step_s / count, loader_s / count, sum(sizes.values()) / count, 4 * weights * values
    )


def _batch(
    data: DataSplits, count: int, augmentation: str, recipe: Recipe
) -> tuple[Tensor, Tensor, float]:
    """One augmented batch, and the seconds that it took."""
    augment = Augmentation(
        augmentation,  # type: ignore[arg-type]
        data.preprocessing,
        data.classes,
        recipe.train.label_smoothing,
        decoded=data.train.decoded,
    )
    transform = augment.image_transform
    loader = BatchLoader(data.train, count, seed=recipe.train.seed, transform=transform)
    started = time.perf_counter()
    images, targets = augment(*next(loader.epoch(1)))
    return images, targets, time.perf_counter() - started


def _step_seconds(stepper: Stepper, images: Tensor, targets: Tensor) -> float:
    """The shortest of a few steps."""
    found: list[float] = []
    while len(found) < STEPS and sum(found) < SECONDS:
        started = time.perf_counter()
        loss, _ = stepper.step(images, targets, len(found) + 1, "")
        # Reading the value waits for the device.
        float(loss)
        found.append(time.perf_counter() - started)
    return min(found)


class _activations:
    """Counts the bytes of each storage that a forward pass keeps for its backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> dict[int, int]:
        self.hooks.__enter__()
        return self.sizes

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
