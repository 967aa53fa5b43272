"""The progress of a training: a live line on a terminal, or one plain line per epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from ...core.console import make_bar

_TITLES = {
    "baseline": "training",
    "tokens": "learning tokens",
    "masks": "learning masks",
    "finetune": "fine-tuning",
}


class TrainingProgress:
    """Shows the progress of a phase on standard error, so that a command's output can be piped.

    Args:
        phase: `baseline`, `tokens`, `masks`, `finetune`, or any other title.
        epochs: How many epochs the whole phase has.
        steps_per_epoch: Optimizer steps of one epoch.
        first_epoch: The first epoch that is trained, counted from 1; above 1 in a resumed run.
        quiet: Print nothing.
        console: Where to print instead of standard error.
    """

    def __init__(
        self,
        phase: str,
        epochs: int,
        steps_per_epoch: int,
        first_epoch: int,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self.title, self.epochs, self.steps = _TITLES.get(phase, phase), epochs, steps_per_epoch
        self.quiet, self.console = quiet, console or Console(stderr=True)
        self.live = None
        if not quiet and self.console.is_terminal:
            self.live = make_bar(self.console, TextColumn("{task.fields[figures]}"))
            self.live.start()
            total, done = epochs * steps_per_epoch, (first_epoch - 1) * steps_per_epoch
            self.row = self.live.add_task(self.title, total=total, completed=done, figures="")

    def step(self, epoch: int, step: int, figures: Mapping[str, Any]) -> None:
        """Show that `step` steps of `epoch` are done; `figures` as in history.jsonl, so far."""
        if self.live is not None:
            self.live.update(
                self.row,
                completed=(epoch - 1) * self.steps + step,
                description=f"{self.title} {epoch}/{self.epochs}",
                figures=format_figures(figures),
            )

    def epoch(self, figures: Mapping[str, Any]) -> None:
        """Print the line of a finished epoch."""
        text = f"{self.title} {figures['epoch']}/{self.epochs}  {format_figures(figures)}"
        self.message(text if self.live is not None else f"{text}  {figures['seconds']:.0f} s")

    def message(self, text: str) -> None:
        """Print a line between epochs."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal clean; safe to call twice."""
        if self.live is not None:
            self.live.stop()
            self.live = None


class JsonProgress(TrainingProgress):
    """Writes each epoch as one JSON line to standard output, also with `quiet`; messages as before.

    A line has the fields of history.jsonl and `epochs`, the number of epochs of the phase.
    """

    def __init__(
        self,
        phase: str,
        epochs: int,
        steps_per_epoch: int,
        first_epoch: int,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        super().__init__(phase, epochs, steps_per_epoch, first_epoch, quiet=True, console=console)
        self.silent = quiet

    def epoch(self, figures: Mapping[str, Any]) -> None:
        """Write the line of a finished epoch."""
        print(json.dumps({**figures, "epochs": self.epochs}), flush=True)

    def message(self, text: str) -> None:
        """Print a line on standard error."""
        if not self.silent:
            self.console.print(text, highlight=False, soft_wrap=True)


def format_figures(figures: Mapping[str, Any]) -> str:
    """The figures of a training step or epoch in one line; absent ones are left out."""
    parts = []
    if "loss" in figures:
        parts.append(f"loss {figures['loss']:.3f}")
    if "train_top1" in figures:
        parts.append(f"train {figures['train_top1']:.1f} %")
    if "val_top1" in figures:
        parts.append(f"val {figures['val_top1']:.2f} %")
    for key, unit in (("params", "params"), ("macs", "MACs")):
        if key in figures:
            dense = figures.get(f"{key}_dense")
            share = f" ({100 * figures[key] / dense:.0f} %)" if dense else ""
            parts.append(f"{_short(figures[key])} {unit}{share}")
    if "images_per_s" in figures:
        parts.append(f"{figures['images_per_s']:.0f} images/s")
    if "loader_share" in figures:
        parts.append(f"loader {100 * figures['loader_share']:.0f} %")
    return "  ".join(parts)


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:.0f}"
