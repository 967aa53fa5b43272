"""Meters read the files of real kernels; without a readable meter there is none."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vitrim.bench.local import energy


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")


INTEL = {
    "sys/class/powercap/intel-rapl/enabled": "1",
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "1000000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "700000",
    "sys/class/powercap/intel-rapl:0:1/name": "dram",
    "sys/class/powercap/intel-rapl:0:1/energy_uj": "50000",
    "sys/class/powercap/intel-rapl:0:1/max_energy_range_uj": "65712999613",
    "sys/class/powercap/intel-rapl:1/name": "psys",
    "sys/class/powercap/intel-rapl:1/energy_uj": "9000000",
}


def test_rapl_sums_packages_and_memory_and_nothing_twice(tmp_path: Path) -> None:
    write_files(tmp_path, INTEL)
    meter = energy.open_meter(str(tmp_path))
    assert meter is not None
    assert (meter.source, meter.scope) == ("RAPL", "processor dram and package")
    assert meter.read_j() == 0.0
    write_files(
        tmp_path,
        {
            "sys/class/powercap/intel-rapl:0/energy_uj": "3500000",
            "sys/class/powercap/intel-rapl:0:1/energy_uj": "150000",
        },
    )
    write_files(
        tmp_path,
        {
            "sys/class/powercap/intel-rapl:1/energy_uj": "99000000",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "9000000",
        },
    )
    assert meter.read_j() == pytest.approx(2.6)


def test_a_counter_that_wraps_around_is_corrected(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    write_files(
        tmp_path,
        {
            f"{zone}/name": "package-0",
            f"{zone}/energy_uj": "999000",
            f"{zone}/max_energy_range_uj": "999999",
        },
    )
    meter = energy.open_meter(str(tmp_path))
    assert meter is not None
    write_files(tmp_path, {f"{zone}/energy_uj": "4000"})
    assert meter.read_j() == pytest.approx(0.005)


def test_a_wrap_without_a_known_range_fails_the_reading(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    write_files(tmp_path, {f"{zone}/name": "package-0", f"{zone}/energy_uj": "999000"})
    meter = energy.open_meter(str(tmp_path))
    assert meter is not None
    write_files(tmp_path, {f"{zone}/energy_uj": "4000"})
    assert meter.read_j() is None


def test_counters_without_a_readable_number_are_no_meter(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    write_files(tmp_path, {f"{zone}/name": "package-0", f"{zone}/energy_uj": "secret"})
    assert energy.open_meter(str(tmp_path)) is None


def test_without_files_there_is_no_meter(tmp_path: Path) -> None:
    assert energy.open_meter(str(tmp_path)) is None


# A Jetson Orin under JetPack 5: one ina3221 with three rails.
ORIN = {
    "sys/class/hwmon/hwmon0/name": "soctherm_oc",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "900",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": "5000",
    "sys/class/hwmon/hwmon1/curr2_input": "300",
    "sys/class/hwmon/hwmon1/in3_label": "VDD_SOC",
    "sys/class/hwmon/hwmon1/in3_input": "5000",
    "sys/class/hwmon/hwmon1/curr3_input": "200",
}


def meters_watts(meter: energy.Meter, watts: float) -> bool:
    """Return whether 60 ms of metered energy fit this power.

    The bounds are the shortest and the longest time that can lie between the two readings.
    """
    outer_start = time.perf_counter()
    first = meter.read_j()
    inner_start = time.perf_counter()
    time.sleep(0.06)
    inner_end = time.perf_counter()
    last = meter.read_j()
    outer_end = time.perf_counter()
    assert first is not None
    assert last is not None
    return (
        watts * (inner_end - inner_start) * 0.9999
        <= last - first
        <= watts * (outer_end - outer_start) * 1.0001
    )


@pytest.mark.parametrize(
    ("files", "scope", "watts"),
    [
        (ORIN, "board, rail VDD_IN", 4.5),
        # An ina226 on a carrier board: the kernel computes the power, in microwatts.
        (
            {
                "sys/class/hwmon/hwmon2/name": "ina226",
                "sys/class/hwmon/hwmon2/in0_input": "3",
                "sys/class/hwmon/hwmon2/in1_input": "12020",
                "sys/class/hwmon/hwmon2/curr1_input": "250",
                "sys/class/hwmon/hwmon2/power1_input": "3000000",
            },
            "board, rail ina226 hwmon2 1",
            3.0,
        ),
        # A Jetson Nano under JetPack 4: NVIDIA's own iio driver, milliwatts.
        (
            {
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/name": "ina3221x",
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN",
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input": "2522",
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_1": "POM_5V_GPU",
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power1_input": "200",
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_2": "POM_5V_CPU",
                "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power2_input": "700",
            },
            "board, rail POM_5V_IN",
            2.522,
        ),
        # The mainline iio driver: a raw number and its scale.
        (
            {
                "sys/bus/iio/devices/iio:device3/name": "ina219",
                "sys/bus/iio/devices/iio:device3/in_power2_raw": "120",
                "sys/bus/iio/devices/iio:device3/in_power2_scale": "20.000000000",
            },
            "board, rail ina219 iio:device3 2",
            2.4,
        ),
    ],
)
def test_ina_sensors_are_integrated_over_time(
    tmp_path: Path, files: dict[str, str], scope: str, watts: float
) -> None:
    write_files(tmp_path, files)
    meter = energy.open_meter(str(tmp_path))
    assert meter is not None
    try:
        assert (meter.source, meter.scope) == ("INA sensor", scope)
        assert meters_watts(meter, watts)
    finally:
        meter.close()


def test_the_boards_sensor_is_preferred_to_the_processors_counters(tmp_path: Path) -> None:
    write_files(tmp_path, {**INTEL, **ORIN})
    meter = energy.open_meter(str(tmp_path))
    assert meter is not None
    assert meter.source == "INA sensor"
    meter.close()


def test_several_rails_without_a_total_are_not_added_up(tmp_path: Path) -> None:
    write_files(tmp_path, {name: text.replace("VDD_IN", "VDD_CORE") for name, text in ORIN.items()})
    assert energy.open_meter(str(tmp_path)) is None


def test_every_reading_fails_after_a_sensor_stopped(tmp_path: Path) -> None:
    write_files(tmp_path, ORIN)
    meter = energy.open_meter(str(tmp_path))
    assert meter is not None
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    assert meter.read_j() is None
    write_files(tmp_path, ORIN)
    assert meter.read_j() is None
    meter.close()


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        (
            "RAM 2448/7620MB (lfb 2x1MB) CPU [5%@729,3%@729] GR3D_FREQ 0% "
            "VDD_IN 4532mW/4400mW VDD_CPU_GPU_CV 503mW/500mW VDD_SOC 1467mW/1460mW",
            4.532,
        ),
        (
            "RAM 1050/3964MB (lfb 443x4MB) SWAP 0/1982MB CPU [10%@1479] EMC_FREQ 0% GR3D_FREQ 0% "
            "POM_5V_IN 2522/2480 POM_5V_GPU 40/40 POM_5V_CPU 646/600",
            2.522,
        ),
        ("RAM 1050/3964MB CPU [10%@1479]", None),
    ],
)
def test_tegrastats_lines_are_parsed(line: str, watts: float | None) -> None:
    assert energy.tegrastats_power_w(line) == watts


@pytest.mark.parametrize(
    ("line", "watts"), [("71.34", 71.34), ("71.34, 30.0", 71.34), ("[N/A]", None), ("", None)]
)
def test_nvidia_smi_lines_are_parsed(line: str, watts: float | None) -> None:
    assert energy.nvidia_smi_power_w(line) == watts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a shell script stands for the program")
def test_a_program_that_prints_power_is_a_meter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "tegrastats"
    script.write_text(
        "#!/bin/sh\nwhile true; do echo 'CPU [1%@729] VDD_IN 4000mW/4000mW'; sleep 0.01; done\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    meter = energy._tegrastats()
    assert meter is not None
    try:
        assert meters_watts(meter, 4.0)
    finally:
        meter.close()


def test_a_program_that_prints_no_power_is_no_meter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '[N/A]'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert energy._nvidia_smi() is None


def test_the_file_runs_on_its_own(tmp_path: Path) -> None:
    write_files(tmp_path / "device", ORIN)
    copy = tmp_path / "energy.py"
    copy.write_text(Path(str(energy.__file__)).read_text())
    done = subprocess.run(
        [sys.executable, "-I", str(copy), str(tmp_path / "device")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert re.fullmatch(r"INA sensor \(board, rail VDD_IN\): [45]\.\d\d W\n", done.stdout), (
        done.stdout
    )
    done = subprocess.run(
        [sys.executable, "-I", str(copy), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (
        1,
        "no energy meter on this device (RAPL may need root)\n",
    )
