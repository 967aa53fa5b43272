"""Elements of every plot: a frame with linear scales, axes with round ticks, lines and markers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Markup, element, joined
from .style import picture_style

TEXT_PX = 12.0
# Colours of the palette; the first one belongs to the baseline.
SERIES = 6


@dataclass(frozen=True)
class Scale:
    """Maps values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Frame:
    """The plotting area in pixels, inside margins for the labels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float

    @property
    def inner_right(self) -> float:
        """Right edge of the plotting area."""
        return self.width - self.right

    @property
    def inner_bottom(self) -> float:
        """Bottom edge of the plotting area."""
        return self.height - self.bottom

    def x(self, low: float, high: float) -> Scale:
        """The horizontal scale for a range of values."""
        return Scale(low, high, self.left, self.inner_right)

    def y(self, low: float, high: float) -> Scale:
        """The vertical scale for a range of values."""
        return Scale(low, high, self.inner_bottom, self.top)


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2, 2.5 or 5 times a power of ten apart.

    Args:
        low: Start of the range.
        high: End of the range.
        count: Approximate number of ticks.
        whole: Whole numbers only, for counts such as epochs.

    Returns:
        The ticks in ascending order.
    """
    span = high - low
    if not span > 0:
        return [low]
    raw = span / max(1, count)
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


def tick_format(values: Sequence[float]) -> Callable[[float], str]:
    """A formatter with the fewest decimals that distinguish all ticks of an axis."""
    single = abs(values[0]) if values else 1.0
    step = min((b - a for a, b in itertools.pairwise(values)), default=single) or 1.0
    decimals = next((d for d in range(7) if abs(round(step, d) - step) < 1e-3 * step), 6)
    return lambda value: f"{value:,.{decimals}f}".replace("-", "−")


def padded(
    low: float, high: float, *, share: float = 0.08, min_span: float = 0.0
) -> tuple[float, float]:
    """Widen a range.

    Args:
        low: Start of the range.
        high: End of the range.
        share: How much to add on each side, as a share of the span.
        min_span: Smallest span of the result.

    Returns:
        The new start and end.
    """
    middle = (low + high) / 2
    half = max((high - low) / 2 * (1 + 2 * share), min_span / 2) or max(abs(middle) * share, 1e-9)
    return middle - half, middle + half


def text_width(text: str, size_px: float = TEXT_PX) -> float:
    """Estimate the width of a text in pixels, rather too wide than too narrow."""
    widths = (0.35 if sign in " .,:;|il'·" else 0.95 if sign in "mwMW%→" else 0.64 for sign in text)
    return sum(widths) * size_px


def shortened(text: str, longest: int) -> str:
    """At most `longest` characters, with an ellipsis where some are missing."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def svg(
    width: float, height: float, *children: Markup | None, label: str, class_: str = "plot"
) -> Markup:
    """A plot that scales with its column.

    Args:
        width: Width of the coordinate system, in pixels.
        height: Its height.
        children: The contents.
        label: Description for screen readers.
        class_: CSS classes.

    Returns:
        The svg element.
    """
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


def sheet(width: float, height: float, title: str, style: str, *children: Markup | None) -> Markup:
    """A picture that stands alone, on a sheet with rounded corners.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        title: Description for screen readers.
        style: CSS of its own, after that of all pictures.
        children: The contents.

    Returns:
        The svg element.
    """
    return element(
        "svg",
        element("title", title),
        element("style", Markup(picture_style() + style)),
        element("rect", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=12, class_="sheet"),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        class_="plot",
        role="img",
    )


def text_at(
    x: float, y: float, content: str, *, class_: str = "note", anchor: str = "start", **more: str
) -> Markup:
    """A text at a point.

    Args:
        x: Horizontal position.
        y: Position of the baseline.
        content: The text.
        class_: CSS classes.
        anchor: Which part of the text is at `x`: start, middle or end.
        more: Further attributes.

    Returns:
        The text element.
    """
    return element(
        "text",
        content,
        x=x,
        y=y,
        class_=class_,
        text_anchor=None if anchor == "start" else anchor,
        **more,
    )


def bar(
    x: float, y: float, width: float, height: float, *children: Markup, rx: float = 2, class_: str
) -> Markup:
    """A bar with rounded corners.

    Args:
        x: Left edge.
        y: Top edge.
        width: Width in pixels.
        height: Height in pixels.
        children: A title, for example.
        rx: Radius of the corners.
        class_: CSS classes.

    Returns:
        The rect element.
    """
    size = {"x": x, "y": y, "width": width, "height": height, "rx": rx}
    return element("rect", *children, **size, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line.

    Args:
        x1: Horizontal start.
        y1: Vertical start.
        x2: Horizontal end.
        y2: Vertical end.
        class_: CSS classes.

    Returns:
        The line element.
    """
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A line through points."""
    steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def x_axis(frame: Frame, scale: Scale, title: str, count: int, *, whole: bool = False) -> Markup:
    """Ticks below the frame, with a grid line at each.

    Args:
        frame: The plotting area.
        scale: The horizontal scale.
        title: Title with the unit; "" for none.
        count: Approximate number of ticks.
        whole: Ticks at whole numbers only.

    Returns:
        The axis.
    """
    values = ticks(scale.low, scale.high, count, whole=whole)
    write = tick_format(values)
    marks = []
    for value in values:
        x = scale(value)
        marks += [
            line(x, frame.top, x, frame.inner_bottom, "grid"),
            text_at(x, frame.inner_bottom + 17, write(value), class_="tick", anchor="middle"),
        ]
    if title:
        middle = (frame.left + frame.inner_right) / 2
        y = frame.inner_bottom + 37
        marks.append(text_at(middle, y, title, class_="axis", anchor="middle"))
    return joined(*marks)


def y_axis(
    frame: Frame, scale: Scale, count: int, write: Callable[[float], str] | None = None
) -> Markup:
    """Ticks left of the frame, with a grid line at each; the title is above the plot.

    Args:
        frame: The plotting area.
        scale: The vertical scale.
        count: Approximate number of ticks.
        write: Formatter of the ticks; by default the shortest one.

    Returns:
        The axis.
    """
    values = ticks(scale.low, scale.high, count)
    write = write or tick_format(values)
    marks = []
    for value in values:
        y = scale(value)
        marks += [
            line(frame.left, y, frame.inner_right, y, "grid"),
            text_at(frame.left - 7, y + 4, write(value), class_="tick", anchor="end"),
        ]
    return joined(*marks)


def series_class(number: int) -> str:
    """The CSS class with the colour of a series; beyond the palette, colours repeat."""
    return f"s{number if number < SERIES else 1 + (number - 1) % (SERIES - 1)}"


def marker(
    x: float, y: float, series: int, *, radius: float = 6.0, title: str | None = None
) -> Markup:
    """One of six shapes by series, so that colour is not the only difference.

    Args:
        x: Horizontal position of the centre.
        y: Its vertical position.
        series: Number of the series.
        radius: Radius in pixels.
        title: Text of the tooltip.

    Returns:
        The marker.
    """
    hint = element("title", title) if title else None
    class_ = f"mark {series_class(series)}"
    shape = series % 6
    if shape == 0:
        return element("circle", hint, cx=x, cy=y, r=radius, class_=class_)
    if shape == 2:
        half = radius * 0.88
        side = {"x": x - half, "y": y - half, "width": 2 * half, "height": 2 * half}
        return element("rect", hint, **side, rx=1.5, class_=class_)
    r = radius * 1.25
    thin, wide, flat = 0.35 * r, 0.95 * r, 0.7 * r
    corners = {
        1: [(x, y - r), (x + r, y), (x, y + r), (x - r, y)],
        3: [(x, y - r), (x + wide, y + flat), (x - wide, y + flat)],
        4: [(x, y + r), (x - wide, y - flat), (x + wide, y - flat)],
        # A cross, one arm after the other.
        5: [
            (x + a * right - b * down, y + a * down + b * right)
            for right, down in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for a, b in ((thin, -r), (thin, -thin), (r, -thin))
        ],
    }[shape]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return element("polygon", hint, points=points, class_=class_)
