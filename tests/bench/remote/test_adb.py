"""Measurements over adb, with Android's adbd in Debian's build; no phone is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adb_device import adb_device
from bench_samples import chain, images_with_labels, kill_run
from loopback_ssh import free_port
from vitrim.bench.remote.adb_link import AdbAddress, AdbLink
from vitrim.bench.remote.device_link import LinkLost
from vitrim.bench.remote.measure import measure_on
from vitrim.core.errors import InputError

needs_adb = pytest.mark.skipif(
    shutil.which("adb") is None, reason="adb is not installed (Debian: apt-get install adb)"
)
QUICK: dict[str, Any] = {
    "time_limit_s": 0.5,
    "least_rounds": 3,
    "quiet": True,
    "poll_s": 0.1,
    "python": sys.executable,
}


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    with adb_device() as address:
        yield address


def test_two_artifacts_are_measured_on_the_device_and_no_file_remains(
    device: str, tmp_path: Path
) -> None:
    small, large = (
        chain(tmp_path / "small.onnx", width=64),
        chain(tmp_path / "large.onnx", width=1500),
    )
    data = images_with_labels(tmp_path / "d.npz", small)
    device_folder = tmp_path / "device"
    found = measure_on(
        device,
        {"small": small, "large": large},
        folder=str(device_folder),
        dataset=data,
        target="rpi4",
        **QUICK,
    )
    assert (found["small"].device, found["small"].target) == ("adb", "rpi4")
    assert found["small"].session == found["large"].session
    assert found["large"].summary().p50_s > found["small"].summary().p50_s
    assert (found["small"].correct, found["small"].total) == (15, 20)
    assert list(device_folder.iterdir()) == []
    text = str(found["small"].to_dict())
    assert "127.0.0.1" not in text
    assert str(tmp_path) not in text


def test_copied_files_arrive_unchanged_and_are_private(device: str, tmp_path: Path) -> None:
    link = AdbLink(AdbAddress.parse(device))
    content = bytes(range(256)) * 300
    (tmp_path / "f").write_bytes(content)
    device_folder = tmp_path / "with a space"
    link.copy({"deep/er/file": tmp_path / "f", "top": b"\r\n\0"}, str(device_folder))
    assert (device_folder / "deep/er/file").read_bytes() == content
    assert (device_folder / "top").read_bytes() == b"\r\n\0"
    assert device_folder.stat().st_mode & 0o077 == 0
    assert link.run("cat", send=content) == content


def test_a_run_that_was_killed_is_reported(device: str, tmp_path: Path) -> None:
    device_folder = tmp_path / "device"

    def kill(share: float, text: str) -> None:
        if text.startswith("round"):
            (run,) = device_folder.iterdir()
            kill_run(run)

    call = {**QUICK, "time_limit_s": 20.0, "least_rounds": 1000}
    with pytest.raises(
        InputError, match=r"the run ended there without a result.*restarted, or the run was killed"
    ):
        measure_on(
            device,
            {"m": chain(tmp_path / "m.onnx")},
            folder=str(device_folder),
            progress=kill,
            **call,
        )
    assert list(device_folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root only")
def test_a_disk_that_fills_up_is_reported(device: str, tmp_path: Path) -> None:
    small = tmp_path / "small-disk"
    small.mkdir()
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
        ).returncode
        != 0
    ):
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(
            InputError, match=r"its disk is full: \d+ bytes are free, \d+ are needed"
        ):
            measure_on(device, {"m": chain(tmp_path / "m.onnx")}, folder=str(small), **QUICK)
        # Where the reported free space was wrong, the push itself fails.
        with pytest.raises(InputError, match="its disk is full; free some space there"):
            AdbLink(AdbAddress.parse(device)).copy({"large": bytes(400_000)}, str(small / "there"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_failing_script_is_reported_in_one_line(device: str) -> None:
    link = AdbLink(AdbAddress.parse(device))
    with pytest.raises(InputError, match=r"^127\.0\.0\.1:\d+: the last words$"):
        link.run("echo first >&2; echo the last words >&2; exit 1")
    with pytest.raises(InputError, match="exit code 7"):
        link.run("exit 7")


def test_an_unknown_device_is_reported(device: str) -> None:
    # The fixture `device` runs the adb server.
    with pytest.raises(
        LinkLost, match="unknown: no such device is connected; `adb devices` lists those that are"
    ):
        AdbLink(AdbAddress.parse("adb://unknown")).run("true")
    with pytest.raises(LinkLost, match=r"no connection \(.*refused\); is the device on"):
        AdbLink(AdbAddress.parse(f"adb://127.0.0.1:{free_port()}"))


def test_a_disconnected_device_is_reported(tmp_path: Path) -> None:
    with adb_device() as address:
        link = AdbLink(AdbAddress.parse(address))
        assert link.run("echo here") == b"here\n"
        subprocess.run(
            ["adb", "disconnect", address.removeprefix("adb://")], capture_output=True, check=True
        )
        with pytest.raises(LinkLost, match="no such device is connected"):
            link.run("true")


def test_a_missing_adb_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="adb is not installed here; install it"):
        AdbLink(AdbAddress.parse("adb://x")).run("true")


@pytest.mark.parametrize(
    ("stderr", "kind", "message"),
    [
        (
            "error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n",
            InputError,
            "not allowed yet; unlock the device",
        ),
        ("adb: device offline", LinkLost, "there but does not respond"),
        ("error: closed", LinkLost, "there but does not respond"),
        (
            "error: no permissions (missing udev rules?); see [http]",
            InputError,
            "may not use the USB device",
        ),
        (
            "adb: error: failed to copy 'a' to '/b': remote couldn't create file: "
            "No space left on device",
            InputError,
            "its disk is full",
        ),
        (
            "* failed to start daemon\nadb: cannot connect to daemon",
            InputError,
            "adb's own server does not start here",
        ),
    ],
)
def test_the_messages_of_adb_become_one_line(
    stderr: str, kind: type[InputError], message: str
) -> None:
    # The messages are copied from adb's sources, since these states need a phone.
    found = AdbLink(AdbAddress.parse("adb://R58M"))._error(1, stderr)
    assert type(found) is kind
    assert message in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("url", "serial", "in_network"),
    [
        ("adb://R58M12", "R58M12", False),
        ("adb://emulator-5554/", "emulator-5554", False),
        ("adb://10.0.0.5:5555", "10.0.0.5:5555", True),
        ("adb://[fe80::1]:5555", "[fe80::1]:5555", True),
    ],
)
def test_addresses_are_parsed(url: str, serial: str, in_network: bool) -> None:
    address = AdbAddress.parse(url)
    assert (address.serial, address.in_network) == (serial, in_network)


@pytest.mark.parametrize(
    "url", ["adb://", "adb://-s", "adb://a b", "adb://user@phone", "adb://a/b"]
)
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="not an address; write adb://SERIAL"):
        AdbAddress.parse(url)
