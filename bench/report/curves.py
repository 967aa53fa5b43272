"""Training curves: small panels over the epochs of all phases, one after the other; a line breaks
where a phase begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import wording
from .markup import Markup, element, joined
from .model import Epoch
from .plot import (
    Frame,
    line,
    padded,
    path,
    series_class,
    shortened,
    svg,
    text_width,
    tick_text,
    ticks,
    words,
    x_axis,
    y_axis,
)

PHASES = {"baseline": "baseline", "masks": "masks", "finetune": "fine-tune"}


@dataclass(frozen=True)
class Curve:
    """One line of a panel; None and NaN are gaps."""

    name: str
    series: int
    values: tuple[float | None, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A small picture: a title, its unit, and its curves."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    from_zero: bool = False


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs of one phase: `first` and `last` count from 1 over the whole history."""

    name: str
    first: int
    last: int


def phases(history: Sequence[Epoch]) -> list[Phase]:
    """Stretches of equal phase, in order."""
    found: list[Phase] = []
    for number, epoch in enumerate(history, 1):
        if found and found[-1].name == epoch.phase:
            found[-1] = Phase(epoch.phase, found[-1].first, number)
        else:
            found.append(Phase(epoch.phase, number, number))
    return found


def panels(
    history: Sequence[Epoch], dense_params: int | None = None, dense_macs: int | None = None
) -> list[Panel]:
    """Loss, top-1, what remains, and speed; a panel without a single value is left out."""
    every = [
        Panel("Loss", "", (_curve("training loss", 1, [e.loss for e in history]),)),
        Panel(
            "Top-1",
            "%",
            (
                _curve("validation", 1, [e.val_top1 for e in history]),
                _curve("training", 0, [e.train_top1 for e in history], dashed=True),
            ),
        ),
        Panel(
            "What remains",
            "% of the dense model",
            (
                _curve(
                    "parameters",
                    1,
                    [_share(e.params, e.params_dense or dense_params) for e in history],
                ),
                _curve(
                    "multiply-adds",
                    2,
                    [_share(e.macs, e.macs_dense or dense_macs) for e in history],
                    dashed=True,
                ),
            ),
            from_zero=True,
        ),
        Panel(
            "Training speed",
            "images/s",
            (_curve("images/s", 1, [e.images_per_s for e in history]),),
            from_zero=True,
        ),
    ]
    kept = [
        Panel(p.title, p.unit, tuple(c for c in p.curves if _finite(c.values)), p.from_zero)
        for p in every
    ]
    return [panel for panel in kept if panel.curves]


def draw(
    panel: Panel, spans: Sequence[Phase], *, width: float, height: float, class_: str = "plot"
) -> Markup:
    """The picture of a panel with its phases as bands."""
    values = [value for curve in panel.curves for value in _finite(curve.values)]
    low, high = (
        (0.0, max(values) * 1.08 or 1.0)
        if panel.from_zero
        else padded(min(values), max(values), share=0.06)
    )
    write = tick_text(ticks(low, high, 4))
    margin = max(text_width(write(value)) for value in ticks(low, high, 4)) + 14
    frame = Frame(width, height, left=max(30.0, margin), right=12, top=22, bottom=30)
    last = max(2, spans[-1].last)
    x, y = frame.x(0.5, last + 0.5), frame.y(low, high)
    bands = []
    for number, span in enumerate(spans):
        start, end = x(span.first - 0.5), x(span.last + 0.5)
        name = PHASES.get(span.name, shortened(span.name, 16))
        bands += [
            element(
                "rect",
                element("title", f"{name}: epochs {span.first} to {span.last}"),
                x=start,
                y=frame.top,
                width=end - start,
                height=frame.inner_bottom - frame.top,
                class_="band odd" if number % 2 else "band",
            ),
            words((start + end) / 2, frame.top - 7, name, class_="tick", anchor="middle")
            if text_width(name) < end - start + 6
            else Markup(""),
            line(start, frame.top, start, frame.inner_bottom, "border") if number else Markup(""),
        ]
    lines = [joined(*(_line(curve, span, x, y) for span in spans)) for curve in panel.curves]
    description = "; ".join(_told(curve, spans, panel.unit) for curve in panel.curves)
    return svg(
        width,
        height,
        *bands,
        y_axis(frame, y, 4, write),
        x_axis(frame, x, "", int(width // 70), whole=True),
        *lines,
        label=f"{panel.title} over {wording.plural(spans[-1].last, 'epoch')}. {description}",
        class_=class_,
    )


def _line(
    curve: Curve, span: Phase, x: Callable[[float], float], y: Callable[[float], float]
) -> Markup:
    class_ = f"curve {series_class(curve.series)}" + (" dashed" if curve.dashed else "")
    pieces: list[list[tuple[float, float]]] = [[]]
    for number in range(span.first, span.last + 1):
        value = curve.values[number - 1]
        if value is None or not math.isfinite(value):
            pieces.append([])
        else:
            pieces[-1].append((x(number), y(value)))
    drawn = []
    for piece in pieces:
        if len(piece) == 1:
            # A line through one epoch has no length.
            drawn.append(
                element(
                    "circle",
                    cx=piece[0][0],
                    cy=piece[0][1],
                    r=2.5,
                    class_=f"dot {series_class(curve.series)}",
                )
            )
        elif piece:
            drawn.append(path(piece, class_))
    return joined(*drawn)


def _told(curve: Curve, spans: Sequence[Phase], unit: str) -> str:
    ends = []
    for span in spans:
        values = _finite(curve.values[span.first - 1 : span.last])
        if values:
            ends.append(
                f"{wording.three_digits(values[-1])} after {PHASES.get(span.name, span.name)}"
            )
    return f"{curve.name}{' in ' + unit if unit else ''}: {', '.join(ends)}"


def _curve(name: str, series: int, values: list[float | None], *, dashed: bool = False) -> Curve:
    return Curve(name, series, tuple(values), dashed)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _share(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None
