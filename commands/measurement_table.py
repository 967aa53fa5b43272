"""Measurements side by side for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..bench.results.measurement import NOT_LATENCY, Measurement
from ..bench.results.operator_table import OperatorTable
from ..bench.results.statistics import ratio_interval

CONFIDENCE = 0.95


def measurement_table(measured: Mapping[str, Measurement]) -> Table:
    """One row per measurement: latency, throughput, memory above the runtime's, file, top-1.

    `faster` is relative to the first measurement. Latencies from an emulator are marked, and not
    compared.
    """
    table = Table(show_edge=False, pad_edge=False)
    with_top1 = any(_top1(measurement) for measurement in measured.values())
    heads = ["name", "p50", "p90", "p99", "images/s", "faster", "memory", "file"]
    for head in [*heads, "top-1"] if with_top1 else heads:
        table.add_column(head, justify="left" if head == "name" else "right", no_wrap=True)
    first = next(iter(measured.values()))
    if any(measurement.emulated for measurement in measured.values()):
        table.caption, table.caption_justify = f"emulated: {NOT_LATENCY}", "left"
    for name, measurement in measured.items():
        row = _cells(name, measurement, first)
        table.add_row(*row if with_top1 else row[:-1])
    return table


def _cells(name: str, measurement: Measurement, first: Measurement) -> list[str]:
    summary, memory = measurement.summary(), measurement.beyond_floor_rss_bytes
    emulated = measurement.emulated or first.emulated
    compared = measurement is not first and not emulated
    return [
        f"{name} (emulated)" if measurement.emulated else name,
        milliseconds(summary.p50_s),
        milliseconds(summary.p90_s),
        milliseconds(summary.p99_s),
        f"{summary.throughput_per_s:.0f}",
        faster(first, measurement) if compared else "",
        "" if memory is None else f"{memory / 1e6:.1f} MB",
        f"{measurement.file_bytes / 1e6:.2f} MB",
        _top1(measurement),
    ]


def _top1(measurement: Measurement) -> str:
    """Top-1 over a whole data set; empty for that of a bucket's images, which is not comparable."""
    if measurement.top1 is None or not measurement.of_all_images:
        return ""
    return f"{100 * measurement.top1:.2f} %"


def operator_table(profile: OperatorTable) -> Table:
    """Kinds of operators by descending time, with their share of an inference."""
    table = Table(show_edge=False, pad_edge=False)
    for head in ("operator", "nodes", "time", "share"):
        table.add_column(head, justify="left" if head == "operator" else "right", no_wrap=True)
    for kind, (nodes, seconds, share) in profile.by_operator().items():
        table.add_row(kind, str(nodes), milliseconds(seconds), f"{100 * share:.1f} %")
    return table


def faster(first: Measurement, second: Measurement) -> str:
    """How many times faster the second is, with its 95 % interval: `2.31x (2.28 to 2.34)`."""
    ratio = ratio_interval(
        first.latency_s,
        second.latency_s,
        first.samples_per_turn or None,
        second.samples_per_turn or None,
        paired=first.session == second.session,
        level=CONFIDENCE,
    )
    return f"{ratio.estimate:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def milliseconds(seconds: float) -> str:
    """Format seconds: 0.00123 -> '1.230 ms'."""
    return f"{1e3 * seconds:.3f} ms" if seconds < 0.1 else f"{1e3 * seconds:.1f} ms"
