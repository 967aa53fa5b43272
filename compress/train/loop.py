"""The training loop of every phase: batches, learning rate, progress, checkpoints, early stopping.

A resumed run gives the same weights as an uninterrupted one: the order of images comes from (seed,
epoch), the global random generators are saved at the end of each epoch, and the learning rate is a
function of the step.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from ...core.errors import InputError
from ..data.batch_loader import BatchLoader
from ..data.splits import DataSplits
from .augment import MIXING, Augmentation, seed_everything
from .devices import Placement, tensors_to_cpu
from .evaluate import evaluate
from .precision import arithmetic
from .processes import ALONE, Processes, require_shares
from .progress import TrainingProgress
from .schedule import LearningRate
from .settings import TrainResult, TrainSettings
from .steps import STEPS_BETWEEN_READS, EpochSums, Stepper
from .task import EpochEnd, Task
from .training_files import (
    append_history,
    random_states,
    read_state,
    rewind_history,
    set_random_states,
    write_state,
)

CHECKPOINT, BEST = "checkpoint.pt", "best.pt"
# Settings that may change in a resumed run, since the result does not depend on them.
_FREE = frozenset({"threads", "quiet", "placement", "workers", "checkpoint_s"})
# Defaults of settings that earlier checkpoints do not have.
_LATER = {"accumulate": 1}


def fit(
    task: Task,
    data: DataSplits,
    settings: TrainSettings,
    folder: Path,
    *,
    history: Path | None = None,
    resume: bool = False,
    progress: Callable[..., TrainingProgress] = TrainingProgress,
    processes: Processes = ALONE,
) -> TrainResult:
    """Train a task, and leave it in its best state, on the CPU.

    After each epoch the model is validated and a checkpoint is written, so that Ctrl-C or a kill
    loses at most one epoch; in long epochs also after each `settings.checkpoint_s`.

    Args:
        task: The phase to train.
        data: Trains on `data.train`, validates on `data.val`.
        settings: How long and how to train.
        folder: For checkpoint.pt and best.pt.
        history: The history.jsonl of the run (default: in `folder`).
        resume: Continue from the checkpoint in `folder` if there is one; otherwise it is replaced.
            It may have been written on another device, and by another number of processes.
        progress: Creates the progress display.
        processes: They share each batch; the main one writes the files, which all of them read.

    Returns:
        The best epoch and the history of the phase.

    Raises:
        InputError: The loss is not finite, the checkpoint has other settings, the batch cannot be
            divided among the processes, or the disk is full.
        KeyboardInterrupt: On Ctrl-C; the checkpoint is whole.
    """
    folder = Path(folder)
    history = Path(history) if history else folder / "history.jsonl"
    place = settings.placement
    with (
        _restored_generators(),
        arithmetic(settings.matmul_precision, settings.threads, task.model_for_eval(), place),
    ):
        task.place(place)
        try:
            run = _Run(task, data, settings, folder, history, resume, processes)
            return run.train(progress)
        finally:
            task.place(Placement())


class _Run:
    """The state of one phase in training."""

    def __init__(
        self,
        task: Task,
        data: DataSplits,
        settings: TrainSettings,
        folder: Path,
        history: Path,
        resume: bool,
        processes: Processes,
    ) -> None:
        self.task, self.data, self.settings, self.processes = task, data, settings, processes
        self.folder, self.history, self.place = folder, history, settings.placement
        self.augment = Augmentation(
            settings.augmentation,
            data.preprocessing,
            data.classes,
            settings.label_smoothing,
            decoded=data.train.decoded,
        )
        self.batch_size = _batch_size(len(data.train), settings, processes.count)
        self.loader = BatchLoader(
            data.train,
            self.batch_size,
            seed=settings.seed,
            workers=settings.workers,
            transform=self.augment.image_transform,
            rank=processes.rank,
            ranks=processes.count,
        )
        self.steps = self.loader.steps
        self.epoch, self.best_epoch, self.best_score, self.best_val_top1 = 0, 0, -math.inf, 0.0
        self.stopped: str | None = None
        # Of the present epoch: the steps done, and the sums over them of this process.
        self.sums = EpochSums()
        # The last metrics of the task (remaining parameters and MACs), for the live line.
        self.metrics: dict[str, float] = {}
        self.stepper = Stepper(task, settings, processes)
        self.identity = {
            "phase": task.phase,
            "data": f"{data.name}, {len(data.train)} images",
            **_identity(settings),
        }
        path = folder / CHECKPOINT
        if processes.from_main(resume and path.is_file()):
            self._load(path)
        else:
            seed_everything(settings.seed)
            self._set_optimizer(task.optimizer())
            if processes.is_main:
                for stale in (path, folder / BEST):
                    stale.unlink(missing_ok=True)
        self.records: list[dict[str, Any]] = []
        with processes.main_first():
            if processes.is_main:
                self.records = rewind_history(history, task.phase, self.epoch)
        self.records = processes.from_main(self.records)

    def train(self, make_progress: Callable[..., TrainingProgress]) -> TrainResult:
        first = self.epoch + 1
        quiet = self.settings.quiet or not self.processes.is_main
        progress = make_progress(
            self.task.phase, self.settings.epochs, self.steps, first, quiet=quiet
        )
        try:
            while self.epoch < self.settings.epochs and self.stopped is None:
                record, end = self._epoch(progress)
                self._end_epoch(record, end)
                progress.epoch({**end.metrics, **record})
                if self.stopped:
                    progress.message(f"stopped after epoch {self.epoch}: {self.stopped}")
        except KeyboardInterrupt:
            progress.message(
                f"interrupted; {self.epoch} whole epochs are kept in {self.folder}, "
                "--resume continues from there"
            )
            raise
        finally:
            progress.close()
            self.loader.close()
        if self.settings.restore_best and 0 < self.best_epoch < self.epoch:
            self.task.load_state(read_state(self.folder / BEST)["task"])
        self.task.finish()
        return TrainResult(
            self.epoch, self.best_epoch, self.best_val_top1, self.stopped, self.records
        )

    def _epoch(self, progress: TrainingProgress) -> tuple[dict[str, Any], EpochEnd]:
        epoch, sums = self.epoch + 1, self.sums
        if not sums.steps and self.processes.count > 1:
            # Each process draws its own numbers, also after a kill.
            seed_everything(_epoch_seed(self.settings.seed, epoch, self.processes.rank))
        self.task.train_mode()
        rate, started = 0.0, time.perf_counter()
        written = started
        for images, targets, batch_s in self._batches(epoch):
            sums.loader_s += batch_s
            number = (epoch - 1) * self.steps + sums.steps
            rate = self.rate.set(number)
            where = f"(epoch {epoch}) with learning rate {rate:.3g}"
            sums.add(*self.stepper.step(images, targets, number, where), targets)
            figures = {**sums.known_means(), **self._speed(started)}
            progress.step(epoch, sums.steps, {**self.metrics, **figures})
            if self._is_due(written) and sums.steps < self.steps:
                sums.seconds += time.perf_counter() - started
                self._write_checkpoint()
                written = started = time.perf_counter()
        figures = {**sums.means(), **self._speed(started)}
        model = self.task.model_for_eval()
        val_top1 = evaluate(model, self.data.val, title="validating", processes=self.processes)
        end = self.task.after_epoch(epoch, val_top1)
        self.metrics = dict(end.metrics)
        if self.processes.count > 1:
            text = json.dumps([val_top1, self.metrics, end.stop, end.score])
            self.processes.require_equal(text, "masks and accuracy")
            for key in ("loss", "train_top1"):
                figures[key] = self.processes.sum([figures[key]])[0] / self.processes.count
        record = {
            "phase": self.task.phase,
            "epoch": epoch,
            **figures,
            "val_top1": val_top1,
            "lr": rate,
            **end.metrics,
        }
        skipped = round(self.processes.sum([self.loader.skipped])[0])
        if skipped:
            record["skipped_images"] = skipped
            first = self.loader.first_skipped
            example = "" if first is None else f", e.g. {first.partition('; repair')[0]}"
            progress.message(f"epoch {epoch}: {skipped} unreadable images skipped{example}")
        seconds = sums.seconds + time.perf_counter() - started
        return {**record, "seconds": seconds}, end

    def _speed(self, started: float) -> dict[str, float]:
        """Images per second of all processes, and the share of time for reading them."""
        seconds = self.sums.seconds + time.perf_counter() - started
        return {
            "images_per_s": self.sums.steps * self.batch_size / seconds,
            "loader_share": self.sums.loader_s / seconds,
        }

    def _set_optimizer(self, optimizer: Optimizer) -> None:
        epochs, schedule = self.settings.epochs, self.settings.schedule
        self.rate = LearningRate(optimizer, schedule, epochs, self.steps)
        self.stepper.use(optimizer)

    def _end_epoch(self, record: dict[str, Any], end: EpochEnd) -> None:
        self.epoch += 1
        self.sums = EpochSums()
        score = record["val_top1"] if end.score is None else end.score
        if score > self.best_score:
            self.best_epoch, self.best_score = self.epoch, score
            self.best_val_top1 = record["val_top1"]
            if self.processes.is_main:
                # Before the checkpoint: after a kill between the two this epoch is repeated.
                write_state(self.folder / BEST, {"epoch": self.epoch, "task": self.task.state()})
        if end.optimizer is not None:
            self._set_optimizer(end.optimizer)
        patience = self.settings.patience_epochs
        if end.stop:
            self.stopped = end.stop
        elif patience is not None and self.best_epoch and self.epoch - self.best_epoch >= patience:
            self.stopped = f"no better validation top-1 for {patience} epochs"
        # Also before the checkpoint: a resumed run drops lines past its checkpoint.
        if self.processes.is_main:
            append_history(self.history, record)
        self._write_checkpoint()
        self.records.append(record)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The rest of the batches of an epoch on the device, and the seconds that each took."""
        batches = self.loader.epoch(epoch)
        while True:
            started = time.perf_counter()
            found = next(batches, None)
            if found is None:
                return
            images, targets = self.augment(*found)
            images, targets = self.place.images(images), self.place.moved(targets)
            yield images, targets, time.perf_counter() - started

    def _is_due(self, written: float) -> bool:
        """Whether a checkpoint within the epoch is due, as the main process decides."""
        every = self.settings.checkpoint_s
        if self.processes.count > 1 and self.sums.steps % STEPS_BETWEEN_READS:
            return False
        return self.processes.from_main(time.perf_counter() - written > every)

    def _write_checkpoint(self) -> None:
        inside = None
        if self.sums.steps:
            sums = self.sums.state()
            inside = self.processes.gather({"loader": self.loader.state_dict(), "sums": sums})
        if self.processes.is_main:
            write_state(self.folder / CHECKPOINT, self._state(inside))
        self.processes.wait()

    def _state(self, inside: list[dict[str, Any]] | None) -> dict[str, Any]:
        return {
            "schema": "vitrim.checkpoint/1",
            "settings": self.identity,
            "epoch": self.epoch,
            "content": self._content(),
            # Within an epoch: the position of each process.
            "inside": inside,
            "best": [self.best_epoch, self.best_score, self.best_val_top1],
            "stopped": self.stopped,
            "task": self.task.state(),
            "optimizer": tensors_to_cpu(self.stepper.optimizer.state_dict()),
            "scaler": self.stepper.scaler.state_dict(),
            "random": random_states(),
        }

    def _content(self) -> str | None:
        """The fingerprint of data that is read anew in every epoch, and could change."""
        return None if self.data.train.decoded else self.data.train.fingerprint

    def _load(self, path: Path) -> None:
        state = read_state(path)
        if state.get("schema") != "vitrim.checkpoint/1":
            raise InputError(
                f"{path}: not a training checkpoint of vitrim; delete it to start this phase again"
            )
        for key, value in self.identity.items():
            # A setting that the version of the checkpoint did not have was at its default.
            before = state["settings"].get(key, _LATER.get(key))
            if before != value:
                raise InputError(
                    f"{path}: it was trained with {key} = {before!r}, now {value!r}; "
                    "resume with the same settings, or start again without --resume"
                )
        if state.get("content") and self._content() not in (None, state["content"]):
            raise InputError(
                f"{path}: the data changed since it was written (a file was added, removed or "
                "rewritten); restore what it was, or start again without --resume"
            )
        # The task first, since it may rebuild a smaller model for the optimizer.
        self.task.load_state(state["task"])
        self._set_optimizer(self.task.optimizer())
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.epoch, self.stopped = state["epoch"], state["stopped"]
        self.best_epoch, self.best_score, self.best_val_top1 = state["best"]
        set_random_states(state["random"])
        self._enter_epoch(path, state.get("inside"))

    def _enter_epoch(self, path: Path, inside: list[dict[str, Any]] | None) -> None:
        """Continue within an epoch, at the position of a checkpoint."""
        if inside is None:
            return
        if len(inside) != self.processes.count:
            raise InputError(
                f"{path}: it was written within an epoch by {len(inside)} processes, now "
                f"{self.processes.count}; resume with as many"
            )
        own = inside[self.processes.rank]
        self.loader.load_state_dict(own["loader"])
        self.sums = EpochSums(**own["sums"])
        if self.processes.count > 1:
            epoch, steps = self.epoch + 1, self.sums.steps
            seed = _epoch_seed(self.settings.seed, epoch, self.processes.rank, steps)
            seed_everything(seed)


def _epoch_seed(seed: int, epoch: int, rank: int, step: int = 0) -> int:
    """The seed of one process among several."""
    return int(np.random.SeedSequence([seed, epoch, rank, step]).generate_state(1)[0])


def _identity(settings: TrainSettings) -> dict[str, Any]:
    """The settings that the result depends on."""
    found = {key: value for key, value in asdict(settings).items() if key not in _FREE}
    if settings.schedule.rewind is None:
        # Earlier checkpoints do not have it.
        del found["schedule"]["rewind"]
    return found


def _batch_size(images: int, settings: TrainSettings, processes: int) -> int:
    """The number of images in a step, at most those that there are, over all processes."""
    given = settings.batch_size
    require_shares(given, images, processes)
    size = min(given, images)
    if processes > 1:
        unit = 2 * processes if settings.augmentation in MIXING else processes
        size -= size % unit
        if not size:
            raise InputError(
                f'MixUp (augmentation = "{settings.augmentation}") pairs the images of each of '
                f"{processes} processes; use a batch_size and a data set of at least {unit}"
            )
        return size
    if settings.augmentation in MIXING and size % 2:
        # MixUp pairs the images of a batch.
        if size == 1:
            raise InputError(
                f'MixUp (augmentation = "{settings.augmentation}") pairs images; '
                "use a batch_size and a data set of at least 2"
            )
        size -= 1
    return size


@contextlib.contextmanager
def _restored_generators() -> Iterator[None]:
    """Restore the global random generators, from which training draws, for the caller."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)
