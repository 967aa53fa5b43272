"""Latency distributions: one strip an artifact on a common axis from zero, a bar up to the median
and the samples' shape upon it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import wording
from .markup import Markup, element, joined
from .plot import Frame, Scale, line, path, series_class, shortened, svg, words, x_axis

BAR_PX = 14.0
SHAPE_PX = 36.0
LINE_PX = 17.0
GAP_PX = 16.0
# On a busy machine p99 is ten times the median: a tail is drawn up to so many times p90.
LONGEST_TAIL = 2.0
# Below this width the figures of a strip stand on a line of their own.
ONE_LINE_PX = 560.0


@dataclass(frozen=True)
class Strip:
    """The samples of one artifact, in seconds."""

    label: str
    series: int
    latency_s: tuple[float, ...]


def distributions(
    strips: Sequence[Strip], *, label: str, width: float, class_: str = "plot"
) -> Markup:
    """A picture of at least one strip; samples beyond its end are counted in words, so that hiccups
    do not squeeze the rest.
    """
    end_s = min(_largest(strips, 99.5), LONGEST_TAIL * _largest(strips, 90)) * 1.06
    unit, factor = ("ms", 1e3) if end_s >= 1e-4 else ("µs", 1e6)
    head = LINE_PX * (1 if width >= ONE_LINE_PX else 2) + 2
    each = head + SHAPE_PX + BAR_PX + GAP_PX
    frame = Frame(width, each * len(strips) + 50, left=10, right=14, top=4, bottom=46)
    x = frame.x(0.0, end_s * factor)
    rows = [
        _strip(strip, frame.top + each * number, head, x, factor, frame)
        for number, strip in enumerate(strips)
    ]
    return svg(
        width,
        frame.height,
        x_axis(frame, x, f"latency of one inference, {unit}", int(width // 80)),
        *rows,
        label=label,
        class_=class_,
    )


def _largest(strips: Sequence[Strip], percentile: float) -> float:
    return max(float(np.percentile(strip.latency_s, percentile)) for strip in strips)


def shape(
    latency: np.ndarray[tuple[int], np.dtype[np.float64]], scale: Scale
) -> tuple[list[float], list[float]]:
    """A smoothed histogram over pixels: positions, and heights from 0 to 1."""
    pixels = np.array([scale(value) for value in latency])
    pixels = pixels[pixels <= scale.end]
    # Silverman's rule on the quartiles, but never finer than a pen stroke: the picture cannot show
    # more.
    q25, q75 = np.percentile(pixels, [25, 75])
    bandwidth = max(1.2, 0.9 * (q75 - q25) / 1.34 * len(pixels) ** -0.2)
    start, stop = (
        max(scale.start, pixels.min() - 3.5 * bandwidth),
        min(scale.end, pixels.max() + 3.5 * bandwidth),
    )
    grid = np.linspace(start, stop, max(24, int((stop - start) / 1.5)))
    counts, edges = np.histogram(pixels, bins=400)
    middles = (edges[:-1] + edges[1:]) / 2
    density = (
        np.exp(-0.5 * ((grid[:, None] - middles[None, :]) / bandwidth) ** 2) * counts[None, :]
    ).sum(axis=1)
    return [float(value) for value in grid], [float(value) for value in density / density.max()]


def _strip(strip: Strip, top: float, head: float, x: Scale, factor: float, frame: Frame) -> Markup:
    latency = np.asarray(strip.latency_s) * factor
    p50, p90, p99 = (float(value) for value in np.percentile(latency, [50, 90, 99]))
    floor = top + head + SHAPE_PX
    grid, heights = shape(latency, x)
    outline = [
        (grid[0], floor),
        *((at, floor - SHAPE_PX * high) for at, high in zip(grid, heights, strict=True)),
        (grid[-1], floor),
    ]
    beyond = int((latency > x.high).sum())
    one_line = frame.width >= ONE_LINE_PX
    figures = f"p50 {_time(p50, factor)} · p90 {_time(p90, factor)} · p99 {_time(p99, factor)}"
    more = f"{beyond:,} of {len(latency):,} beyond →" if beyond else ""
    marks = [
        line(x(value), floor, x(value), floor + BAR_PX, "quantile")
        for value in (p90, p99)
        if value <= x.high
    ]
    name = shortened(strip.label, 26)
    return element(
        "g",
        element(
            "text",
            element("tspan", name, class_="name"),
            element(
                "tspan",
                figures,
                class_="tick",
                **({"dx": 12} if one_line else {"x": frame.left, "dy": LINE_PX}),
            ),
            x=frame.left,
            y=top + 13,
            class_="halo",
        ),
        words(frame.inner_right, top + 13, more, class_="tick halo", anchor="end")
        if more
        else None,
        element(
            "rect",
            x=x.start,
            y=floor,
            width=max(1.0, x(p50) - x.start),
            height=BAR_PX,
            rx=2,
            class_="bar",
        ),
        path(outline, "shape", closed=True),
        line(x(p50), floor - SHAPE_PX, x(p50), floor + BAR_PX, "median"),
        joined(*marks),
        class_=f"strip {series_class(strip.series)}",
    )


def _time(value: float, factor: float) -> str:
    return wording.duration(value / factor)
