"""Training curves: small panels over the epochs of all phases, with a gap between phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import wording
from .markup import Markup, element, joined
from .model import Epoch
from .plot import (
    Frame,
    Scale,
    line,
    padded,
    path,
    series_class,
    shortened,
    svg,
    text_at,
    text_width,
    tick_format,
    ticks,
    x_axis,
    y_axis,
)

PHASES = {"baseline": "baseline", "tokens": "tokens", "masks": "masks", "finetune": "fine-tune"}
Y_TICKS = 4


@dataclass(frozen=True)
class Curve:
    """One line of a panel; None and NaN are gaps."""

    name: str
    series: int
    values: tuple[float | None, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A small plot: a title, its unit, and its curves."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    from_zero: bool = False


@dataclass(frozen=True)
class Phase:
    """The epochs of one phase; `first` and `last` count from 1 over the whole history."""

    name: str
    first: int
    last: int


def phases(history: Sequence[Epoch]) -> list[Phase]:
    """Runs of epochs of the same phase, in order."""
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
    """Panels of loss, top-1, remaining size and speed; those without a value are left out."""
    params = [_share(epoch.params, epoch.params_dense or dense_params) for epoch in history]
    macs = [_share(epoch.macs, epoch.macs_dense or dense_macs) for epoch in history]
    top1 = (
        _curve("validation", 1, [epoch.val_top1 for epoch in history]),
        _curve("training", 0, [epoch.train_top1 for epoch in history], dashed=True),
    )
    size = _curve("parameters", 1, params), _curve("multiply-adds", 2, macs, dashed=True)
    speed = (_curve("images/s", 1, [epoch.images_per_s for epoch in history]),)
    loss = (_curve("training loss", 1, [epoch.loss for epoch in history]),)
    candidates = [
        Panel("Loss", "", loss),
        Panel("Top-1", "%", top1),
        Panel("Remaining size", "% of the dense model", size, from_zero=True),
        Panel("Training speed", "images/s", speed, from_zero=True),
    ]
    found = []
    for panel in candidates:
        curves = tuple(curve for curve in panel.curves if _finite(curve.values))
        if curves:
            found.append(Panel(panel.title, panel.unit, curves, panel.from_zero))
    return found


def draw(
    panel: Panel, spans: Sequence[Phase], *, width: float, height: float, class_: str = "plot"
) -> Markup:
    """Plot a panel, with its phases as bands.

    Args:
        panel: At least one curve with a value.
        spans: The phases, as `phases` returns them.
        width: Width in pixels.
        height: Height in pixels.
        class_: CSS classes.

    Returns:
        The plot.
    """
    low, high = _range(panel)
    values = ticks(low, high, Y_TICKS)
    write = tick_format(values)
    margin = max(text_width(write(value)) for value in values) + 14
    frame = Frame(width, height, left=max(30.0, margin), right=12, top=22, bottom=30)
    epochs = spans[-1].last
    x, y = frame.x(0.5, max(2, epochs) + 0.5), frame.y(low, high)
    lines = [joined(*(_line(curve, span, x, y) for span in spans)) for curve in panel.curves]
    description = "; ".join(_description(curve, spans, panel.unit) for curve in panel.curves)
    return svg(
        width,
        height,
        *(_band(number, span, x, frame) for number, span in enumerate(spans)),
        y_axis(frame, y, Y_TICKS, write),
        x_axis(frame, x, "", int(width // 70), whole=True),
        *lines,
        label=f"{panel.title} over {wording.plural(epochs, 'epoch')}. {description}",
        class_=class_,
    )


def _range(panel: Panel) -> tuple[float, float]:
    values = [value for curve in panel.curves for value in _finite(curve.values)]
    if panel.from_zero:
        return 0.0, max(values) * 1.08 or 1.0
    return padded(min(values), max(values), share=0.06)


def _band(number: int, span: Phase, x: Scale, frame: Frame) -> Markup:
    start, end = x(span.first - 0.5), x(span.last + 0.5)
    name = PHASES.get(span.name, shortened(span.name, 16))
    title = element("title", f"{name}: epochs {span.first} to {span.last}")
    band = element(
        "rect",
        title,
        x=start,
        y=frame.top,
        width=end - start,
        height=frame.inner_bottom - frame.top,
        class_="band odd" if number % 2 else "band",
    )
    head = border = None
    if text_width(name) < end - start + 6:
        head = text_at((start + end) / 2, frame.top - 7, name, class_="tick", anchor="middle")
    if number:
        border = line(start, frame.top, start, frame.inner_bottom, "border")
    return joined(band, head, border)


def _line(
    curve: Curve, span: Phase, x: Callable[[float], float], y: Callable[[float], float]
) -> Markup:
    colour = series_class(curve.series)
    class_ = f"curve {colour}" + (" dashed" if curve.dashed else "")
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
            # A line through one epoch would be invisible.
            (cx, cy), *_ = piece
            drawn.append(element("circle", cx=cx, cy=cy, r=2.5, class_=f"dot {colour}"))
        elif piece:
            drawn.append(path(piece, class_))
    return joined(*drawn)


def _description(curve: Curve, spans: Sequence[Phase], unit: str) -> str:
    ends = []
    for span in spans:
        values = _finite(curve.values[span.first - 1 : span.last])
        if values:
            phase = PHASES.get(span.name, span.name)
            ends.append(f"{wording.three_digits(values[-1])} after {phase}")
    return f"{curve.name}{' in ' + unit if unit else ''}: {', '.join(ends)}"


def _curve(
    name: str, series: int, values: Sequence[float | None], *, dashed: bool = False
) -> Curve:
    return Curve(name, series, tuple(values), dashed)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _share(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None
