"""Estimates for devices that were not at hand: one line a device, one column a model in a
precision; nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import wording
from .model import EstimateEntry
from .table import NONE, Cell, Line

HEADING = "Estimates"
WARNING = "Estimates, not measurements: none of these devices was at hand. The first figure is the likely time of one inference, the range under it its error bar."


def columns(entries: Sequence[EstimateEntry]) -> list[str]:
    """The heads of the table: every model in every precision, in their first order."""
    return list(dict.fromkeys(_label(entry) for entry in entries))


def lines(entries: Sequence[EstimateEntry]) -> list[Line]:
    """One line a target: its estimates, or by how much a model does not fit it."""
    labels = columns(entries)
    found: dict[str, dict[str, EstimateEntry]] = {}
    for entry in entries:
        found.setdefault(entry.target, {})[_label(entry)] = entry
    rows = []
    for known in found.values():
        cells = tuple(_cell(known[label]) if label in known else NONE for label in labels)
        first = next(iter(known.values()))
        rows.append(Line(first.device, cells, _setting(list(known.values()))))
    return rows


def bars(entries: Sequence[EstimateEntry]) -> list[str]:
    """What each error bar is worth: how wide, and which devices it was held against."""
    groups: dict[tuple[float, float, tuple[str, ...]], list[str]] = {}
    for entry in entries:
        if entry.latency is not None:
            key = (entry.latency.factor, entry.latency.level, entry.latency.held_against)
            groups.setdefault(key, []).append(entry.latency.rests_on)
    return [
        f"A bar of {factor:.1f}× either way (estimates that rest on {_and(list(dict.fromkeys(rests)))}) held {wording.percent(level, 0)} of "
        f"{wording.plural(len(devices), 'device')} that {'was' if len(devices) == 1 else 'were'} measured, each predicted without its own figures: "
        f"{'; '.join(devices)}."
        for (factor, level, devices), rests in groups.items()
    ]


def _label(entry: EstimateEntry) -> str:
    return f"{entry.model} {entry.precision}"


def _cell(entry: EstimateEntry) -> Cell:
    over = entry.excess_bytes
    if over:
        return Cell(
            "does not fit",
            ", ".join(f"{what} {wording.size(count)} too large" for what, count in over.items()),
        )
    if entry.latency is None:
        return Cell("fits", "no estimate of its time")
    bar = wording.estimated_range(entry.latency.low_s, entry.latency.high_s)
    return Cell(wording.estimated(entry.latency.estimated_s), f"estimate, {bar}")


def _setting(entries: Sequence[EstimateEntry]) -> str:
    told = [
        f"{latency.runtime}, {wording.plural(latency.threads, 'thread')}"
        for entry in entries
        if (latency := entry.latency) is not None
    ]
    reasons = [entry.no_latency for entry in entries if entry.no_latency and not entry.excess_bytes]
    return "; ".join(dict.fromkeys([*told, *(f"no time: {reason}" for reason in reasons)]))


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
