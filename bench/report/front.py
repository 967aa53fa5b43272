"""A front of sizes that were cut from one ranking: table, CSV, and a picture of quality by size."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import wording
from .markup import Markup, element
from .plot import (
    Frame,
    Scale,
    marker,
    padded,
    path,
    series_class,
    sheet,
    text_at,
    text_width,
    x_axis,
    y_axis,
)

WIDTH_PX, HEIGHT_PX, LEGEND_PX = 760.0, 440.0, 24.0
_STYLE = (
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .title{font-size:16px;font-weight:650}"
    ".plot .under{font-size:12.5px;fill:var(--soft)}"
)
# Share of 1, as the rows have them, with their names in the table and the picture.
QUALITIES = {
    "top1": "top-1",
    "agreement": "same class as dense",
    "knn": "nearest neighbours",
    "linear": "linear probe",
    "cosine": "cosine of features",
    "patch_cosine": "cosine of patches",
}
ACCURACIES = ("top1", "agreement", "knn", "linear")


@dataclass(frozen=True)
class Size:
    """One network of a front; qualities are shares of 1, None where they do not exist.

    Attributes:
        folder: Where it is saved, relative to the front; "" for the dense network.
        share: The share of the dense cost that was requested.
        params: Parameters.
        macs: Multiply-adds.
        file_bytes: Bytes of the weights file.
        predicted_error: Predicted error of the features, as a share of their variance.
        cosine: Mean cosine similarity of the pooled features with those of the dense network.
        patch_cosine: The same of the patch tokens.
        agreement: Share of images with the class of the dense network.
        top1: Accuracy.
        knn: Accuracy of nearest neighbours of the features.
        linear: Accuracy of a linear probe of the features.
        latency_ms: Predicted by a cost table.
        measured_ms: The p50 of the exported file.
    """

    folder: str
    share: float
    params: int
    macs: int
    file_bytes: int
    predicted_error: float
    cosine: float
    patch_cosine: float | None
    agreement: float | None = None
    top1: float | None = None
    knn: float | None = None
    linear: float | None = None
    latency_ms: float | None = None
    measured_ms: float | None = None


@dataclass(frozen=True)
class Front:
    """Networks of falling size, the dense one first.

    Attributes:
        kind: What the shares are of: macs, params, file, or cost (latency by a table).
        model: The name of the dense network.
        sizes: The networks.
        estimated: Whether their latencies are estimates, of a table that was not measured.
    """

    kind: str
    model: str
    sizes: tuple[Size, ...]
    estimated: bool = False


def columns(front: Front) -> dict[str, Callable[[Size], str]]:
    """The columns of the table that have values: title and formatter."""
    found: dict[str, Callable[[Size], str]] = {
        "network": lambda size: size.folder or "dense",
        "parameters": lambda size: wording.count(size.params),
        "MACs": lambda size: wording.count(size.macs),
        "weights": lambda size: wording.size(size.file_bytes),
    }
    if any(size.latency_ms is not None for size in front.sizes):
        title = "estimated latency (ms)" if front.estimated else "latency (ms)"
        found[title] = lambda size: _number(size.latency_ms, 2)
    if any(size.measured_ms is not None for size in front.sizes):
        found["measured (ms)"] = lambda size: _number(size.measured_ms, 3)
    found["predicted error"] = lambda size: f"{size.predicted_error:.3g}"
    for name, title in QUALITIES.items():
        if any(getattr(size, name) is not None for size in front.sizes):
            found[title] = _quality(name)
    return found


def _quality(name: str) -> Callable[[Size], str]:
    if name in ACCURACIES:
        return lambda size: _percent(getattr(size, name))
    return lambda size: _number(getattr(size, name), 4)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def front_markdown(front: Front) -> str:
    """The front as a Markdown table with a heading."""
    shown = columns(front)
    lines = [
        f"# Sizes of {front.model}",
        "",
        "Cut without training from one ranking. Cosines and agreement compare with the dense "
        "network, on images that the fit did not use.",
        "",
        "| " + " | ".join(shown) + " |",
        "|---|" + "--:|" * (len(shown) - 1),
    ]
    for size in front.sizes:
        lines.append("| " + " | ".join(write(size) for write in shown.values()) + " |")
    return "\n".join(lines) + "\n"


def front_csv(front: Front) -> str:
    """The front as CSV with full precision; values that do not exist are empty."""
    names = list(Size.__dataclass_fields__)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for size in front.sizes:
        values = [getattr(size, name) for name in names]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def front_picture(front: Front) -> str:
    """A stand-alone SVG: accuracies by size, or cosines where there are no labels and no head."""
    shown = _shown(front)
    cost, unit = _cost_axis(front)
    frame = Frame(WIDTH_PX, HEIGHT_PX, left=58, right=26, top=92, bottom=58)
    values = [100 * value for points in shown.values() for _, value in points]
    low, high = padded(min(values), max(values), share=0.1, min_span=1.0)
    x = frame.x(0.0, max(map(cost, front.sizes)) * 1.06)
    y = frame.y(max(0.0, low), min(100.5, high))
    title = f"{front.model}, cut without training"
    picture = sheet(
        WIDTH_PX,
        HEIGHT_PX,
        title,
        _STYLE,
        text_at(26, 34, title, class_="title"),
        text_at(26, 54, "percent by size; the dense network is on the right", class_="under"),
        *_legend(shown),
        x_axis(frame, x, unit, 7),
        y_axis(frame, y, 6),
        *(
            _series(number, name, points, x, y)
            for number, (name, points) in enumerate(shown.items(), 1)
        ),
    )
    return f"{picture}\n"


def _shown(front: Front) -> dict[str, list[tuple[float, float]]]:
    """The series of the picture: {quality: (cost, share) of each network}."""
    cost, _ = _cost_axis(front)
    found = {}
    for names in (ACCURACIES, ("cosine", "patch_cosine")):
        for name in names:
            pairs = [(cost(size), getattr(size, name)) for size in front.sizes]
            known = [(place, value) for place, value in pairs if value is not None]
            if known:
                found[name] = known
        if found:
            break
    return found


def _cost_axis(front: Front) -> tuple[Callable[[Size], float], str]:
    """The cost of a network in the unit of the axis, and the title of the axis."""
    if front.kind == "params":
        return (lambda size: size.params / 1e6), "parameters, millions"
    if front.kind == "file":
        return (lambda size: size.file_bytes / 1e6), "weights, MB"
    if front.kind == "cost" and all(size.measured_ms is not None for size in front.sizes):
        return (lambda size: size.measured_ms or 0.0), "measured latency, ms"
    if front.kind == "cost" and all(size.latency_ms is not None for size in front.sizes):
        title = "estimated latency, ms" if front.estimated else "predicted latency, ms"
        return (lambda size: size.latency_ms or 0.0), title
    return (lambda size: size.macs / 1e6), "multiply-adds, millions"


def _legend(shown: Mapping[str, Any]) -> list[Markup]:
    parts, x = [], 32.0
    for number, name in enumerate(shown, 1):
        title = QUALITIES[name]
        parts += [
            marker(x, 74 - 4, number, radius=4.5),
            text_at(x + 11, 74, title, class_="tick"),
        ]
        x += text_width(title) + LEGEND_PX + 11
    return parts


def _series(
    number: int, name: str, points: Sequence[tuple[float, float]], x: Scale, y: Scale
) -> Markup:
    places = [(x(cost), y(100 * value)) for cost, value in points]
    marks = [
        marker(*place, number, radius=4.5, title=f"{QUALITIES[name]} {100 * value:.2f} %")
        for place, (_, value) in zip(places, points, strict=True)
    ]
    return element("g", path(places, f"curve {series_class(number)}"), *marks)
