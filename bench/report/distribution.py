"""Latency distributions: one strip per artifact, a bar up to the median below a density curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import wording
from .markup import Markup, element, joined
from .plot import Frame, Scale, bar, line, path, series_class, shortened, svg, text_at, x_axis

BAR_PX = 14.0
SHAPE_PX = 36.0
LINE_PX = 17.0
GAP_PX = 16.0
# On a busy machine p99 is ten times the median: the axis ends at this multiple of p90.
LONGEST_TAIL = 2.0
# On narrower plots the figures of a strip have a line of their own.
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
    """Plot latency distributions on a common axis from zero.

    Args:
        strips: At least one artifact. Samples beyond the axis are counted in its label, so that a
            few outliers do not compress the rest.
        label: Description for screen readers.
        width: Width in pixels.
        class_: CSS classes.

    Returns:
        The plot.
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
    axis = x_axis(frame, x, f"latency of one inference, {unit}", int(width // 80))
    return svg(width, frame.height, axis, *rows, label=label, class_=class_)


def _largest(strips: Sequence[Strip], percentile: float) -> float:
    return max(float(np.percentile(strip.latency_s, percentile)) for strip in strips)


def shape(
    latency: np.ndarray[tuple[int], np.dtype[np.float64]], scale: Scale
) -> tuple[list[float], list[float]]:
    """A kernel density estimate in pixels: positions, and heights from 0 to 1.

    References:
        Silverman 1986, "Density Estimation for Statistics and Data Analysis", eq. 3.31: the
        bandwidth, here from the quartiles and at least as wide as a line.
    """
    pixels = np.array([scale(value) for value in latency])
    pixels = pixels[pixels <= scale.end]
    q25, q75 = np.percentile(pixels, [25, 75])
    bandwidth = max(1.2, 0.9 * (q75 - q25) / 1.34 * len(pixels) ** -0.2)
    start = max(scale.start, pixels.min() - 3.5 * bandwidth)
    stop = min(scale.end, pixels.max() + 3.5 * bandwidth)
    grid = np.linspace(start, stop, max(24, int((stop - start) / 1.5)))
    counts, edges = np.histogram(pixels, bins=400)
    centres = (edges[:-1] + edges[1:]) / 2
    kernels = np.exp(-0.5 * ((grid[:, None] - centres[None, :]) / bandwidth) ** 2)
    density = (kernels * counts[None, :]).sum(axis=1)
    return [float(value) for value in grid], [float(value) for value in density / density.max()]


def _strip(strip: Strip, top: float, head: float, x: Scale, factor: float, frame: Frame) -> Markup:
    latency = np.asarray(strip.latency_s) * factor
    p50, p90, p99 = (float(value) for value in np.percentile(latency, [50, 90, 99]))
    floor = top + head + SHAPE_PX
    grid, heights = shape(latency, x)
    curve = [(at, floor - SHAPE_PX * height) for at, height in zip(grid, heights, strict=True)]
    quantiles = [
        line(x(value), floor, x(value), floor + BAR_PX, "quantile")
        for value in (p90, p99)
        if value <= x.high
    ]
    figures = " · ".join(
        f"{name} {wording.duration(value / factor)}"
        for name, value in (("p50", p50), ("p90", p90), ("p99", p99))
    )
    beyond = int((latency > x.high).sum())
    return element(
        "g",
        _title(shortened(strip.label, 26), figures, top, frame),
        _beyond(beyond, len(latency), top, frame),
        bar(x.start, floor, max(1.0, x(p50) - x.start), BAR_PX, class_="bar"),
        path([(grid[0], floor), *curve, (grid[-1], floor)], "shape", closed=True),
        line(x(p50), floor - SHAPE_PX, x(p50), floor + BAR_PX, "median"),
        joined(*quantiles),
        class_=f"strip {series_class(strip.series)}",
    )


def _title(name: str, figures: str, top: float, frame: Frame) -> Markup:
    one_line = frame.width >= ONE_LINE_PX
    offset = {"dx": 12.0} if one_line else {"x": frame.left, "dy": LINE_PX}
    return element(
        "text",
        element("tspan", name, class_="name"),
        element("tspan", figures, class_="tick", **offset),
        x=frame.left,
        y=top + 13,
        class_="halo",
    )


def _beyond(beyond: int, total: int, top: float, frame: Frame) -> Markup | None:
    if not beyond:
        return None
    text = f"{beyond:,} of {total:,} beyond →"
    return text_at(frame.inner_right, top + 13, text, class_="tick halo", anchor="end")
