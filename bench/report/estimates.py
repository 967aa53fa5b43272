"""The table of estimates: one line per device, one column per model and precision."""

from __future__ import annotations

from collections.abc import Sequence

from . import wording
from .model import EstimateEntry
from .table import NONE, Cell, Line

HEADING = "Estimates"
WARNING = (
    "Estimates, not measurements: nothing was measured on these devices. Each cell shows the "
    "likely time of one inference and below it its error bar."
)


def columns(entries: Sequence[EstimateEntry]) -> list[str]:
    """The columns of the table: every model in every precision, in order of appearance."""
    return list(dict.fromkeys(_label(entry) for entry in entries))


def lines(entries: Sequence[EstimateEntry]) -> list[Line]:
    """One line per target: its estimates, or by how much a model does not fit."""
    labels = columns(entries)
    targets: dict[str, dict[str, EstimateEntry]] = {}
    for entry in entries:
        targets.setdefault(entry.target, {})[_label(entry)] = entry
    rows = []
    for found in targets.values():
        cells = tuple(_cell(found[label]) if label in found else NONE for label in labels)
        device = next(iter(found.values())).device
        rows.append(Line(device, cells, _setting(list(found.values()))))
    return rows


def error_bars(entries: Sequence[EstimateEntry]) -> list[str]:
    """One sentence per error bar: its width, its coverage, and the devices that it is based on."""
    groups: dict[tuple[float, float, tuple[str, ...]], list[str]] = {}
    for entry in entries:
        if entry.latency is not None:
            key = (entry.latency.factor, entry.latency.level, entry.latency.held_against)
            groups.setdefault(key, []).append(entry.latency.rests_on)
    sentences = []
    for (factor, level, devices), sources in groups.items():
        source = wording.listed(list(dict.fromkeys(sources)))
        measured = wording.plural(len(devices), "measured device")
        sentences.append(
            f"An error bar of {factor:.1f}× either way (estimates from measurements of {source}) "
            f"covers {wording.percent(level, 0)} of {measured}, each predicted without its own "
            f"measurements: {'; '.join(devices)}."
        )
    return sentences


def _label(entry: EstimateEntry) -> str:
    return f"{entry.model} {entry.precision}"


def _cell(entry: EstimateEntry) -> Cell:
    excess = entry.excess_bytes
    if excess:
        parts = [f"{name} {wording.size(count)} too large" for name, count in excess.items()]
        return Cell("does not fit", ", ".join(parts))
    if entry.latency is None:
        return Cell("fits", "no latency estimate")
    bar = wording.estimated_range(entry.latency.low_s, entry.latency.high_s)
    return Cell(wording.estimated(entry.latency.estimated_s), f"estimate, {bar}")


def _setting(entries: Sequence[EstimateEntry]) -> str:
    parts = [
        f"{latency.runtime}, {wording.plural(latency.threads, 'thread')}"
        for entry in entries
        if (latency := entry.latency) is not None
    ]
    reasons = [entry.no_latency for entry in entries if entry.no_latency and not entry.excess_bytes]
    parts += [f"no latency estimate: {reason}" for reason in reasons]
    return "; ".join(dict.fromkeys(parts))
