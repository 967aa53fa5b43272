"""The figures of a run, derived once: rows grouped by device, speed-ups against the baseline of the
same device, and the headline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..results.measurement import Environment, Measurement
from ..results.statistics import Interval, Summary, ratio_interval
from . import wording
from .model import ModelEntry
from .run import Run

# How far below the best compact artifact the headline's one may be, in share of the images.
HEADLINE_MARGIN = 0.01
USUAL_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Row:
    """One artifact on one device. `series` numbers its colour and shape in all pictures; 0 is the
    baseline.
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
        return self.measurement.summary() if self.measurement else None

    @cached_property
    def interval(self) -> Interval | None:
        return self.measurement.interval() if self.measurement else None

    @property
    def top1(self) -> float | None:
        """Of the very artifact that was timed, else of the model it came from; a share."""
        measured = self.measurement.top1 if self.measurement else None
        return self.model_top1 if measured is None else measured

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the artifact's top-1; None where no images were counted."""
        m = self.measurement
        if m is None or m.correct is None or m.total is None:
            return None
        z, n, p = 1.959964, m.total, m.correct / m.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def efficiency(self) -> float | None:
        """Speed-up over MAC reduction: 1 says that every removed multiply-add saved its share of
        the time.
        """
        return (
            self.speed_up.estimate / self.mac_reduction
            if self.speed_up and self.mac_reduction
            else None
        )


@dataclass(frozen=True)
class Device:
    """Rows taken in one place with equal threads and batch; only these are compared with each
    other.
    """

    name: str
    setting: str
    emulated: bool
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.name} · {self.setting}" if self.setting else self.name

    @property
    def timed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.measurement is not None)

    @property
    def baseline(self) -> Row | None:
        return next((row for row in self.rows if row.series == 0), None)

    @property
    def environment(self) -> Environment | None:
        return next((row.measurement.environment for row in self.rows if row.measurement), None)


@dataclass(frozen=True)
class Change:
    """One figure before and after, ready to be shown: `share` is what remains of it (None where
    that says nothing).
    """

    name: str
    before: str | None
    after: str
    remark: str
    share: float | None


@dataclass(frozen=True)
class Overview:
    """What both the Markdown and the HTML report show."""

    title: str
    headline: str
    changes: tuple[Change, ...]
    chosen: str | None
    devices: tuple[Device, ...]
    warnings: tuple[str, ...]


def overview(run: Run) -> Overview:
    """Derive all figures of `run`."""
    devices = _devices(run)
    baseline, chosen = _pair(devices)
    changes = _changes(run, baseline, chosen)
    return Overview(
        title=run.report.title or run.report.recipe or "vitrim report",
        headline=_headline(run, baseline, chosen),
        changes=changes,
        chosen=chosen.label if chosen else None,
        devices=devices,
        warnings=_warnings(run, devices),
    )


def baseline_name(run: Run) -> str:
    """The model that the others are compared with."""
    models = run.report.models
    return next((name for name in ("baseline", "dense") if name in models), next(iter(models)))


def _devices(run: Run) -> tuple[Device, ...]:
    models = run.report.models
    reference = baseline_name(run)
    found = [(name, model, entry) for name, model in models.items() for entry in model.artifacts]
    found.sort(key=lambda item: item[0] != reference)
    several_runtimes = len({entry.runtime for _, _, entry in found}) > 1
    # Number 0 is the baseline's alone, even where it was not measured.
    first_number = 0 if models[reference].artifacts else 1
    series: dict[str, int] = {}
    places: dict[tuple[str, str, bool], list[Row]] = {}
    for name, model, entry in found:
        # The usual runtime goes without saying.
        label = f"{name} {entry.precision}" + (
            f" {entry.runtime}" if several_runtimes and entry.runtime != USUAL_RUNTIME else ""
        )
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
        places.setdefault(_place(row), []).append(row)
    return tuple(
        Device(device, setting + when, emulated, tuple(_compared(part, models.get(reference))))
        for (device, setting, emulated), rows in places.items()
        for when, part in _occasions(rows)
    )


def _occasions(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """[("", rows)], or where artifacts were measured more than once in one place, the rows of each
    occasion with its time.
    """
    labels = [row.label for row in rows]
    if len(set(labels)) == len(labels):
        return [("", rows)]
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        sessions.setdefault(row.measurement.session if row.measurement else "", []).append(row)
    found: dict[str, list[Row]] = {}
    for part in sessions.values():
        first = part[0].measurement
        when = f", measured {first.started_at[:19].replace('T', ' ')}" if first else ""
        # Two at the same second are told apart by a number.
        name = next(
            name
            for number in range(1, len(sessions) + 1)
            if (name := when if number == 1 else f"{when} ({number})") not in found
        )
        found[name] = part
    return list(found.items())


def _place(row: Row) -> tuple[str, str, bool]:
    m = row.measurement
    if m is None:
        return row.target, "not measured", False
    environment = m.environment
    told = environment.device_model or environment.cpu_model
    name = (
        told
        or (m.target if m.target != "host" else None)
        or ("this machine" if m.device in ("host", "local") else m.device)
    )
    if m.device not in ("host", "local") and not environment.emulator and name != m.device:
        name = f"{name}, over {m.device}"
    setting = wording.plural(m.threads, "thread") + (f", batch {m.batch}" if m.batch > 1 else "")
    if environment.emulator:
        return f"{name}, emulated by {environment.emulator}", setting, True
    return name, setting, False


def _compared(rows: Sequence[Row], reference: ModelEntry | None) -> list[Row]:
    # An emulator slows some instructions more than others, so a ratio of emulated times says
    # nothing about the device.
    first = next(
        (
            row
            for row in rows
            if row.series == 0 and row.measurement and not row.measurement.environment.emulator
        ),
        None,
    )
    compared = []
    for row in rows:
        speed_up, mac_reduction = None, None
        if reference and reference.macs and row.macs and row.series != 0:
            mac_reduction = reference.macs / row.macs
        if first and first.measurement and row.measurement and row is not first:
            a, b = first.measurement, row.measurement
            turns = a.samples_per_turn or None, b.samples_per_turn or None
            paired = a.session == b.session
            speed_up = ratio_interval(
                a.latency_s, b.latency_s, turns[0], turns[1], paired=paired, level=0.95
            )
        compared.append(replace(row, speed_up=speed_up, mac_reduction=mac_reduction))
    return compared


def _pair(devices: Sequence[Device]) -> tuple[Row | None, Row | None]:
    """The baseline and the artifact of the headline: the fastest within a point of the most
    accurate, on the first real device.
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
        timed = [row for row in good if row.summary]
        chosen = (
            min(timed, key=lambda row: row.summary.p50_s if row.summary else 0.0)
            if timed
            else good[0]
        )
        return device.baseline, chosen
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
        return f"{only.label}: runs under {only.measurement.environment.emulator}, which tells nothing of a device's latency"
    if only and only.summary:
        return f"{only.label}: p50 {wording.duration(only.summary.p50_s)} an inference"
    return f"{wording.plural(len(run.report.models), 'model')}, nothing measured yet"


def _before_after(
    run: Run, baseline: Row | None, chosen: Row | None, key: str
) -> tuple[int, int] | None:
    """A count of the baseline and of the compact model, also where neither has an artifact yet."""
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
        if before is None or before.top1 is None:
            found.append(
                Change("Top-1", None, wording.percent(only.top1, 2), "of the test images", None)
            )
        else:
            difference = wording.points(only.top1 - before.top1)
            found.append(
                Change(
                    "Top-1",
                    f"{100 * before.top1:.2f}",
                    wording.percent(only.top1, 2),
                    difference,
                    None,
                )
            )
    if only.summary:
        p50_s, first_s = (
            only.summary.p50_s,
            before.summary.p50_s if before and before.summary else None,
        )
        remark = (
            wording.faster(only.speed_up.estimate) if only.speed_up else "median of one inference"
        )
        if only.measurement and only.measurement.environment.emulator:
            remark = "emulated: not the device's latency"
        share = p50_s / first_s if first_s and only.speed_up else None
        found.append(
            Change(
                "Latency, p50",
                wording.duration(first_s) if first_s else None,
                wording.duration(p50_s),
                remark,
                share,
            )
        )
    found.append(
        _remaining("Files", before.file_bytes if before else None, only.file_bytes, wording.size)
    )
    return tuple(found)


def _remaining(name: str, before: int | None, after: int, write: Callable[[float], str]) -> Change:
    if not before:
        return Change(name, None, write(after), "in all", None)
    return Change(
        name,
        write(before),
        write(after),
        f"{wording.share_of(after, before)} remain",
        after / before,
    )


def _warnings(run: Run, devices: Sequence[Device]) -> tuple[str, ...]:
    found: dict[str, list[str]] = {}
    for warning in run.report.warnings:
        found.setdefault(warning, [])
    for device in devices:
        for row in device.timed:
            for warning in row.measurement.warnings if row.measurement else ():
                found.setdefault(warning, []).append(row.label)
        if device.emulated:
            found.setdefault(
                f"{device.name}: emulated time is not the device's latency; measure on the device itself.",
                [],
            )
        sessions = {row.measurement.session for row in device.timed if row.measurement}
        if len(sessions) > 1:
            text = f"{device.name}: not all artifacts were measured in turn, so the speed-ups hold the machine's drift; measure them together."
            found.setdefault(text, [])
        totals = {
            row.measurement.total
            for row in device.timed
            if row.measurement and row.measurement.total
        }
        if len(totals) > 1:
            counts = " and ".join(f"{total:,}" for total in sorted(totals))
            found.setdefault(
                f"{device.name}: top-1 was counted on different numbers of images ({counts}); compare with care.",
                [],
            )
    every = len({row.label for device in devices for row in device.timed})
    lines = []
    for warning, labels in found.items():
        named = list(dict.fromkeys(labels))
        lines.append(f"{', '.join(named)}: {warning}" if named and len(named) < every else warning)
    return tuple(lines)
