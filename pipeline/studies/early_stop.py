"""Early stopping of runs by ASHA: at some epochs only the best share of the runs so far continues.

A *rung* is an epoch of the fine-tuning: the first one, and each `factor` times later than the one
before. A run that reaches it is compared with those that have reached it before, and stops unless
it is among the best 1 / `factor` of them. Only runs of equal size settings are compared: otherwise
the smallest networks, which are less accurate, would always stop.

Values are files in the study folder, so that processes and machines need no other connection.

References:
    Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (ASHA; the variant
    without promotions).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.storage import disk_errors, replace_file
from .expansion import StudyRun, settings_text
from .summary import size_axes

RUNGS, PHASE = "rungs", "finetune"


class Stopped(Exception):
    """A run is not among the best; the text is the reason."""


@dataclass(frozen=True)
class EarlyStop:
    """The rule of a study.

    Attributes:
        factor: One of this many runs continues at each rung, at least 2.
        first: Epochs of fine-tuning before the first rung.
    """

    factor: int = 3
    first: int = 1

    def rungs(self, epochs: int) -> list[int]:
        """The epochs after which runs are compared, before the last one."""
        found, epoch = [], self.first
        while epoch < epochs:
            found.append(epoch)
            epoch *= self.factor
        return found


def continues(value: float, others: Sequence[float], factor: int) -> bool:
    """ASHA's rule at a rung.

    Args:
        value: The accuracy of a run.
        others: Those of the runs that reached the rung before.
        factor: One of this many continues.

    Returns:
        Whether fewer than 1 / factor of all runs so far, and at least the best one, are better.
    """
    return sum(other > value for other in others) < max(1, (len(others) + 1) // factor)


def stop_reason(folder: Path, run_id: str) -> str | None:
    """Why a run was stopped; None if it was not.

    Args:
        folder: The study folder.
        run_id: The run.

    Raises:
        InputError: A file about the run is damaged.
    """
    for path in sorted((folder / RUNGS).glob(f"*/{run_id}.json")):
        value = _read(path)
        if not value["continues"]:
            return str(value["reason"])
    return None


class Judge:
    """Compares one run with the others of a study folder; called after each of its epochs.

    Args:
        rule: When, and how many stop.
        run: The run.
        folder: The study folder.
    """

    def __init__(self, rule: EarlyStop, run: StudyRun, folder: Path) -> None:
        self.rule, self.run, self.folder = rule, run, folder
        self.epochs = rule.rungs(run.recipe.finetune.epochs)
        cells = run.cells
        self.group = settings_text({key: cells[key] for key in sorted(size_axes() & set(cells))})

    def check(self) -> None:
        """Raise Stopped if the run was stopped before, also if the study was killed just then."""
        reason = stop_reason(self.folder, self.run.id)
        if reason is not None:
            raise Stopped(reason)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Compare the run, if an epoch is a rung.

        Args:
            record: The line of the epoch in history.jsonl.

        Raises:
            Stopped: It is not among the best.
        """
        epoch = record["epoch"]
        if record["phase"] != PHASE or epoch not in self.epochs:
            return
        value = float(record["val_top1"])
        others = [
            float(found["val_top1"])
            for run, found in self._values(epoch)
            if run != self.run.id and found["group"] == self.group
        ]
        going = continues(value, others, self.rule.factor)
        better = sum(other > value for other in others)
        reason = (
            f"stopped by ASHA after epoch {epoch}: {value:.2f} % validation top-1, {better} of "
            f"{len(others)} runs were better"
        )
        text = {"val_top1": value, "group": self.group, "continues": going, "reason": reason}
        place = self._place(epoch)
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        replace_file(place / f"{self.run.id}.json", json.dumps(text) + "\n")
        if not going:
            raise Stopped(reason)

    def _place(self, epoch: int) -> Path:
        return self.folder / RUNGS / str(epoch)

    def _values(self, epoch: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The runs at a rung with their values, in the order of their ids."""
        for path in sorted(self._place(epoch).glob("*.json")):
            yield path.stem, _read(path)


def _read(path: Path) -> dict[str, Any]:
    """The value of a run at a rung."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {"val_top1", "group", "continues", "reason"} <= set(value)
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise InputError(f"{path}: damaged; delete it, and the run is not compared")
    return value
