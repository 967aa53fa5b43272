"""The table of figures: one line per figure, one column per artifact, for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import wording
from .overview import Device, Row


@dataclass(frozen=True)
class Cell:
    """A figure with a remark; `best` if no other column is better."""

    figure: str
    remark: str = ""
    best: bool = False


NONE = Cell("–")
Value = Callable[[Row], float | None]
Remark = Callable[[Row], str]


@dataclass(frozen=True)
class Line:
    """One figure of all artifacts; `remark` is shown small below its name."""

    name: str
    cells: tuple[Cell, ...]
    remark: str = ""


@dataclass(frozen=True)
class _Figure:
    """How one line is made.

    Attributes:
        name: Name of the figure.
        value: The figure of a row, None if it is unknown.
        write: Formats a value.
        remark: The remark of a row.
        better: Whether lower or higher values are better; None marks no best one.
        timed: Whether it comes from a clock, which an emulator distorts.
    """

    name: str
    value: Value
    write: Callable[[float], str]
    remark: Remark = lambda row: ""
    better: Callable[[Sequence[float]], float] | None = None
    timed: bool = False


def table(device: Device) -> list[Line]:
    """The lines of a device's table; a line without a known figure is left out."""
    lines = [_line(figure, device) for figure in _figures(device.baseline)]
    return [line for line in lines if any(cell is not NONE for cell in line.cells)]


def side_by_side(devices: Sequence[Device]) -> list[Line]:
    """One line per artifact and one column per device, with the p50 and the speed-up."""
    labels = list(dict.fromkeys(row.label for device in devices for row in device.timed))
    return [
        Line(label, tuple(_device_cell(device, label) for device in devices)) for label in labels
    ]


def _figures(first: Row | None) -> list[_Figure]:
    duration = wording.duration
    return [
        _Figure("Parameters", _params, wording.count, _relative_to(first, _params), better=min),
        _Figure(
            "Multiply-adds (MACs)", _macs, wording.count, _relative_to(first, _macs), better=min
        ),
        _Figure("Files", _file_bytes, wording.size, _relative_to(first, _file_bytes), better=min),
        _Figure("Latency, p50", _p50, duration, _plus_minus, better=min, timed=True),
        _Figure("Latency, p90", _p90, duration, better=min, timed=True),
        _Figure("Latency, p99", _p99, duration, better=min, timed=True),
        _Figure("Throughput, images/s", _throughput, _whole, better=max, timed=True),
        _Figure("Speed-up", _speed_up, lambda v: f"{v:.2f}×", _speed_up_interval, better=max),
        _Figure("Speed-up ÷ MAC reduction", lambda r: r.efficiency, lambda v: f"{v:.2f}"),
        _Figure("Top-1", lambda r: r.top1, lambda v: wording.percent(v, 2), _counted, better=max),
        _Figure("Peak memory above the floor", _beyond_floor, wording.size, better=min),
        _Figure("Load", _load, duration, timed=True),
        _Figure("First inference", _first_inference, duration, timed=True),
        _Figure("Energy per inference", _energy, lambda v: f"{1e3 * v:.2f} mJ", better=min),
        _Figure("Samples", lambda r: r.summary.count if r.summary else None, lambda v: f"{v:,.0f}"),
    ]


def _line(figure: _Figure, device: Device) -> Line:
    values = [figure.value(row) for row in device.rows]
    known = [value for value in values if value is not None]
    best = None
    if figure.better is not None and len(set(known)) > 1:
        best = figure.better(known)
    cells = [
        NONE if value is None else Cell(figure.write(value), figure.remark(row), value == best)
        for value, row in zip(values, device.rows, strict=True)
    ]
    # A copied figure still shows that it is emulated.
    emulated = " (emulated)" if device.emulated and figure.timed else ""
    return Line(figure.name + emulated, tuple(cells))


def _device_cell(device: Device, label: str) -> Cell:
    row = next((row for row in device.timed if row.label == label), None)
    if row is None or row.summary is None:
        return NONE
    remark = wording.faster(row.speed_up.estimate) if row.speed_up else ""
    figure = wording.duration(row.summary.p50_s)
    return Cell(figure, "emulated" if device.emulated else remark)


def _params(row: Row) -> float | None:
    return row.params


def _macs(row: Row) -> float | None:
    return row.macs


def _file_bytes(row: Row) -> float | None:
    return row.file_bytes


def _p50(row: Row) -> float | None:
    return row.summary.p50_s if row.summary else None


def _p90(row: Row) -> float | None:
    return row.summary.p90_s if row.summary else None


def _p99(row: Row) -> float | None:
    return row.summary.p99_s if row.summary else None


def _throughput(row: Row) -> float | None:
    return row.summary.throughput_per_s if row.summary else None


def _speed_up(row: Row) -> float | None:
    return row.speed_up.estimate if row.speed_up else None


def _beyond_floor(row: Row) -> float | None:
    return row.measurement.beyond_floor_rss_bytes if row.measurement else None


def _load(row: Row) -> float | None:
    return row.measurement.load_s if row.measurement else None


def _first_inference(row: Row) -> float | None:
    return row.measurement.first_inference_s if row.measurement else None


def _energy(row: Row) -> float | None:
    return row.measurement.energy_per_inference_j if row.measurement else None


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else wording.three_digits(value)


def _relative_to(first: Row | None, value: Value) -> Remark:
    def remark(row: Row) -> str:
        own, whole = value(row), value(first) if first else None
        if own is None or not whole or row is first:
            return ""
        return wording.share_of(own, whole)

    return remark


def _plus_minus(row: Row) -> str:
    if row.interval is None:
        return ""
    half = 100 * row.interval.half_width
    return f"± {half:.1f} %" if half >= 0.05 else "± < 0.1 %"


def _speed_up_interval(row: Row) -> str:
    return f"{row.speed_up.low:.2f} to {row.speed_up.high:.2f}" if row.speed_up else ""


def _counted(row: Row) -> str:
    m = row.counted
    if m is None or m.total is None or m.correct is None:
        return "of the model"
    return f"{m.correct:,} of {m.total:,}"
