"""Where and how the trainings of a run are computed and shown: device, processes, progress."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..compress.train.devices import Placement, choose_placement
from ..compress.train.processes import ALONE, Processes, join_processes, require_accelerate
from ..compress.train.progress import JsonProgress, TrainingProgress
from ..compress.train.training_files import read_history
from ..core.errors import InputError
from .recipe import Recipe
from .train_section import TrackerName, TrainSection

# In the run folder: what trackers write to files.
TRACKERS = "trackers"
# The packages of which a tracker needs one.
_PACKAGES: Mapping[TrackerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


@dataclass(frozen=True)
class TrainingHost:
    """Where a run trains, and how its epochs are shown.

    Attributes:
        placement: The device and the precision.
        processes: The processes that share each batch.
        progress: Creates the progress display of a phase.
        finish: Called after the trainings, also after an error; ends the trackers.
        note: A line for the user about the device, printed before the trainings; or None.
    """

    placement: Placement = field(default_factory=Placement)
    processes: Processes = ALONE
    progress: Callable[..., TrainingProgress] = TrainingProgress
    finish: Callable[[], None] = lambda: None
    note: str | None = None


def placement_of(section: TrainSection) -> tuple[Placement, str | None]:
    """The placement of `[train]` on this machine, and a line for the user or None.

    Raises:
        InputError: The device is not there, or cannot compute in the precision.
    """
    return choose_placement(
        section.device,
        section.precision,
        compile=section.compile,
        channels_last=section.channels_last,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def require_devices(placement: Placement, processes: int) -> None:
    """Validate that each process of this machine has a device of its own.

    Raises:
        InputError: There are too few GPUs.
    """
    kind = placement.device.type
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, processes)
    if processes > available:
        raise InputError(
            f"--processes {processes}: each needs a device of its own, and this machine has "
            f'{available} ({kind}); choose at most {available}, or train.device = "cpu"'
        )


def training_host(recipe: Recipe, *, json_progress: bool = False) -> TrainingHost:
    """Choose the device of a run, and connect to the other processes of a launcher.

    Args:
        recipe: Its section `[train]`.
        json_progress: Write one JSON line for each epoch to standard output.

    Returns:
        The host, without trackers.

    Raises:
        InputError: The device or a tracker is not there, or accelerate is not installed.
    """
    placement, note = placement_of(recipe.train)
    require_trackers(recipe.train.trackers)
    processes = join_processes(placement.device.type)
    # One process writes the lines.
    progress = JsonProgress if json_progress and processes.is_main else TrainingProgress
    return TrainingHost(placement, processes, progress, note=note)


def require_trackers(names: tuple[TrackerName, ...]) -> None:
    """Validate that trackers, and accelerate, are installed.

    Raises:
        InputError: One is not; the message has the command that installs it.
    """
    for name in names:
        require_accelerate(f'train.trackers = ["{name}"]')
        if not any(map(importlib.util.find_spec, _PACKAGES[name])):
            raise InputError(
                f'train.trackers = ["{name}"]: {name} is not installed; '
                f"pip install {name}, or leave it out"
            )


def _logged(recipe: Recipe) -> dict[str, Any]:
    """The settings for trackers, which may be services of others: without the device's address."""
    tables = recipe.plain()
    for key in ("on", "python", "runtime_library", "ssh_options"):
        tables["bench"].pop(key, None)
    return _flat(tables)


def tracked(host: TrainingHost, recipe: Recipe, folder: Path, history: Path) -> TrainingHost:
    """The host with a progress display that also logs each epoch to the trackers of the recipe.

    Args:
        host: The host of the run.
        recipe: Its trackers, its name, and the settings that are logged.
        folder: The run folder.
        history: Its history.jsonl, whose lines are the steps of the trackers.

    Returns:
        The same host where there are no trackers, or in a process that is not the main one.
    """
    if not recipe.train.trackers or not host.processes.is_main:
        return host
    from accelerate import Accelerator

    (folder / TRACKERS).mkdir(exist_ok=True)
    accelerator = Accelerator(
        cpu=host.placement.device.type == "cpu",
        log_with=list(recipe.train.trackers),
        project_dir=str(folder / TRACKERS),
    )
    accelerator.init_trackers(recipe.name or "vitrim", config=_logged(recipe))

    def log(record: Mapping[str, Any]) -> None:
        phase = record["phase"]
        values = {
            f"{phase}/{key}": value
            for key, value in record.items()
            if isinstance(value, int | float) and key != "epoch"
        }
        accelerator.log(values, step=len(read_history(history)))

    def finish() -> None:
        for tracker in accelerator.trackers:
            tracker.finish()

    return replace(host, progress=partial(_Logged, host.progress, log), finish=finish)


def followed(
    host: TrainingHost, on_epoch: Callable[[Mapping[str, Any]], None] | None
) -> TrainingHost:
    """The host with a progress display that also calls a function after each epoch.

    Args:
        host: The host of the run.
        on_epoch: It gets the line of history.jsonl, whose checkpoint is written; None: nothing.

    Returns:
        The host.
    """
    if on_epoch is None:
        return host
    return replace(host, progress=partial(_Logged, host.progress, on_epoch))


class _Logged(TrainingProgress):
    """A progress display that passes the record of each epoch on."""

    def __init__(
        self,
        inner: Callable[..., TrainingProgress],
        log: Callable[[Mapping[str, Any]], None],
        *arguments: Any,
        **options: Any,
    ) -> None:
        self.inner, self.log = inner(*arguments, **options), log

    def step(self, epoch: int, step: int, figures: Mapping[str, Any]) -> None:
        self.inner.step(epoch, step, figures)

    def epoch(self, figures: Mapping[str, Any]) -> None:
        self.inner.epoch(figures)
        self.log(figures)

    def message(self, text: str) -> None:
        self.inner.message(text)

    def close(self) -> None:
        self.inner.close()


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, with the types that every tracker accepts."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            found[f"{prefix}{key}"] = value if plain else json.dumps(value)
    return found
