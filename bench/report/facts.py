"""The environment of a measurement and the facts of a run, as (name, value) pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import wording
from .overview import Device, Row
from .run import Run

Facts = list[tuple[str, str]]


def environment_facts(device: Device) -> Facts:
    """What is known of a device; unknown facts are left out."""
    e = device.environment
    row = next(iter(device.timed), None)
    if e is None or row is None or row.measurement is None:
        return []
    m = row.measurement
    system = (e.os, f"kernel {e.kernel}" if e.kernel else None)
    temperature = _pair(e.temperature_before_c, e.temperature_after_c, "{:.0f} °C")
    shape = " × ".join(str(side) for side in m.input_shape)
    facts: list[tuple[str, str | None]] = [
        ("Device", e.device_model),
        ("Processor", e.cpu_model),
        ("Architecture", e.architecture),
        ("Cores", f"{e.cores}" if e.cores else None),
        ("Features", ", ".join(e.cpu_features)),
        ("Clock", _clock(e.frequency_hz, e.frequency_max_hz)),
        ("Governor", e.governor),
        ("Virtual machine", e.virtual_machine),
        ("Emulator", e.emulator),
        ("Load before and after", _pair(e.load_before, e.load_after, "{:.2f}")),
        ("Temperature before and after", temperature),
        ("Throttled", e.throttled),
        ("Memory", wording.size(e.memory_total_bytes) if e.memory_total_bytes else None),
        ("System", " · ".join(part for part in system if part)),
        ("Runtime", f"{m.runtime} {m.runtime_version}, {m.provider}"),
        ("Libraries", _versions(e.libraries)),
        ("Python", e.python),
        ("Threads", _threads(row)),
        ("Input", f"{shape}, {m.input_type}"),
        ("Measured at", m.started_at),
    ]
    return _known(facts)


def run_facts(run: Run) -> Facts:
    """What is known of a run; unknown facts are left out."""
    report = run.report
    seconds = sum(epoch.seconds or 0.0 for epoch in run.history)
    epochs = wording.plural(len(run.history), "epoch")
    facts: list[tuple[str, str | None]] = [
        ("Recipe", report.recipe),
        ("Data", report.data),
        ("Seed", None if report.seed is None else str(report.seed)),
        ("Training", f"{epochs}, {wording.long_duration(seconds)}" if seconds else None),
        ("Created at", report.created_at),
        ("Versions", _versions(report.versions)),
    ]
    return _known(facts)


def _known(facts: Iterable[tuple[str, str | None]]) -> Facts:
    return [(name, value) for name, value in facts if value]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _pair(before: float | None, after: float | None, form: str) -> str:
    return " → ".join(form.format(value) for value in (before, after) if value is not None)


def _clock(now_hz: float | None, max_hz: float | None) -> str:
    parts = [
        f"{now_hz / 1e9:.2f} GHz" if now_hz else "",
        f"at most {max_hz / 1e9:.2f} GHz" if max_hz else "",
    ]
    return ", ".join(part for part in parts if part)


def _threads(row: Row) -> str:
    m = row.measurement
    if m is None:
        return ""
    pinned = f", pinned to CPU {', '.join(map(str, m.pinning))}" if m.pinning else ", not pinned"
    return f"{m.threads}{pinned}, spinning {'on' if m.spinning else 'off'}"
