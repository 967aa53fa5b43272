"""The figures of a run: rows grouped by device, speed-ups, the headline, warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..results.buckets import BucketTable, bucket_tables
from ..results.measurement import Environment, Measurement
from ..results.statistics import Interval, Summary, ratio_interval
from . import wording
from .model import ModelEntry
from .run import Run

# The headline's artifact is the fastest one whose top-1 is at most so far below the best one's.
HEADLINE_MARGIN = 0.01
DEFAULT_RUNTIME = "onnxruntime"
LOCAL = ("host", "local")


@dataclass(frozen=True)
class Row:
    """One artifact on one device.

    `series` is the number of its colour and shape in all plots; 0 is the baseline.
    """

    model: str
    label: str
    series: int
    precision: str
    runtime: str
    target: str
    params: int | None
    macs: int | None
    file_bytes: int
    model_top1: float | None
    measurement: Measurement | None
    speed_up: Interval | None = None
    mac_reduction: float | None = None

    @cached_property
    def summary(self) -> Summary | None:
        """Statistics of the latency; None without a measurement."""
        return self.measurement.summary() if self.measurement else None

    @cached_property
    def interval(self) -> Interval | None:
        """95 % interval of the p50; None without a measurement."""
        return self.measurement.interval() if self.measurement else None

    @property
    def top1(self) -> float | None:
        """Top-1 of the timed artifact, else of its model; a share."""
        return self.model_top1 if self.counted is None else self.counted.top1

    @property
    def counted(self) -> Measurement | None:
        """The measurement, if it counted top-1 over a whole data set and not over a bucket's."""
        m = self.measurement
        return m if m is not None and m.top1 is not None and m.of_all_images else None

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """95 % interval of the artifact's top-1; None where no images were counted.

        References:
            Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
        """
        m = self.counted
        if m is None or m.correct is None or m.total is None:
            return None
        z, n, p = 1.959964, m.total, m.correct / m.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def efficiency(self) -> float | None:
        """Speed-up over MAC reduction: 1 if the time shrinks in proportion to the MACs."""
        if not self.speed_up or not self.mac_reduction:
            return None
        return self.speed_up.estimate / self.mac_reduction


@dataclass(frozen=True)
class Device:
    """Rows of one device with equal threads and batch; only these are compared."""

    name: str
    setting: str
    emulated: bool
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Name and setting."""
        return f"{self.name} · {self.setting}" if self.setting else self.name

    @property
    def remote(self) -> bool:
        """Whether another machine than this one was measured."""
        return any(row.measurement and row.measurement.device not in LOCAL for row in self.rows)

    @property
    def timed(self) -> tuple[Row, ...]:
        """The rows with a measurement."""
        return tuple(row for row in self.rows if row.measurement is not None)

    @property
    def baseline(self) -> Row | None:
        """The row of the baseline."""
        return next((row for row in self.rows if row.series == 0), None)

    @property
    def environment(self) -> Environment | None:
        """The environment of the first measurement."""
        return next((row.measurement.environment for row in self.rows if row.measurement), None)


@dataclass(frozen=True)
class Change:
    """One figure before and after, as text; `share` is what remains of it, where that is useful."""

    name: str
    before: str | None
    after: str
    remark: str
    share: float | None = None


@dataclass(frozen=True)
class Overview:
    """The figures of the Markdown and of the HTML report."""

    title: str
    headline: str
    changes: tuple[Change, ...]
    chosen: str | None
    devices: tuple[Device, ...]
    buckets: tuple[BucketTable, ...]
    warnings: tuple[str, ...]


def overview(run: Run) -> Overview:
    """Compute all figures of `run`."""
    devices = _devices(run)
    baseline, chosen = _pair(devices)
    changes = _changes(run, baseline, chosen)
    return Overview(
        title=run.report.title or run.report.recipe or "vitrim report",
        headline=_headline(run, baseline, chosen),
        changes=changes,
        chosen=chosen.label if chosen else None,
        devices=devices,
        buckets=_buckets(run),
        warnings=_warnings(run, devices),
    )


def baseline_name(run: Run) -> str:
    """The model that the others are compared with."""
    models = run.report.models
    return next((name for name in ("baseline", "dense") if name in models), next(iter(models)))


def _buckets(run: Run) -> tuple[BucketTable, ...]:
    models = run.report.models.values()
    measured = (each.measurement for model in models for each in model.artifacts)
    return bucket_tables(each for each in measured if each is not None)


def _devices(run: Run) -> tuple[Device, ...]:
    places: dict[tuple[str, str, bool], list[Row]] = {}
    for row in _rows(run):
        places.setdefault(_place(row), []).append(row)
    reference = run.report.models.get(baseline_name(run))
    return tuple(
        Device(name, setting + time, emulated, tuple(_compared(part, reference)))
        for (name, setting, emulated), rows in places.items()
        for time, part in _by_session(rows)
    )


def _rows(run: Run) -> list[Row]:
    models = run.report.models
    reference = baseline_name(run)
    found = [(name, model, entry) for name, model in models.items() for entry in model.one_each]
    found.sort(key=lambda item: item[0] != reference)
    several_runtimes = len({entry.runtime for _, _, entry in found}) > 1
    # Number 0 is reserved for the baseline, even where it was not measured.
    first_number = 0 if models[reference].artifacts else 1
    series: dict[str, int] = {}
    rows = []
    for name, model, entry in found:
        label = f"{name} {entry.precision}"
        if several_runtimes and entry.runtime != DEFAULT_RUNTIME:
            label += f" {entry.runtime}"
        number = series.setdefault(label, first_number + len(series))
        row = Row(
            model=name,
            label=label,
            series=number,
            precision=entry.precision,
            runtime=entry.runtime,
            target=entry.target,
            params=model.params,
            macs=model.macs,
            file_bytes=entry.bytes,
            model_top1=model.top1,
            measurement=entry.measurement,
        )
        rows.append(row)
    return rows


def _by_session(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """[("", rows)], or the rows of each session with its time if an artifact has several."""
    labels = [row.label for row in rows]
    if len(set(labels)) == len(labels):
        return [("", rows)]
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        sessions.setdefault(row.measurement.session if row.measurement else "", []).append(row)
    found: dict[str, list[Row]] = {}
    for part in sessions.values():
        first = part[0].measurement
        time = f", measured {first.started_at[:19].replace('T', ' ')}" if first else ""
        # Sessions of the same second are distinguished by a number.
        names = [time, *(f"{time} ({number})" for number in range(2, len(sessions) + 1))]
        found[next(name for name in names if name not in found)] = part
    return list(found.items())


def _place(row: Row) -> tuple[str, str, bool]:
    """Device, setting, and whether it is emulated."""
    m = row.measurement
    if m is None:
        return row.target, "not measured", False
    environment = m.environment
    local = m.device in LOCAL
    name = (
        environment.device_model
        or environment.cpu_model
        or (m.target if m.target != "host" else None)
        or ("this machine" if local else m.device)
    )
    if not local and not environment.emulator and name != m.device:
        name = f"{name}, over {m.device}"
    setting = wording.plural(m.threads, "thread") + (f", batch {m.batch}" if m.batch > 1 else "")
    if environment.emulator:
        return f"{name}, emulated by {environment.emulator}", setting, True
    return name, setting, False


def _compared(rows: Sequence[Row], reference: ModelEntry | None) -> list[Row]:
    # An emulator slows some instructions more than others, so a ratio of emulated times is not that
    # of the device.
    candidates = (row for row in rows if row.series == 0 and row.measurement)
    first = next(
        (row for row in candidates if row.measurement and not row.measurement.environment.emulator),
        None,
    )
    compared = []
    for row in rows:
        mac_reduction = None
        if reference and reference.macs and row.macs and row.series != 0:
            mac_reduction = reference.macs / row.macs
        speed_up = _speed_up(first, row) if first and row is not first else None
        compared.append(replace(row, speed_up=speed_up, mac_reduction=mac_reduction))
    return compared


def _speed_up(first: Row, row: Row) -> Interval | None:
    a, b = first.measurement, row.measurement
    if a is None or b is None:
        return None
    return ratio_interval(
        a.latency_s,
        b.latency_s,
        a.samples_per_turn or None,
        b.samples_per_turn or None,
        paired=a.session == b.session,
        level=0.95,
    )


def _pair(devices: Sequence[Device]) -> tuple[Row | None, Row | None]:
    """The baseline and the headline's artifact, on the first real device.

    That is the fastest artifact whose top-1 is within `HEADLINE_MARGIN` of the best one.
    """
    for device in sorted(devices, key=lambda d: (d.emulated, not d.timed)):
        others = [row for row in device.rows if row.series != 0]
        if not others:
            continue
        best = max((row.top1 for row in others if row.top1 is not None), default=None)
        good = [
            row
            for row in others
            if best is None or (row.top1 is not None and row.top1 >= best - HEADLINE_MARGIN)
        ]
        timed = [(row.summary.p50_s, row) for row in good if row.summary]
        fastest = min(timed, key=lambda pair: pair[0])[1] if timed else good[0]
        return device.baseline, fastest
    rows = [row for device in devices for row in device.rows]
    return (rows[0], None) if rows else (None, None)


def _headline(run: Run, baseline: Row | None, chosen: Row | None) -> str:
    parts = []
    params = _before_after(run, baseline, chosen, "params")
    if params:
        parts.append(f"{wording.count(params[0])} → {wording.count(params[1])} parameters")
    if baseline and chosen and baseline.top1 is not None and chosen.top1 is not None:
        parts.append(f"{100 * baseline.top1:.1f} → {100 * chosen.top1:.1f} % top-1")
    if chosen and chosen.speed_up:
        parts.append(wording.faster(chosen.speed_up.estimate))
    if parts:
        return ", ".join(parts)
    only = chosen or baseline
    if only and only.measurement and only.measurement.emulated:
        emulator = only.measurement.environment.emulator
        return f"{only.label}: runs under {emulator}, whose times are not a device's latency"
    if only and only.summary:
        return f"{only.label}: p50 {wording.duration(only.summary.p50_s)} per inference"
    return f"{wording.plural(len(run.report.models), 'model')}, no measurement"


def _before_after(
    run: Run, baseline: Row | None, chosen: Row | None, key: str
) -> tuple[int, int] | None:
    """A count of the baseline and of the compact model, which need no artifacts for it."""
    models = run.report.models
    reference = baseline.model if baseline else baseline_name(run)
    other = chosen.model if chosen else next((name for name in models if name != reference), None)
    if other is None or reference not in models or other not in models:
        return None
    before, after = getattr(models[reference], key), getattr(models[other], key)
    return (before, after) if before and after is not None else None


def _changes(run: Run, baseline: Row | None, chosen: Row | None) -> tuple[Change, ...]:
    found = []
    for key, name in (("params", "Parameters"), ("macs", "Multiply-adds")):
        pair = _before_after(run, baseline, chosen, key)
        if pair:
            found.append(_remaining(name, *pair, wording.count))
    only, before = chosen or baseline, baseline if chosen else None
    if only is None:
        return tuple(found)
    if only.top1 is not None:
        found.append(_top1_change(only.top1, before.top1 if before else None))
    if only.summary:
        found.append(_latency_change(only, only.summary.p50_s, before))
    file_bytes = before.file_bytes if before else None
    found.append(_remaining("Files", file_bytes, only.file_bytes, wording.size))
    return tuple(found)


def _top1_change(after: float, before: float | None) -> Change:
    text = wording.percent(after, 2)
    if before is None:
        return Change("Top-1", None, text, "of the test images")
    return Change("Top-1", f"{100 * before:.2f}", text, wording.points(after - before))


def _latency_change(row: Row, p50_s: float, before: Row | None) -> Change:
    first_s = before.summary.p50_s if before and before.summary else None
    remark = "median of one inference"
    if row.speed_up:
        remark = wording.faster(row.speed_up.estimate)
    if row.measurement and row.measurement.environment.emulator:
        remark = "emulated: not the device's latency"
    first = wording.duration(first_s) if first_s else None
    share = p50_s / first_s if first_s and row.speed_up else None
    return Change("Latency, p50", first, wording.duration(p50_s), remark, share)


def _remaining(name: str, before: int | None, after: int, write: Callable[[float], str]) -> Change:
    if not before:
        return Change(name, None, write(after), "in total")
    remark = f"{wording.share_of(after, before)} of the baseline"
    return Change(name, write(before), write(after), remark, after / before)


def _warnings(run: Run, devices: Sequence[Device]) -> tuple[str, ...]:
    """Each warning once, with the names of its artifacts unless it concerns all of them."""
    found: dict[str, list[str]] = {warning: [] for warning in run.report.warnings}
    for device in devices:
        for row in device.timed:
            for warning in row.measurement.warnings if row.measurement else ():
                found.setdefault(warning, []).append(row.label)
        for warning in _device_warnings(device):
            found.setdefault(f"{device.name}: {warning}", [])
    total = len({row.label for device in devices for row in device.timed})
    lines = []
    for warning, labels in found.items():
        names = list(dict.fromkeys(labels))
        lines.append(f"{', '.join(names)}: {warning}" if names and len(names) < total else warning)
    return tuple(lines)


def _device_warnings(device: Device) -> list[str]:
    measurements = [row.measurement for row in device.timed if row.measurement]
    found = []
    if device.emulated:
        found.append("emulated time is not the device's latency; measure on the device itself.")
    if len({measurement.session for measurement in measurements}) > 1:
        found.append(
            "not all artifacts were measured interleaved, so the speed-ups include the machine's "
            "drift; measure them in one command."
        )
    totals = {each.total for each in measurements if each.total and each.of_all_images}
    if len(totals) > 1:
        counts = " and ".join(f"{total:,}" for total in sorted(totals))
        found.append(
            f"top-1 was counted on different numbers of images ({counts}), so it is not comparable."
        )
    return found
