"""The table of figures: one line a figure, one column an artifact; Markdown and HTML write the same
cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import wording
from .overview import Device, Row


@dataclass(frozen=True)
class Cell:
    """A figure and a smaller remark; `best` where no other column does better."""

    figure: str
    remark: str = ""
    best: bool = False


NONE = Cell("–")


@dataclass(frozen=True)
class Line:
    """One figure of all artifacts; `remark` stands small under its name."""

    name: str
    cells: tuple[Cell, ...]
    remark: str = ""


def table(device: Device) -> list[Line]:
    """The lines of a device's table; a line in which nothing is known is left out."""
    rows = device.rows
    first = device.baseline
    # A figure that is copied out of its page must still say what it is.
    remark = " (emulated)" if device.emulated else ""
    lines = [
        _line(
            "Parameters",
            rows,
            lambda r: r.params,
            wording.count,
            _against(first, lambda r: r.params),
            lower=True,
        ),
        _line(
            "Multiply-adds (MACs)",
            rows,
            lambda r: r.macs,
            wording.count,
            _against(first, lambda r: r.macs),
            lower=True,
        ),
        _line(
            "Files",
            rows,
            lambda r: r.file_bytes,
            wording.size,
            _against(first, lambda r: r.file_bytes),
            lower=True,
        ),
        _line(
            f"Latency, p50{remark}",
            rows,
            lambda r: r.summary.p50_s if r.summary else None,
            wording.duration,
            _plus_minus,
            lower=True,
        ),
        _line(
            f"Latency, p90{remark}",
            rows,
            lambda r: r.summary.p90_s if r.summary else None,
            wording.duration,
            lower=True,
        ),
        _line(
            f"Latency, p99{remark}",
            rows,
            lambda r: r.summary.p99_s if r.summary else None,
            wording.duration,
            lower=True,
        ),
        _line(
            f"Throughput, images/s{remark}",
            rows,
            lambda r: r.summary.throughput_per_s if r.summary else None,
            lambda v: f"{v:,.0f}" if v >= 100 else wording.three_digits(v),
            lower=False,
        ),
        _line(
            "Speed-up",
            rows,
            lambda r: r.speed_up.estimate if r.speed_up else None,
            lambda v: f"{v:.2f}×",
            _speed_up_interval,
            lower=False,
        ),
        _line("Speed-up ÷ MAC reduction", rows, lambda r: r.efficiency, lambda v: f"{v:.2f}"),
        _line(
            "Top-1", rows, lambda r: r.top1, lambda v: wording.percent(v, 2), _counted, lower=False
        ),
        _line("Peak memory over the floor", rows, _beyond_floor, wording.size, lower=True),
        _line(
            f"Load{remark}",
            rows,
            lambda r: r.measurement.load_s if r.measurement else None,
            wording.duration,
        ),
        _line(
            f"First inference{remark}",
            rows,
            lambda r: r.measurement.first_inference_s if r.measurement else None,
            wording.duration,
        ),
        _line(
            "Energy an inference",
            rows,
            lambda r: r.measurement.energy_per_inference_j if r.measurement else None,
            lambda v: f"{1e3 * v:.2f} mJ",
            lower=True,
        ),
        _line(
            "Samples", rows, lambda r: r.summary.count if r.summary else None, lambda v: f"{v:,.0f}"
        ),
    ]
    return [line for line in lines if any(cell is not NONE for cell in line.cells)]


def side_by_side(devices: Sequence[Device]) -> list[Line]:
    """For several devices: one line an artifact and one column a device, the p50 and the speed-up
    on it.
    """
    labels = list(dict.fromkeys(row.label for device in devices for row in device.timed))
    lines = []
    for label in labels:
        cells = []
        for device in devices:
            row = next((row for row in device.timed if row.label == label), None)
            if row is None or row.summary is None:
                cells.append(NONE)
                continue
            remark = (
                "emulated"
                if device.emulated
                else wording.faster(row.speed_up.estimate)
                if row.speed_up
                else ""
            )
            cells.append(Cell(wording.duration(row.summary.p50_s), remark))
        lines.append(Line(label, tuple(cells)))
    return lines


def _line(
    name: str,
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    write: Callable[[float], str],
    remark: Callable[[Row], str] = lambda row: "",
    *,
    lower: bool | None = None,
) -> Line:
    values = [value(row) for row in rows]
    known = [v for v in values if v is not None]
    best = None
    if lower is not None and len(set(known)) > 1:
        best = min(known) if lower else max(known)
    cells = [
        NONE if v is None else Cell(write(v), remark(row), v == best)
        for v, row in zip(values, rows, strict=True)
    ]
    return Line(name, tuple(cells))


def _against(first: Row | None, value: Callable[[Row], float | None]) -> Callable[[Row], str]:
    def remark(row: Row) -> str:
        own, whole = value(row), value(first) if first else None
        return (
            wording.share_of(own, whole) if own is not None and whole and row is not first else ""
        )

    return remark


def _plus_minus(row: Row) -> str:
    if row.interval is None:
        return ""
    half = 100 * row.interval.half_width
    return f"± {half:.1f} %" if half >= 0.05 else "± < 0.1 %"


def _speed_up_interval(row: Row) -> str:
    return f"{row.speed_up.low:.2f} to {row.speed_up.high:.2f}" if row.speed_up else ""


def _counted(row: Row) -> str:
    m = row.measurement
    if m is None or m.total is None or m.correct is None:
        return "of the model"
    return f"{m.correct:,} of {m.total:,}"


def _beyond_floor(row: Row) -> float | None:
    return row.measurement.beyond_floor_rss_bytes if row.measurement else None
