"""The environment is read from files of real kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vitrim.bench.local import environment

STAT = "cpu  1000 0 500 8000 100 0 0 0 0 0\ncpu0 1000 0 500 8000 100 0 0 0 0 0"
CPU0 = "sys/devices/system/cpu/cpu0/cpufreq"


def read(root: Path, files: dict[str, str]) -> dict[str, Any]:
    for name, content in {"proc/stat": STAT, "proc/stat.after": STAT, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    script = Path(str(environment.__file__))
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(root)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("files", "hottest"),
    [
        ({}, None),
        (
            {
                "sys/class/thermal/thermal_zone0/temp": "47236",
                "sys/class/thermal/thermal_zone1/temp": "51100",
            },
            51.1,
        ),
        # Most x86: no thermal zone of the processor, but its sensor chip; a disk's is no such chip.
        (
            {
                "sys/class/hwmon/hwmon3/name": "k10temp",
                "sys/class/hwmon/hwmon3/temp1_input": "63125",
            },
            63.125,
        ),
        (
            {"sys/class/hwmon/hwmon1/name": "nvme", "sys/class/hwmon/hwmon1/temp1_input": "81000"},
            None,
        ),
        # A disabled sensor reports an impossible value.
        ({"sys/class/thermal/thermal_zone0/temp": "-273000"}, None),
    ],
)
def test_the_hottest_sensor_of_the_processor_is_reported(
    tmp_path: Path, files: dict[str, str], hottest: float | None
) -> None:
    assert read(tmp_path, files)["state"]["temperature_c"] == hottest


@pytest.mark.parametrize(
    ("files", "throttled"),
    [
        ({}, None),
        ({"vcgencmd": "throttled=0x50005"}, "under-voltage, throttled"),
        ({"vcgencmd": "throttled=0x50000"}, "no"),
        (
            {
                "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
                "sys/class/thermal/cooling_device0/cur_state": "0",
            },
            "no",
        ),
        (
            {
                "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0",
                "sys/class/thermal/cooling_device0/cur_state": "2",
            },
            "clock lowered because of the heat",
        ),
        # A running fan does not lower the clock.
        (
            {
                "sys/class/thermal/cooling_device0/type": "pwm-fan",
                "sys/class/thermal/cooling_device0/cur_state": "3",
            },
            None,
        ),
    ],
)
def test_throttling_is_reported(
    tmp_path: Path, files: dict[str, str], throttled: str | None
) -> None:
    assert read(tmp_path, files)["state"]["throttled"] == throttled


def test_the_clock_and_the_governor_are_reported(tmp_path: Path) -> None:
    files = {
        f"{CPU0}/cpuinfo_max_freq": "2400000",
        f"{CPU0}/scaling_max_freq": "1500000",
        f"{CPU0}/scaling_governor": "ondemand",
    }
    machine = read(tmp_path, files)["machine"]
    assert (machine["frequency_max_hz"], machine["frequency_limit_hz"], machine["governor"]) == (
        2.4e9,
        1.5e9,
        "ondemand",
    )


def test_the_share_of_time_that_the_hypervisor_gave_away_is_reported(tmp_path: Path) -> None:
    before = read(tmp_path / "a", {})
    after = read(tmp_path / "b", {"proc/stat": "cpu  1500 0 500 8400 100 0 0 100 0 0"})
    assert environment.combine(before["machine"], before["state"], after["state"])[
        "stolen_share"
    ] == pytest.approx(0.1)
    # Without ticks there is no share.
    none = {**before["state"], "stolen_ticks": None}
    assert environment.combine(before["machine"], none, none)["stolen_share"] is None


def test_a_machine_without_readable_files_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, {"proc/stat": "", "proc/stat.after": ""})
    assert found["state"]["stolen_ticks"] is None
    assert found["machine"]["governor"] is None


@pytest.mark.parametrize(
    ("family", "model", "name", "wanted"),
    [
        ("25", "17", "AMD EPYC", "AMD EPYC (Zen 4)"),
        ("26", "2", "AMD EPYC", "AMD EPYC (Zen 5)"),
        ("99", "1", "AMD EPYC", "AMD EPYC"),
        ("25", "17", "AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_a_name_without_a_number_gets_the_generation(
    tmp_path: Path, family: str, model: str, name: str, wanted: str
) -> None:
    lines = {"vendor_id": "AuthenticAMD", "cpu family": family, "model": model, "model name": name}
    content = "\n".join(f"{key}\t: {value}" for key, value in lines.items())
    assert read(tmp_path, {"proc/cpuinfo": content})["machine"]["cpu_model"] == wanted
