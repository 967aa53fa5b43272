"""The training loop of every phase: batches, learning rate, progress, checkpoints, early stopping.

A resumed run gives the same weights as an uninterrupted one: the order of images comes from (seed,
epoch), the global random generators are saved at the end of each epoch, and the learning rate is a
function of the step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ...core.errors import InputError
from ..data.splits import DataSplits
from .augment import Augmentation, seed_everything
from .evaluate import evaluate, top1
from .precision import arithmetic
from .progress import TrainingProgress
from .schedule import LearningRate
from .settings import TrainResult, TrainSettings
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
_FREE = frozenset({"threads", "quiet"})


def fit(
    task: Task,
    data: DataSplits,
    settings: TrainSettings,
    folder: Path,
    *,
    history: Path | None = None,
    resume: bool = False,
    progress: Callable[..., TrainingProgress] = TrainingProgress,
) -> TrainResult:
    """Train a task, and leave it in its best state.

    After each epoch the model is validated and a checkpoint is written, so that Ctrl-C or a kill
    loses at most one epoch.

    Args:
        task: The phase to train.
        data: Trains on `data.train`, validates on `data.val`.
        settings: How long and how to train.
        folder: For checkpoint.pt and best.pt.
        history: The history.jsonl of the run (default: in `folder`).
        resume: Continue from the checkpoint in `folder` if there is one; otherwise it is replaced.
        progress: Creates the progress display.

    Returns:
        The best epoch and the history of the phase.

    Raises:
        InputError: The loss is not finite, the checkpoint has other settings, or the disk is full.
        KeyboardInterrupt: On Ctrl-C; the checkpoint is whole.
    """
    folder = Path(folder)
    history = Path(history) if history else folder / "history.jsonl"
    precision, threads = settings.matmul_precision, settings.threads
    with _restored_generators(), arithmetic(precision, threads, task.model_for_eval()):
        return _Run(task, data, settings, folder, history, resume).train(progress)


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
    ) -> None:
        self.task, self.data, self.settings = task, data, settings
        self.folder, self.history = folder, history
        self.augment = Augmentation(
            settings.augmentation, data.preprocessing, data.classes, settings.label_smoothing
        )
        self.batch_size = _batch_size(len(data.train), settings)
        self.steps = len(data.train) // self.batch_size
        self.epoch, self.best_epoch, self.best_score, self.best_val_top1 = 0, 0, -math.inf, 0.0
        self.stopped: str | None = None
        # The last metrics of the task (remaining parameters and MACs), for the live line.
        self.metrics: dict[str, float] = {}
        self.identity = {
            "phase": task.phase,
            "data": f"{data.name}, {len(data.train)} images",
            **{key: value for key, value in asdict(settings).items() if key not in _FREE},
        }
        path = folder / CHECKPOINT
        if resume and path.is_file():
            self._load(path)
        else:
            seed_everything(settings.seed)
            self._set_optimizer(task.optimizer())
            for stale in (path, folder / BEST):
                stale.unlink(missing_ok=True)
        self.records = rewind_history(history, task.phase, self.epoch)

    def train(self, make_progress: Callable[..., TrainingProgress]) -> TrainResult:
        first = self.epoch + 1
        progress = make_progress(
            self.task.phase, self.settings.epochs, self.steps, first, quiet=self.settings.quiet
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
        if self.settings.restore_best and 0 < self.best_epoch < self.epoch:
            self.task.load_state(read_state(self.folder / BEST)["task"])
        return TrainResult(
            self.epoch, self.best_epoch, self.best_val_top1, self.stopped, self.records
        )

    def _epoch(self, progress: TrainingProgress) -> tuple[dict[str, Any], EpochEnd]:
        epoch, started = self.epoch + 1, time.perf_counter()
        self.task.train_mode()
        loss_sum = top1_sum = 0.0
        loader_s, rate, figures = 0.0, 0.0, {}
        for step, (images, targets, batch_s) in enumerate(self._batches(epoch)):
            loader_s += batch_s
            rate = self.rate.set((epoch - 1) * self.steps + step)
            loss, logits = self._step(epoch, step, rate, images, targets)
            loss_sum += loss
            top1_sum += top1(logits, targets)
            seconds = time.perf_counter() - started
            figures = {
                "loss": loss_sum / (step + 1),
                "train_top1": top1_sum / (step + 1),
                "images_per_s": (step + 1) * self.batch_size / seconds,
                "loader_share": loader_s / seconds,
            }
            progress.step(epoch, step + 1, {**self.metrics, **figures})
        val_top1 = evaluate(self.task.model_for_eval(), self.data.val, title="validating")
        end = self.task.after_epoch(epoch, val_top1)
        self.metrics = dict(end.metrics)
        record = {
            "phase": self.task.phase,
            "epoch": epoch,
            **figures,
            "val_top1": val_top1,
            "lr": rate,
            **end.metrics,
        }
        return {**record, "seconds": time.perf_counter() - started}, end

    def _step(
        self, epoch: int, step: int, rate: float, images: Tensor, targets: Tensor
    ) -> tuple[float, Tensor]:
        """One optimizer step; returns the loss and the logits."""
        whole_step = (epoch - 1) * self.steps + step
        loss, logits = self.task.loss(images, targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"{self.task.phase}: the loss became {value} at step {whole_step} "
                f"(epoch {epoch}) with learning rate {rate:.3g}; "
                "lower the learning rate, lengthen the warmup, or lower lambda"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.settings.grad_clip is not None:
            groups = self.optimizer.param_groups
            parameters = [parameter for group in groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.task.after_step(whole_step)
        return value, logits.detach()

    def _set_optimizer(self, optimizer: Optimizer) -> None:
        self.optimizer, settings = optimizer, self.settings
        self.rate = LearningRate(optimizer, settings.schedule, settings.epochs, self.steps)

    def _end_epoch(self, record: dict[str, Any], end: EpochEnd) -> None:
        self.epoch += 1
        score = record["val_top1"] if end.score is None else end.score
        if score > self.best_score:
            self.best_epoch, self.best_score = self.epoch, score
            self.best_val_top1 = record["val_top1"]
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
        append_history(self.history, record)
        write_state(self.folder / CHECKPOINT, self._state())
        self.records.append(record)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        generator = np.random.Generator(np.random.PCG64([self.settings.seed, epoch]))
        order = generator.permutation(len(self.data.train))
        for step in range(self.steps):
            started = time.perf_counter()
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, targets = self.augment(*self.data.train.batch(indices))
            yield images, targets, time.perf_counter() - started

    def _state(self) -> dict[str, Any]:
        return {
            "schema": "vitrim.checkpoint/1",
            "settings": self.identity,
            "epoch": self.epoch,
            "best": [self.best_epoch, self.best_score, self.best_val_top1],
            "stopped": self.stopped,
            "task": self.task.state(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(),
        }

    def _load(self, path: Path) -> None:
        state = read_state(path)
        if state.get("schema") != "vitrim.checkpoint/1":
            raise InputError(
                f"{path}: not a training checkpoint of vitrim; delete it to start this phase again"
            )
        for key, value in self.identity.items():
            before = state["settings"].get(key)
            if before != value:
                raise InputError(
                    f"{path}: it was trained with {key} = {before!r}, now {value!r}; "
                    "resume with the same settings, or start again without --resume"
                )
        # The task first, since it may rebuild a smaller model for the optimizer.
        self.task.load_state(state["task"])
        self._set_optimizer(self.task.optimizer())
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.stopped = state["epoch"], state["stopped"]
        self.best_epoch, self.best_score, self.best_val_top1 = state["best"]
        set_random_states(state["random"])


def _batch_size(images: int, settings: TrainSettings) -> int:
    size = min(settings.batch_size, images)
    if settings.augmentation == "thesis" and size % 2:
        # MixUp pairs the images of a batch.
        if size == 1:
            raise InputError(
                'MixUp (augmentation = "thesis") pairs images; '
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
