"""Energy where the device tells it: RAPL, INA sensors (hwmon or iio), tegrastats, a GPU's own
meter. Where none tells, there is none; nothing is guessed.

This file needs Python 3.9 and nothing else: it travels to a device beside the runner. A meter shows
joules that only rise; what a run took is the difference of two readings. It includes whatever else
the metered part did meanwhile, and its idle power.

    python energy.py [ROOT]          (what is found here, and its power over half a second)
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

# Sensors of one board often meter a part of what another meters; the first name that is there
# stands for all.
TOTALS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VDD_5V_IN", "5V0_SYS")
INA = re.compile(r"^ina(2\d\d|2xx|3221)x?$")
SAMPLE_S = 0.02


class Meter:
    """source: which meter, in a few words; scope: what it meters."""

    source = ""
    scope = ""

    def read_j(self) -> float | None:
        """Joules since the meter was opened, or since the device's own count began; None where this
        reading failed.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop what runs in the background."""


class Rapl(Meter):
    """The processor's own counters (Linux powercap): packages, and memory where it is counted
    apart. Counters that wrapped around are followed.
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
    """A power sensor, asked again and again in the background and summed over time by
    trapezoids.
    """

    def __init__(
        self,
        source: str,
        scope: str,
        power_w: Callable[[], float | None],
        every_s: float = SAMPLE_S,
    ) -> None:
        self.source, self.scope, self.power_w, self.every_s = source, scope, power_w, every_s
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.total_j, self.failed = 0.0, False
        self.last: tuple[float, float] | None = None
        self._take()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def read_j(self) -> float | None:
        self._take()
        with self.lock:
            return None if self.failed else self.total_j

    def close(self) -> None:
        self.ended.set()
        self.thread.join(timeout=2)

    def _run(self) -> None:
        while not self.ended.wait(self.every_s):
            self._take()

    def _take(self) -> None:
        watts, now = self.power_w(), time.perf_counter()
        with self.lock:
            # A gap cannot be summed over: from then on nothing is told.
            self.failed = self.failed or watts is None
            if watts is not None and self.last is not None:
                self.total_j += (now - self.last[0]) * (watts + self.last[1]) / 2
            self.last = None if watts is None else (now, watts)


class Told(Meter):
    """A program that prints one reading after another (tegrastats, nvidia-smi -lms); its newest is
    the present power.
    """

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
        threading.Thread(target=self._listen, daemon=True).start()
        self.first.wait(timeout=3)
        self.inner = (
            None
            if self.newest is None
            else Sampled(
                source, scope, lambda: self.newest if self.process.poll() is None else None
            )
        )

    def read_j(self) -> float | None:
        return None if self.inner is None else self.inner.read_j()

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _listen(self) -> None:
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
        millijoules = ctypes.c_ulonglong()
        if (
            self.library.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(millijoules))
            != 0
        ):
            return None
        return millijoules.value * 1e-3


def open_meter(root: str = "/", *, gpu: bool = False) -> Meter | None:
    """The meter nearest to what runs the model: a GPU's own for a GPU, else the board's sensors,
    else the processor's counters; None without any.

    root: where /sys begins, for a copy of a device's files; programs and libraries are only asked
    for the machine's own root.
    """
    here = root == "/"
    if gpu and here:
        return _nvml() or _nvidia_smi()
    sensor = _ina(root)
    if sensor is not None:
        return sensor
    if here and (tegra := _tegrastats()) is not None:
        return tegra
    zones = rapl_zones(root)
    if zones:
        meter = Rapl(zones)
        # A counter that only root may read is no meter.
        return meter if meter.read_j() is not None else None
    return None


# ---- where the kernel shows them -------------------------------------------------------------------------------------------------------


def rapl_zones(root: str = "/") -> list[str]:
    """The zones to sum: packages, and their memory. Cores and graphics are parts of a package, and
    psys counts it once more.
    """
    folder = os.path.join(root, "sys/class/powercap")
    found = []
    for zone in _listing(folder):
        name = _text(os.path.join(folder, zone, "name")) or ""
        if (re.match(r"^(intel|amd)-rapl:\d+$", zone) and name.startswith("package")) or (
            re.match(r"^(intel|amd)-rapl:\d+:\d+$", zone) and name == "dram"
        ):
            found.append(os.path.join(folder, zone))
    return found


def _ina(root: str) -> Meter | None:
    rails = {**_hwmon_rails(root), **_iio_rails(root)}
    if not rails:
        return None
    total = next((name for name in TOTALS if name in rails), None)
    if total is None and len(rails) > 1:
        # Nobody says which rails contain which; a sum could count one twice.
        return None
    name = total or next(iter(rails))
    return Sampled("INA sensor", f"board, rail {name}", rails[name])


def _hwmon_rails(root: str) -> dict[str, Callable[[], float | None]]:
    """{rail: power in watts} of INA chips under hwmon: powerN_input in microwatts, or inN_input
    (mV) times currN_input (mA).
    """
    folder, found = os.path.join(root, "sys/class/hwmon"), {}
    for entry in _listing(folder):
        chip = os.path.join(folder, entry)
        kind = _text(os.path.join(chip, "name")) or ""
        if not INA.match(kind):
            continue
        files = _listing(chip)
        for file in files:
            match = re.match(r"^(curr|power)(\d+)_input$", file)
            if not match:
                continue
            number = match[2]
            label = _text(os.path.join(chip, f"in{number}_label")) or f"{kind} {entry} {number}"
            if match[1] == "power":
                found[label] = _scaled(os.path.join(chip, file), 1e-6)
            elif (
                f"power{number}_input" not in files
                and f"in{_voltage_of(files, number)}_input" in files
            ):
                volts, amps = (
                    os.path.join(chip, f"in{_voltage_of(files, number)}_input"),
                    os.path.join(chip, file),
                )
                found[label] = _product(_scaled(volts, 1e-3), _scaled(amps, 1e-3))
    return found


def _voltage_of(files: list[str], number: str) -> str:
    # An ina219 or ina226 shows the shunt as in0 and the bus as in1, an ina3221 each channel's bus
    # under its own number.
    return number if f"in{number}_input" in files else "1"


def _iio_rails(root: str) -> dict[str, Callable[[], float | None]]:
    """The same under iio: NVIDIA's ina3221x (rail_name_N, in_powerN_input in milliwatts), and the
    mainline driver (in_powerN_raw times its scale).
    """
    found = {}
    folders = [
        os.path.join(root, "sys/bus/iio/devices", entry)
        for entry in _listing(os.path.join(root, "sys/bus/iio/devices"))
    ]
    drivers = os.path.join(root, "sys/bus/i2c/drivers/ina3221x")
    for device in _listing(drivers):
        folders += [
            os.path.join(drivers, device, entry)
            for entry in _listing(os.path.join(drivers, device))
            if entry.startswith("iio:device")
        ]
    for folder in folders:
        kind, files = _text(os.path.join(folder, "name")) or "", _listing(folder)
        if not (INA.match(kind) or any(file.startswith("rail_name_") for file in files)):
            continue
        for file in files:
            match = re.match(r"^in_power(\d+)_(input|raw)$", file)
            if not match:
                continue
            label = (
                _text(os.path.join(folder, f"rail_name_{match[1]}"))
                or f"{kind or 'ina'} {os.path.basename(folder)} {match[1]}"
            )
            scale = (
                1.0
                if match[2] == "input"
                else _real(os.path.join(folder, f"in_power{match[1]}_scale"))
            )
            if scale is not None:
                # iio counts power in milliwatts.
                found[label] = _scaled(os.path.join(folder, file), scale * 1e-3)
    return found


# ---- programs and libraries ------------------------------------------------------------------------------------------------------------


def tegrastats_power_w(line: str) -> float | None:
    """The board's input power in a line of tegrastats: `VDD_IN 4532mW/4400mW` (JetPack 5 and later)
    or `POM_5V_IN 2522/2480` (JetPack 4), now/mean.
    """
    for name in TOTALS:
        match = re.search(rf"\b{name}\s+(\d+)(?:mW)?/\d+(?:mW)?", line)
        if match:
            return int(match[1]) / 1000
    return None


def nvidia_smi_power_w(line: str) -> float | None:
    """Watts in a line of `nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits`; [N/A]
    where the GPU does not tell.
    """
    try:
        return float(line.split(",")[0])
    except ValueError:
        return None


def _tegrastats() -> Meter | None:
    if shutil.which("tegrastats") is None:
        return None
    return _telling(
        Told("tegrastats", "board", ["tegrastats", "--interval", "50"], tegrastats_power_w)
    )


def _nvidia_smi() -> Meter | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = [
        "nvidia-smi",
        "--query-gpu=power.draw",
        "--format=csv,noheader,nounits",
        "-lms",
        "50",
        "-i",
        "0",
    ]
    return _telling(Told("nvidia-smi", "GPU board", command, nvidia_smi_power_w))


def _telling(meter: Told) -> Meter | None:
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


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def _scaled(path: str, factor: float) -> Callable[[], float | None]:
    def read() -> float | None:
        value = _real(path)
        return None if value is None else value * factor

    return read


def _product(
    first: Callable[[], float | None], second: Callable[[], float | None]
) -> Callable[[], float | None]:
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
    """Print what is metered here."""
    meter = open_meter(arguments[0] if arguments else "/")
    if meter is None:
        sys.stdout.write("no meter: this device tells no energy (RAPL may need root)\n")
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
