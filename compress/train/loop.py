"""The training loop of every phase: batches, learning rate, progress, checkpoints, early stop; what
is trained is the task's business.

A run that was killed and resumed gives the same weights as one that was not: the order of images
comes from (seed, epoch), the global random generators are saved at the end of each epoch, and the
learning rate is a function of the step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError
from ..data.splits import DataSplits
from .augment import Augmentation, Preset, seed_everything
from .evaluate import evaluate, top1
from .precision import arithmetic
from .progress import TrainingProgress
from .schedule import LearningRate, Schedule
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
# Settings that may differ between a run and its continuation, since they do not change what is
# computed.
_FREE = frozenset({"threads", "quiet"})


@dataclass(frozen=True)
class TrainSettings:
    """How long and how a phase trains. Learning rates and weight decay belong to the task's
    optimizer.

    patience_epochs: stop after so many epochs without a better score; None never does. grad_clip:
    largest gradient norm, None is off. restore_best: end with the task in its best-scored state
    instead of the last. threads: torch threads, None leaves them.
    """

    epochs: int
    batch_size: int = 128
    seed: int = 7
    augmentation: Preset = "light"
    label_smoothing: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)
    patience_epochs: int | None = None
    grad_clip: float | None = 1.0
    restore_best: bool = True
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    threads: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise InputError(
                f"training: epochs = {self.epochs} and batch_size = {self.batch_size} must be at least 0 and 1"
            )


@dataclass(frozen=True)
class TrainResult:
    """How a phase went. best_epoch is 0 when no epoch qualified; top-1 in percent; history as in
    history.jsonl, this phase only.
    """

    epochs: int
    best_epoch: int
    best_val_top1: float
    stopped: str | None
    history: list[dict[str, Any]]


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
    """Train `task` on `data.train`, look at `data.val` after each epoch, and leave the task in its
    best state.

    folder: receives checkpoint.pt and best.pt. history: the run's history.jsonl (default: in
    `folder`). resume: continue from the checkpoint in `folder` if there is one; otherwise an old
    checkpoint is replaced. Errors: InputError for a loss that is not finite, a checkpoint of other
    settings, a full disk. Ctrl-C passes through as KeyboardInterrupt; everything up to the last
    whole epoch is on disk.
    """
    with (
        _own_generators(),
        arithmetic(settings.matmul_precision, settings.threads, task.model_for_eval()),
    ):
        return _Run(
            task,
            data,
            settings,
            Path(folder),
            Path(history) if history else Path(folder) / "history.jsonl",
            resume,
        ).train(progress)


class _Run:
    def __init__(
        self,
        task: Task,
        data: DataSplits,
        settings: TrainSettings,
        folder: Path,
        history: Path,
        resume: bool,
    ) -> None:
        self.task, self.data, self.settings, self.folder, self.history = (
            task,
            data,
            settings,
            folder,
            history,
        )
        self.augment = Augmentation(
            settings.augmentation, data.preprocessing, data.classes, settings.label_smoothing
        )
        self.batch_size = _batch_size(len(data.train), settings)
        self.steps = len(data.train) // self.batch_size
        self.epoch, self.best_epoch, self.best_score, self.best_val_top1 = 0, 0, -math.inf, 0.0
        self.stopped: str | None = None
        # The task's last word (remaining parameters and MACs), for the live line.
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
            self.optimizer = task.optimizer()
            self.rate = LearningRate(self.optimizer, settings.schedule, settings.epochs, self.steps)
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
                self._close_epoch(record, end)
                progress.epoch({**end.metrics, **record})
                if self.stopped:
                    progress.message(f"stopped after epoch {self.epoch}: {self.stopped}")
        except KeyboardInterrupt:
            progress.message(
                f"interrupted; {self.epoch} whole epochs are kept in {self.folder}, --resume continues from there"
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
        loss_sum = right = 0.0
        loader_s, rate, figures = 0.0, 0.0, {}
        for step, (images, targets, waited_s) in enumerate(self._batches(epoch)):
            loader_s += waited_s
            whole_step = (epoch - 1) * self.steps + step
            rate = self.rate.set(whole_step)
            loss, logits = self.task.loss(images, targets)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(
                    f"{self.task.phase}: the loss became {value} at step {whole_step} (epoch {epoch}) with learning rate {rate:.3g}; "
                    "lower the learning rate, lengthen the warmup, or lower lambda"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.settings.grad_clip is not None:
                parameters = [
                    parameter
                    for group in self.optimizer.param_groups
                    for parameter in group["params"]
                ]
                torch.nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
            self.optimizer.step()
            self.task.after_step(whole_step)
            loss_sum += value
            right += top1(logits.detach(), targets)
            seconds = time.perf_counter() - started
            figures = {
                "loss": loss_sum / (step + 1),
                "train_top1": right / (step + 1),
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

    def _close_epoch(self, record: dict[str, Any], end: EpochEnd) -> None:
        self.epoch += 1
        score = record["val_top1"] if end.score is None else end.score
        if score > self.best_score:
            self.best_epoch, self.best_score, self.best_val_top1 = (
                self.epoch,
                score,
                record["val_top1"],
            )
            # Before the checkpoint: a kill between the two repeats this epoch and writes the same
            # file again.
            write_state(self.folder / BEST, {"epoch": self.epoch, "task": self.task.state()})
        if end.optimizer is not None:
            self.optimizer = end.optimizer
            self.rate = LearningRate(
                self.optimizer, self.settings.schedule, self.settings.epochs, self.steps
            )
        patience = self.settings.patience_epochs
        if end.stop:
            self.stopped = end.stop
        elif patience is not None and self.best_epoch and self.epoch - self.best_epoch >= patience:
            self.stopped = f"no better validation top-1 for {patience} epochs"
        # Before the checkpoint too: a resumed run drops lines past its checkpoint, but could not
        # make up for a missing one.
        append_history(self.history, record)
        write_state(self.folder / CHECKPOINT, self._state())
        self.records.append(record)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        order = np.random.Generator(np.random.PCG64([self.settings.seed, epoch])).permutation(
            len(self.data.train)
        )
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
                f"{path}: not a training checkpoint of vitrim; delete it to start this phase anew"
            )
        changed = [
            key for key, value in self.identity.items() if state["settings"].get(key) != value
        ]
        if changed:
            key = changed[0]
            raise InputError(
                f"{path}: it was trained with {key} = {state['settings'].get(key)!r}, now {self.identity[key]!r}; "
                "resume with the same settings, or start anew without --resume"
            )
        # The task first: it may rebuild a shrunk model, and the optimizer is made over its
        # parameters.
        self.task.load_state(state["task"])
        self.optimizer = self.task.optimizer()
        self.rate = LearningRate(
            self.optimizer, self.settings.schedule, self.settings.epochs, self.steps
        )
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
                'MixUp (augmentation = "thesis") pairs images; use a batch_size and a data set of at least 2'
            )
        size -= 1
    return size


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    """Training draws from the global generators; the caller gets them back as they were."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


__all__ = [
    "BEST",
    "CHECKPOINT",
    "EpochEnd",
    "Schedule",
    "Task",
    "TrainResult",
    "TrainSettings",
    "fit",
]
