"""Energy meters: RAPL, INA sensors (hwmon or iio), tegrastats, and a GPU's own meter.

This file needs Python 3.9 and nothing else: it is copied to a device next to the runner. A reading
is a rising count of joules; a run's energy is the difference of two readings. It includes the idle
power of the metered part and whatever else that part did. Without a meter no energy is reported.

    python energy.py [ROOT]          (prints the meter and its power over half a second)
"""

from __future__ import annotations

import os
import sys

# Run as a file inside its package, this folder would shadow the standard library's `statistics` and
# `warnings`.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import ctypes
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

# Rails that include the others of their board; the first that exists is the board's total.
TOTALS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VDD_5V_IN", "5V0_SYS")
INA = re.compile(r"^ina(2\d\d|2xx|3221)x?$")
SAMPLE_S = 0.02
Power = Callable[[], "float | None"]


class Meter:
    """An energy meter: `source` is its kind, `scope` the part of the device that it meters."""

    source = ""
    scope = ""

    def read_j(self) -> float | None:
        """Return joules since an arbitrary start; None where the reading failed."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop background threads and processes."""


class Rapl(Meter):
    """The processor's own counters (Linux powercap), for packages and separately counted memory.

    A counter that wraps around is corrected by its range.
    """

    def __init__(self, zones: list[str]) -> None:
        self.zones = [(zone, _whole(os.path.join(zone, "max_energy_range_uj"))) for zone in zones]
        self.source = "RAPL"
        names = sorted(
            {(_text(os.path.join(zone, "name")) or "package").split("-")[0] for zone in zones}
        )
        self.scope = "processor " + " and ".join(names)
        self.last: list[int | None] = [None] * len(zones)
        self.total_uj = 0

    def read_j(self) -> float | None:
        """Return joules since the first reading."""
        for index, (zone, highest) in enumerate(self.zones):
            now = _whole(os.path.join(zone, "energy_uj"))
            if now is None:
                return None
            before = self.last[index]
            if before is not None:
                rise = now - before
                if rise < 0:
                    if highest is None:
                        return None
                    rise += highest + 1
                self.total_uj += rise
            self.last[index] = now
        return self.total_uj * 1e-6


class Sampled(Meter):
    """A power sensor that is sampled in the background and integrated by trapezoids."""

    def __init__(
        self,
        source: str,
        scope: str,
        power_w: Power,
        every_s: float = SAMPLE_S,
    ) -> None:
        self.source, self.scope, self.power_w, self.every_s = source, scope, power_w, every_s
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.total_j, self.failed = 0.0, False
        self.last: tuple[float, float] | None = None
        self._sample()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def read_j(self) -> float | None:
        """Return joules since the meter was opened."""
        self._sample()
        with self.lock:
            return None if self.failed else self.total_j

    def close(self) -> None:
        """Stop the sampling."""
        self.ended.set()
        self.thread.join(timeout=2)

    def _run(self) -> None:
        while not self.ended.wait(self.every_s):
            self._sample()

    def _sample(self) -> None:
        watts, now = self.power_w(), time.perf_counter()
        with self.lock:
            # The energy of a gap is unknown, so every later reading fails.
            self.failed = self.failed or watts is None
            if watts is not None and self.last is not None:
                self.total_j += (now - self.last[0]) * (watts + self.last[1]) / 2
            self.last = None if watts is None else (now, watts)


class PrintedPower(Meter):
    """A program that prints power readings (tegrastats, nvidia-smi -lms); the newest one counts."""

    def __init__(
        self, source: str, scope: str, command: list[str], power_w: Callable[[str], float | None]
    ) -> None:
        self.source, self.scope = source, scope
        self.newest: float | None = None
        self.first = threading.Event()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        self.parse = power_w
        threading.Thread(target=self._read_lines, daemon=True).start()
        self.first.wait(timeout=3)
        self.inner = None if self.newest is None else Sampled(source, scope, self._power_w)

    def _power_w(self) -> float | None:
        return self.newest if self.process.poll() is None else None

    def read_j(self) -> float | None:
        """Return joules since the meter was opened."""
        return None if self.inner is None else self.inner.read_j()

    def close(self) -> None:
        """End the program."""
        if self.inner is not None:
            self.inner.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _read_lines(self) -> None:
        for line in self.process.stdout or ():
            watts = self.parse(line.decode(errors="replace"))
            if watts is not None:
                self.newest = watts
                self.first.set()
        self.first.set()


class Nvml(Meter):
    """A GPU's own energy counter (Volta and newer), through NVIDIA's management library."""

    def __init__(self, library: Any, device: Any) -> None:
        self.library, self.device = library, device
        self.source, self.scope = "NVML", "GPU board"

    def read_j(self) -> float | None:
        """Return joules since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        read = self.library.nvmlDeviceGetTotalEnergyConsumption
        if read(self.device, ctypes.byref(millijoules)) != 0:
            return None
        return millijoules.value * 1e-3


def open_meter(root: str = "/", *, gpu: bool = False) -> Meter | None:
    """Open the meter closest to what runs the model.

    It is the GPU's own for a model on a GPU, else the board's sensors, else the processor's
    counters; None where the device has none of them.

    Args:
        root: The folder that contains `sys`, for a copy of a device's files. Programs and
            libraries are used for `/` only.
        gpu: Whether the model runs on a GPU.
    """
    this_machine = root == "/"
    if gpu and this_machine:
        return _nvml() or _nvidia_smi()
    sensor = _ina(root)
    if sensor is not None:
        return sensor
    if this_machine and (tegra := _tegrastats()) is not None:
        return tegra
    zones = rapl_zones(root)
    if zones:
        meter = Rapl(zones)
        # Often only root may read the counters.
        return meter if meter.read_j() is not None else None
    return None


# ---- files of the kernel -------------------------------------------------------------------------


def rapl_zones(root: str = "/") -> list[str]:
    """Return the zones to add up: packages and their memory.

    Cores and graphics are parts of a package, and psys includes it.
    """
    folder = os.path.join(root, "sys/class/powercap")
    found = []
    for zone in _listing(folder):
        name = _text(os.path.join(folder, zone, "name")) or ""
        is_package = re.match(r"^(intel|amd)-rapl:\d+$", zone) and name.startswith("package")
        is_memory = re.match(r"^(intel|amd)-rapl:\d+:\d+$", zone) and name == "dram"
        if is_package or is_memory:
            found.append(os.path.join(folder, zone))
    return found


def _ina(root: str) -> Meter | None:
    rails = {**_hwmon_rails(root), **_iio_rails(root)}
    if not rails:
        return None
    total = next((name for name in TOTALS if name in rails), None)
    if total is None and len(rails) > 1:
        # It is unknown which rails include others; a sum could count one twice.
        return None
    name = total or next(iter(rails))
    return Sampled("INA sensor", f"board, rail {name}", rails[name])


def _hwmon_rails(root: str) -> dict[str, Power]:
    """Return {rail: power in watts} of the INA chips under hwmon.

    The files are powerN_input in microwatts, or inN_input (mV) times currN_input (mA).
    """
    folder, found = os.path.join(root, "sys/class/hwmon"), {}
    for entry in _listing(folder):
        chip = os.path.join(folder, entry)
        kind = _text(os.path.join(chip, "name")) or ""
        files = _listing(chip) if INA.match(kind) else []
        for file in files:
            match = re.match(r"^(curr|power)(\d+)_input$", file)
            if not match:
                continue
            number = match[2]
            # An ina219 or ina226 has the shunt as in0 and the bus as in1; an ina3221 has each
            # channel's bus under its own number.
            volts = f"in{number}_input" if f"in{number}_input" in files else "in1_input"
            label = _text(os.path.join(chip, f"in{number}_label")) or f"{kind} {entry} {number}"
            path = os.path.join(chip, file)
            if match[1] == "power":
                found[label] = _scaled(path, 1e-6)
            elif f"power{number}_input" not in files and volts in files:
                found[label] = _product(
                    _scaled(os.path.join(chip, volts), 1e-3), _scaled(path, 1e-3)
                )
    return found


def _iio_rails(root: str) -> dict[str, Power]:
    """Return {rail: power in watts} of the INA chips under iio.

    The files are NVIDIA's ina3221x (rail_name_N, in_powerN_input in milliwatts), or those of the
    mainline driver (in_powerN_raw times its scale).
    """
    found = {}
    for folder in _iio_folders(root):
        kind, files = _text(os.path.join(folder, "name")) or "", _listing(folder)
        if not (INA.match(kind) or any(file.startswith("rail_name_") for file in files)):
            continue
        for file in files:
            match = re.match(r"^in_power(\d+)_(input|raw)$", file)
            if not match:
                continue
            number = match[1]
            label = (
                _text(os.path.join(folder, f"rail_name_{number}"))
                or f"{kind or 'ina'} {os.path.basename(folder)} {number}"
            )
            scale: float | None = 1.0
            if match[2] == "raw":
                scale = _real(os.path.join(folder, f"in_power{number}_scale"))
            if scale is not None:
                # iio's unit of power is the milliwatt.
                found[label] = _scaled(os.path.join(folder, file), scale * 1e-3)
    return found


def _iio_folders(root: str) -> list[str]:
    devices = os.path.join(root, "sys/bus/iio/devices")
    drivers = os.path.join(root, "sys/bus/i2c/drivers/ina3221x")
    folders = [os.path.join(devices, entry) for entry in _listing(devices)]
    for device in _listing(drivers):
        folder = os.path.join(drivers, device)
        entries = [entry for entry in _listing(folder) if entry.startswith("iio:device")]
        folders += [os.path.join(folder, entry) for entry in entries]
    return folders


# ---- programs and libraries ----------------------------------------------------------------------


def tegrastats_power_w(line: str) -> float | None:
    """Return the board's input power from a line of tegrastats.

    It reads `VDD_IN 4532mW/4400mW` (JetPack 5 and later) or `POM_5V_IN 2522/2480` (JetPack 4): the
    power now, and its mean.
    """
    for name in TOTALS:
        match = re.search(rf"\b{name}\s+(\d+)(?:mW)?/\d+(?:mW)?", line)
        if match:
            return int(match[1]) / 1000
    return None


def nvidia_smi_power_w(line: str) -> float | None:
    """Return the watts in a line of nvidia-smi's power.draw (csv, no units); None for [N/A]."""
    try:
        return float(line.split(",")[0])
    except ValueError:
        return None


def _tegrastats() -> Meter | None:
    if shutil.which("tegrastats") is None:
        return None
    command = ["tegrastats", "--interval", "50"]
    return _working(PrintedPower("tegrastats", "board", command, tegrastats_power_w))


def _nvidia_smi() -> Meter | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", *query, "-lms", "50", "-i", "0"]
    return _working(PrintedPower("nvidia-smi", "GPU board", command, nvidia_smi_power_w))


def _working(meter: PrintedPower) -> Meter | None:
    if meter.inner is None:
        meter.close()
        return None
    return meter


def _nvml() -> Meter | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device = ctypes.c_void_p()
    if (
        library.nvmlInit_v2() != 0
        or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0
    ):
        return None
    meter = Nvml(library, device)
    return meter if meter.read_j() is not None else None


# ---- reading files -------------------------------------------------------------------------------


def _scaled(path: str, factor: float) -> Power:
    def read() -> float | None:
        value = _real(path)
        return None if value is None else value * factor

    return read


def _product(first: Power, second: Power) -> Power:
    def read() -> float | None:
        one, two = first(), second()
        return None if one is None or two is None else one * two

    return read


def _text(path: str) -> str | None:
    try:
        with open(path, errors="replace") as stream:
            return stream.read().strip() or None
    except OSError:
        return None


def _real(path: str) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _whole(path: str) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def main(arguments: list[str]) -> int:
    """Print this device's meter; return the exit code."""
    meter = open_meter(arguments[0] if arguments else "/")
    if meter is None:
        sys.stdout.write("no energy meter on this device (RAPL may need root)\n")
        return 1
    before, start = meter.read_j(), time.perf_counter()
    time.sleep(0.5)
    after, seconds = meter.read_j(), time.perf_counter() - start
    meter.close()
    power = "" if before is None or after is None else f": {(after - before) / seconds:.2f} W"
    sys.stdout.write(f"{meter.source} ({meter.scope}){power}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
