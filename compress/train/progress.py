"""What a person sees while a model trains: one live line on a terminal, one plain line an epoch
anywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_TITLES = {"baseline": "training", "masks": "learning masks", "finetune": "fine-tuning"}


class TrainingProgress:
    """Shows a phase. `quiet` prints nothing; without a terminal one line an epoch is printed."""

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
        self.title, self.epochs, self.steps, self.quiet = (
            _TITLES.get(phase, phase),
            epochs,
            steps_per_epoch,
            quiet,
        )
        # Standard error, so that a command's own output can be piped.
        self.console = console or Console(stderr=True)
        self.live = (
            None
            if quiet or not self.console.is_terminal
            else _bar(self.console, TextColumn("{task.fields[figures]}"))
        )
        if self.live is not None:
            self.live.start()
            total, done = epochs * steps_per_epoch, (first_epoch - 1) * steps_per_epoch
            self.row = self.live.add_task(self.title, total=total, completed=done, figures="")

    def step(self, epoch: int, step: int, figures: Mapping[str, Any]) -> None:
        """`step` steps of this epoch are done; figures as in history.jsonl, so far."""
        if self.live is not None:
            completed = (epoch - 1) * self.steps + step
            self.live.update(
                self.row,
                completed=completed,
                description=f"{self.title} {epoch}/{self.epochs}",
                figures=line(figures),
            )

    def epoch(self, figures: Mapping[str, Any]) -> None:
        """An epoch is over."""
        if self.quiet:
            return
        text = f"{self.title} {figures['epoch']}/{self.epochs}  {line(figures)}"
        if self.live is None:
            text += f"  {figures['seconds']:.0f} s"
        self.console.print(text, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A plain remark between epochs."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal clean; safe to call twice."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def line(figures: Mapping[str, Any]) -> str:
    """The figures of a training moment in one readable line; absent ones are left out."""
    words = []
    if "loss" in figures:
        words.append(f"loss {figures['loss']:.3f}")
    if "train_top1" in figures:
        words.append(f"train {figures['train_top1']:.1f} %")
    if "val_top1" in figures:
        words.append(f"val {figures['val_top1']:.2f} %")
    for key, unit in (("params", "params"), ("macs", "MACs")):
        if key in figures:
            share = (
                f" ({100 * figures[key] / figures[f'{key}_dense']:.0f} %)"
                if figures.get(f"{key}_dense")
                else ""
            )
            words.append(f"{_short(figures[key])} {unit}{share}")
    if "images_per_s" in figures:
        words.append(f"{figures['images_per_s']:.0f} images/s")
    if "loader_share" in figures:
        words.append(f"loader {100 * figures['loader_share']:.0f} %")
    return "  ".join(words)


@contextlib.contextmanager
def counting(
    title: str, total: int, *, quiet: bool = False, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar for a plain count; it appears at the first call of the yielded `advance(done)`, and
    only on a terminal.
    """
    console = console or Console(stderr=True)
    bar: Progress | None = None
    row = None

    def advance(done: int) -> None:
        nonlocal bar, row
        if quiet or not console.is_terminal:
            return
        if bar is None:
            bar = _bar(console, MofNCompleteColumn(), transient=True)
            bar.start()
            row = bar.add_task(title, total=total)
        assert row is not None
        bar.update(row, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _bar(console: Console, last: Any, *, transient: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        last,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=transient)


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:.0f}"
