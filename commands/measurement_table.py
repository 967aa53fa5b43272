"""Measurements side by side for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..bench.results.operator_table import OperatorTable
from ..bench.results.measurement import NOT_LATENCY, Measurement
from ..bench.results.statistics import ratio_interval

SURE = 0.95


def measurement_table(measured: Mapping[str, Measurement]) -> Table:
    """p50, p90, p99, throughput, memory beyond the runtime's floor, file size and top-1; the first
    measurement is what others are faster than.

    Times that an emulator took are marked, and compared with nothing.
    """
    table = Table(show_edge=False, pad_edge=False)
    scored = any(measurement.top1 is not None for measurement in measured.values())
    heads = [
        "name",
        "p50",
        "p90",
        "p99",
        "images/s",
        "faster",
        "memory",
        "file",
        *(["top-1"] if scored else []),
    ]
    for head in heads:
        table.add_column(head, justify="left" if head == "name" else "right", no_wrap=True)
    first = next(iter(measured.values()))
    if any(measurement.emulated for measurement in measured.values()):
        table.caption, table.caption_justify = f"emulated: {NOT_LATENCY}", "left"
    for name, measurement in measured.items():
        summary, memory = measurement.summary(), measurement.beyond_floor_rss_bytes
        shown = f"{name} (emulated)" if measurement.emulated else name
        row = [
            shown,
            *(milliseconds(value) for value in (summary.p50_s, summary.p90_s, summary.p99_s)),
            f"{summary.throughput_per_s:.0f}",
        ]
        timed = measurement is not first and not (measurement.emulated or first.emulated)
        row += [
            faster(first, measurement) if timed else "",
            "" if memory is None else f"{memory / 1e6:.1f} MB",
        ]
        row.append(f"{measurement.file_bytes / 1e6:.2f} MB")
        if scored:
            row.append("" if measurement.top1 is None else f"{100 * measurement.top1:.2f} %")
        table.add_row(*row)
    return table


def operator_table(found: OperatorTable) -> Table:
    """Kinds of operators by falling time, with their share of an inference."""
    table = Table(show_edge=False, pad_edge=False)
    for head in ("operator", "nodes", "time", "share"):
        table.add_column(head, justify="left" if head == "operator" else "right", no_wrap=True)
    for kind, (nodes, seconds, share) in found.by_operator().items():
        table.add_row(kind, str(nodes), milliseconds(seconds), f"{100 * share:.1f} %")
    return table


def faster(first: Measurement, second: Measurement) -> str:
    """How many times faster the second is, with its 95 % interval: `2.31x (2.28 to 2.34)`."""
    turns = first.samples_per_turn or None, second.samples_per_turn or None
    ratio = ratio_interval(
        first.latency_s,
        second.latency_s,
        turns[0],
        turns[1],
        paired=first.session == second.session,
        level=SURE,
    )
    return f"{ratio.estimate:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def milliseconds(seconds: float) -> str:
    """0.00123 -> '1.230 ms'."""
    return f"{1e3 * seconds:.3f} ms" if seconds < 0.1 else f"{1e3 * seconds:.1f} ms"
