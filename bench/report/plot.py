"""The ground of every picture: a frame with linear scales, ticks at round numbers, and shapes that
differ by more than colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Markup, element, joined

TEXT_PX = 12.0
SERIES = 6


@dataclass(frozen=True)
class Scale:
    """Maps values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Frame:
    """The drawing area of a picture in pixels, inside margins that hold the labels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float

    @property
    def inner_right(self) -> float:
        return self.width - self.right

    @property
    def inner_bottom(self) -> float:
        return self.height - self.bottom

    def x(self, low: float, high: float) -> Scale:
        return Scale(low, high, self.left, self.inner_right)

    def y(self, low: float, high: float) -> Scale:
        return Scale(low, high, self.inner_bottom, self.top)


def ticks(low: float, high: float, wanted: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`, about
    `wanted` of them; `whole`: whole ones only.
    """
    span = high - low
    if not span > 0:
        return [low]
    raw = span / max(1, wanted)
    if whole:
        raw = max(1.0, raw)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [
        factor * power
        for factor in (1, 2, 2.5, 5, 10)
        if not whole or (factor * power).is_integer()
    ]
    step = next(step for step in steps if step >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(values: Sequence[float]) -> Callable[[float], str]:
    """One number of decimals for all ticks of an axis: as few as tell them apart."""
    step = (
        min(
            (b - a for a, b in itertools.pairwise(values)),
            default=abs(values[0]) if values else 1.0,
        )
        or 1.0
    )
    decimals = next((d for d in range(7) if abs(round(step, d) - step) < 1e-3 * step), 6)
    return lambda value: f"{value:,.{decimals}f}".replace("-", "−")


def padded(
    low: float, high: float, *, share: float = 0.08, least: float = 0.0
) -> tuple[float, float]:
    """The range widened by a share on both sides, and to at least `least` in all."""
    middle = (low + high) / 2
    half = max((high - low) / 2 * (1 + 2 * share), least / 2) or max(abs(middle) * share, 1e-9)
    return middle - half, middle + half


def text_width(words: str, size_px: float = TEXT_PX) -> float:
    """A guess of a text's width in pixels, on the safe side for sans-serif fonts."""
    return (
        sum(0.35 if sign in " .,:;|il'·" else 0.95 if sign in "mwMW%→" else 0.64 for sign in words)
        * size_px
    )


def shortened(words: str, longest: int) -> str:
    """At most `longest` characters, with an ellipsis where some are missing."""
    return words if len(words) <= longest else words[: longest - 1].rstrip() + "…"


def svg(
    width: float, height: float, *children: Markup | None, label: str, class_: str = "plot"
) -> Markup:
    """A picture that scales with its column; `label` is what a screen reader says."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=class_,
        role="img",
        aria_label=label,
        width=width,
        height=height,
    )


def words(
    x: float, y: float, content: str, *, class_: str = "note", anchor: str = "start", **more: str
) -> Markup:
    """A text at a point; `anchor` is start, middle or end."""
    return element(
        "text",
        content,
        x=x,
        y=y,
        class_=class_,
        text_anchor=None if anchor == "start" else anchor,
        **more,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A line through points."""
    steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def x_axis(frame: Frame, scale: Scale, title: str, wanted: int, *, whole: bool = False) -> Markup:
    """Tick numbers under the frame, a faint line at each, and the title with its unit; `whole`: of
    what is counted, such as epochs.
    """
    values = ticks(scale.low, scale.high, wanted, whole=whole)
    write = tick_text(values)
    marks = [
        joined(
            line(scale(value), frame.top, scale(value), frame.inner_bottom, "grid"),
            words(
                scale(value), frame.inner_bottom + 17, write(value), class_="tick", anchor="middle"
            ),
        )
        for value in values
    ]
    middle = (frame.left + frame.inner_right) / 2
    return joined(
        *marks,
        words(middle, frame.inner_bottom + 37, title, class_="axis", anchor="middle")
        if title
        else None,
    )


def y_axis(
    frame: Frame, scale: Scale, wanted: int, write: Callable[[float], str] | None = None
) -> Markup:
    """Tick numbers left of the frame and a faint line at each; the title stands above the picture,
    where it reads level.
    """
    values = ticks(scale.low, scale.high, wanted)
    write = write or tick_text(values)
    return joined(
        *(
            joined(
                line(frame.left, scale(value), frame.inner_right, scale(value), "grid"),
                words(frame.left - 7, scale(value) + 4, write(value), class_="tick", anchor="end"),
            )
            for value in values
        )
    )


def series_class(number: int) -> str:
    """The class that gives a series its colour; beyond the palette the colours repeat, and the
    shapes still differ.
    """
    return f"s{number if number < SERIES else 1 + (number - 1) % (SERIES - 1)}"


def marker(
    x: float, y: float, number: int, *, radius: float = 6.0, title: str | None = None
) -> Markup:
    """Circle, diamond, square or triangle by the number of the series, so that colour is not the
    only difference.
    """
    hint = element("title", title) if title else None
    class_ = f"mark {series_class(number)}"
    shape = number % 4
    if shape == 0:
        return element("circle", hint, cx=x, cy=y, r=radius, class_=class_)
    if shape == 2:
        return element(
            "rect",
            hint,
            x=x - radius * 0.88,
            y=y - radius * 0.88,
            width=radius * 1.76,
            height=radius * 1.76,
            rx=1.5,
            class_=class_,
        )
    r = radius * 1.25
    corners = (
        [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
        if shape == 1
        else [(x, y - r), (x + r * 0.95, y + r * 0.7), (x - r * 0.95, y + r * 0.7)]
    )
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return element("polygon", hint, points=points, class_=class_)
