"""Where and how the numbers were taken, in words: one list of (name, value) a device."""

from __future__ import annotations

from . import wording
from .overview import Device, Row
from .run import Run


def environment_facts(device: Device) -> list[tuple[str, str]]:
    """What the device told of itself; what it did not tell is left out."""
    e = device.environment
    row = next(iter(device.timed), None)
    if e is None or row is None or row.measurement is None:
        return []
    m = row.measurement
    facts: list[tuple[str, str | None]] = [
        ("Device", e.device_model),
        ("Processor", e.cpu_model),
        ("Architecture", e.architecture),
        ("Cores", f"{e.cores}" if e.cores else None),
        ("Features", ", ".join(e.cpu_features) or None),
        ("Clock", _clock(e.frequency_hz, e.frequency_max_hz)),
        ("Governor", e.governor),
        ("Virtual machine", e.virtual_machine),
        ("Emulator", e.emulator),
        ("Load before and after", _pair(e.load_before, e.load_after, "{:.2f}")),
        (
            "Temperature before and after",
            _pair(e.temperature_before_c, e.temperature_after_c, "{:.0f} °C"),
        ),
        ("Throttled", e.throttled),
        ("Memory", wording.size(e.memory_total_bytes) if e.memory_total_bytes else None),
        (
            "System",
            " · ".join(part for part in (e.os, f"kernel {e.kernel}" if e.kernel else None) if part)
            or None,
        ),
        ("Runtime", f"{m.runtime} {m.runtime_version}, {m.provider}"),
        (
            "Libraries",
            ", ".join(f"{name} {version}" for name, version in e.libraries.items()) or None,
        ),
        ("Python", e.python),
        ("Threads", _threads(row)),
        ("Input", f"{' × '.join(str(side) for side in m.input_shape)}, {m.input_type}"),
        ("Measured at", m.started_at),
    ]
    return [(name, value) for name, value in facts if value]


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What the run says of itself."""
    report = run.report
    seconds = sum(epoch.seconds or 0.0 for epoch in run.history)
    facts: list[tuple[str, str | None]] = [
        ("Recipe", report.recipe),
        ("Data", report.data),
        ("Seed", None if report.seed is None else str(report.seed)),
        (
            "Trained for",
            f"{wording.plural(len(run.history), 'epoch')}, {wording.long_duration(seconds)}"
            if seconds
            else None,
        ),
        ("Made at", report.created_at),
        (
            "Versions",
            ", ".join(f"{name} {version}" for name, version in report.versions.items()) or None,
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _pair(before: float | None, after: float | None, form: str) -> str | None:
    parts = [form.format(value) for value in (before, after) if value is not None]
    return " → ".join(parts) or None


def _clock(now_hz: float | None, most_hz: float | None) -> str | None:
    parts = [
        f"{now_hz / 1e9:.2f} GHz" if now_hz else None,
        f"at most {most_hz / 1e9:.2f} GHz" if most_hz else None,
    ]
    return ", ".join(part for part in parts if part) or None


def _threads(row: Row) -> str:
    m = row.measurement
    if m is None:
        return ""
    pinned = f", pinned to CPU {', '.join(map(str, m.pinning))}" if m.pinning else ", not pinned"
    return f"{m.threads}{pinned}, spinning {'on' if m.spinning else 'off'}"
