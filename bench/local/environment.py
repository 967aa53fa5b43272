"""The machine and how busy it is; what a system does not report is None (Linux reports most).

This file needs Python 3.9 and nothing else: it is copied to a device next to the runner. It reads
no host name, user name or path.

    python environment.py [SNAPSHOT]

SNAPSHOT: a folder with copies of another machine's files (from device_snapshot.py), for a device
without Python.
"""

from __future__ import annotations

import os
import sys

# Run as a file inside its package, this folder would shadow the standard library's `statistics` and
# `warnings`.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import json
import platform
import re
import subprocess
import time
from typing import Any

Json = dict[str, Any]
# The folder that replaces the root of the file system; empty on the machine itself.
ROOT = ""
LIBRARIES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "ncnn",
    "apache-tvm",
    "executorch",
    "ai-edge-litert",
    "torch",
    "numpy",
    "vitrim",
)
# Sensor chips of processors, for machines without a thermal zone for them (most x86).
PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
# The ARM cores of the shipped targets, by the part number in /proc/cpuinfo (ARM's Main ID Register,
# implementer 0x41).
ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
# The generations of AMD's processors by family and range of models (Linux,
# arch/x86/kernel/cpu/amd.c): a virtual machine shows no number in the name.
ZEN = {
    23: ((0x00, 0x2F, "Zen"), (0x30, 0xFF, "Zen 2")),
    25: (
        *((0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3")),
        (0x60, 0xAF, "Zen 4"),
    ),
    26: ((0x00, 0x2F, "Zen 5"), (0x40, 0x4F, "Zen 5"), (0x60, 0x7F, "Zen 5")),
}
FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "fphp", "i8mm", "bf16", "sve", "sve2"),
)


def read_machine() -> Json:
    """Return what does not change while a model runs."""
    cpuinfo = _cpuinfo()
    architecture = _uname()[1] if ROOT else platform.machine()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return {
        "device_model": _text("/proc/device-tree/model", strip="\0"),
        "cpu_model": _cpu_model(cpuinfo),
        "architecture": architecture,
        "cpu_features": [name for name in FEATURES if name in flags],
        "cores": _cores(),
        "frequency_max_hz": _kilo("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"),
        "frequency_limit_hz": _kilo("/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual_machine": _virtual_machine(cpuinfo),
        "emulator": _emulator(architecture, cpuinfo),
        "accelerator": _accelerator(),
        "memory_total_bytes": _meminfo("MemTotal"),
        "os": _os_name(),
        "kernel": _uname()[0] if ROOT else platform.release(),
        "python": None if ROOT else platform.python_version(),
        "libraries": {} if ROOT else _libraries(),
    }


def read_state(watch_s: float = 0.2) -> Json:
    """Return what does change: frequency, load, temperature, throttling and free memory.

    The busy cores are the mean over `watch_s` seconds.
    """
    return {
        "frequency_hz": _frequency_hz(),
        "load": _load(),
        "busy_cores": _busy_cores(watch_s),
        "temperature_c": _temperature_c(),
        "throttled": _throttled(),
        "throttle_count": _throttle_count(),
        "stolen_ticks": _stolen_ticks(),
        "memory_available_bytes": _meminfo("MemAvailable"),
    }


def combine(machine: Json, before: Json, after: Json) -> Json:
    """Return a measurement's environment, from the machine and its state before and after it."""
    throttled = after["throttled"] or before["throttled"]
    counts = before["throttle_count"], after["throttle_count"]
    if throttled is None and None not in counts:
        times = counts[1] - counts[0]
        throttled = f"{times} times during the run" if times > 0 else "no"
    return {
        **machine,
        "stolen_share": _share(before.get("stolen_ticks"), after.get("stolen_ticks")),
        "frequency_hz": after["frequency_hz"],
        "load_before": before["load"],
        "load_after": after["load"],
        "busy_cores_before": before["busy_cores"],
        "busy_cores_after": after["busy_cores"],
        "temperature_before_c": before["temperature_c"],
        "temperature_after_c": after["temperature_c"],
        "throttled": throttled,
        "memory_available_bytes": before["memory_available_bytes"],
    }


def _share(before: list[float] | None, after: list[float] | None) -> float | None:
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _stolen_ticks() -> list[float] | None:
    """Return [ticks of runnable processes that the hypervisor gave away, all ticks] since boot."""
    lines = (_text("/proc/stat") or "").splitlines()
    words = lines[0].split() if lines else []
    if len(words) < 9:
        return None
    ticks = [float(value) for value in words[1:9]]
    return [ticks[7], sum(ticks)]


def _uname() -> tuple[str, str]:
    """Return (release, machine) from a snapshot's `uname -r -m`."""
    words = (_text("/uname") or "").split()
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def _load() -> float | None:
    try:
        return float((_text("/proc/loadavg") or "").split()[0]) if ROOT else os.getloadavg()[0]
    except (OSError, AttributeError, IndexError, ValueError):
        return None


def _cpuinfo() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _cpu_model(cpuinfo: dict[str, str]) -> str | None:
    if cpuinfo.get("CPU implementer") == "0x41" and cpuinfo.get("CPU part") in ARM_CORES:
        return ARM_CORES[cpuinfo["CPU part"]]
    name = cpuinfo.get("model name")
    if name == "AMD EPYC" and cpuinfo.get("vendor_id") == "AuthenticAMD":
        # Whoever reads "AMD EPYC" beside a time can't know which of its generations took it.
        family, model = int(cpuinfo.get("cpu family", "0")), int(cpuinfo.get("model", "0"))
        names = [name for low, high, name in ZEN.get(family, ()) if low <= model <= high]
        return f"AMD EPYC ({names[0]})" if names else name
    return name or cpuinfo.get("Hardware") or (None if ROOT else platform.processor()) or None


def _cores() -> int | None:
    if ROOT:
        lines = (_text("/proc/cpuinfo") or "").splitlines()
        return sum(line.split(":")[0].strip() == "processor" for line in lines) or None
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count()


def _virtual_machine(cpuinfo: dict[str, str]) -> str | None:
    if "hypervisor" not in cpuinfo.get("flags", "").split():
        return None
    return _text("/sys/class/dmi/id/sys_vendor") or _text("/sys/hypervisor/type") or "a hypervisor"


def _emulator(architecture: str, cpuinfo: dict[str, str]) -> str | None:
    # qemu's user emulation shows an emulated program the host's own cpuinfo, or, in newer releases,
    # one that looks real; /proc/interrupts is always the host's, and only x86 has the line "LOC".
    if architecture not in ("aarch64", "armv7l", "armv8l"):
        return None
    interrupts = _text("/proc/interrupts") or ""
    if "vendor_id" in cpuinfo or re.search(r"^\s*LOC:", interrupts, re.M):
        return "qemu-user"
    unknown = cpuinfo.get("CPU implementer") in ("0x00", "0x0", "0x51")
    if unknown and "qemu" in (_text("/proc/cpuinfo") or "").lower():
        return "qemu"
    return None


def _accelerator() -> str | None:
    name = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return name.splitlines()[0] if name else None


def _frequency_hz() -> float | None:
    exact = _kilo("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    if exact is not None:
        return exact
    mhz = _cpuinfo().get("cpu MHz")
    return float(mhz) * 1e6 if mhz else None


def _busy_cores(watch_s: float) -> float | None:
    before = _cpu_ticks("/proc/stat")
    if not ROOT:
        time.sleep(watch_s)
    after = _cpu_ticks("/proc/stat.after" if ROOT else "/proc/stat")
    if before is None or after is None or after[1] <= before[1]:
        return None
    busy = (after[0] - before[0]) / (after[1] - before[1])
    return busy * ((_cores() if ROOT else os.cpu_count()) or 1)


def _cpu_ticks(path: str) -> list[float] | None:
    lines = (_text(path) or "").splitlines()
    if not lines:
        return None
    # user nice system idle iowait irq softirq steal
    ticks = [float(value) for value in lines[0].split()[1:9]]
    return [sum(ticks) - ticks[3] - ticks[4], sum(ticks)]


def _temperature_c() -> float | None:
    values = []
    for zone in _listing("/sys/class/thermal"):
        if zone.startswith("thermal_zone"):
            value = _number(f"/sys/class/thermal/{zone}/temp")
            if value is not None and 0 < value < 150_000:
                values.append(value / 1000)
    for entry in _listing("/sys/class/hwmon"):
        chip = f"/sys/class/hwmon/{entry}"
        if (_text(f"{chip}/name") or "") in PROCESSOR_SENSORS:
            for file in _listing(chip):
                value = _number(f"{chip}/{file}") if re.match(r"^temp\d+_input$", file) else None
                if value is not None and 0 < value < 150_000:
                    values.append(value / 1000)
    return max(values) if values else None


def _throttled() -> str | None:
    output = _output(["vcgencmd", "get_throttled"])
    if not output or "=" not in output:
        return _clock_lowered()
    bits = int(output.split("=")[1], 16)
    # Raspberry Pi firmware: bit 0 under-voltage, 1 frequency capped, 2 throttled, 3 soft
    # temperature limit; +16: since boot.
    names = ["under-voltage", "frequency capped", "throttled", "soft temperature limit"]
    now = [name for bit, name in enumerate(names) if bits >> bit & 1]
    return ", ".join(now) if now else "no"


def _clock_lowered() -> str | None:
    """Return whether Linux lowers the clock because of the heat (boards and phones)."""
    states = []
    for entry in _listing("/sys/class/thermal"):
        kind = _text(f"/sys/class/thermal/{entry}/type") or ""
        if entry.startswith("cooling_device") and ("cpufreq" in kind or kind == "Processor"):
            state = _number(f"/sys/class/thermal/{entry}/cur_state")
            states += [] if state is None else [state]
    if not states:
        return None
    return "clock lowered because of the heat" if max(states) > 0 else "no"


def _throttle_count() -> float | None:
    return _number("/sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count")


def _meminfo(key: str) -> int | None:
    for line in (_text("/proc/meminfo") or "").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _os_name() -> str:
    for line in (_text("/etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return f"Linux {_uname()[0]}" if ROOT else f"{platform.system()} {platform.release()}"


def _libraries() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _text(path: str, strip: str = "") -> str | None:
    try:
        with open(ROOT + path, errors="replace") as stream:
            return stream.read().strip().strip(strip or None) or None
    except OSError:
        return None


def _number(path: str) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _kilo(path: str) -> float | None:
    value = _number(path)
    return None if value is None else value * 1000


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(ROOT + folder))
    except OSError:
        return []


def _output(command: list[str]) -> str | None:
    if ROOT:
        return _text("/" + command[0])
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


if __name__ == "__main__":
    ROOT = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else ""
    json.dump({"machine": read_machine(), "state": read_state()}, sys.stdout)
