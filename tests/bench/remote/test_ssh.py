"""Measurements over ssh, with an sshd on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_samples import chain, images_with_labels, kill_run
from loopback_ssh import Server, free_port, needs_sshd, ssh_server
from vitrim.bench.remote.device_link import LinkLost
from vitrim.bench.remote.measure import measure_on
from vitrim.bench.remote.ssh_link import SshAddress, SshLink
from vitrim.core.errors import InputError

QUICK: dict[str, Any] = {
    "time_limit_s": 0.5,
    "least_rounds": 3,
    "quiet": True,
    "poll_s": 0.1,
    "python": sys.executable,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ssh_server(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@needs_sshd
def test_two_artifacts_are_measured_on_the_device_and_no_file_remains(
    server: Server, tmp_path: Path
) -> None:
    small, large = (
        chain(tmp_path / "small.onnx", width=64),
        chain(tmp_path / "large.onnx", width=1500),
    )
    data = images_with_labels(tmp_path / "d.npz", small)
    device_folder = tmp_path / "device"
    found = measure_on(
        server.url,
        {"small": small, "large": large},
        ssh_options=server.options,
        folder=str(device_folder),
        dataset=data,
        target="rpi4",
        **QUICK,
    )
    assert found["small"].device == "ssh"
    assert found["small"].target == "rpi4"
    assert found["small"].session == found["large"].session
    assert found["large"].summary().p50_s > found["small"].summary().p50_s
    assert (found["small"].correct, found["small"].total) == (15, 20)
    assert found["small"].environment.libraries["onnxruntime"]
    assert list(device_folder.iterdir()) == []
    text = str(found["small"].to_dict())
    assert "127.0.0.1" not in text
    assert str(tmp_path) not in text


@needs_sshd
def test_a_run_survives_a_lost_link(server: Server, tmp_path: Path) -> None:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    model, device_folder = chain(tmp_path / "m.onnx"), tmp_path / "device"
    call: dict[str, Any] = {
        "ssh_options": server.options,
        "folder": str(device_folder),
        **QUICK,
        "time_limit_s": 4.0,
        "least_rounds": 1000,
    }

    def cut(share: float, text: str) -> None:
        # During the run the server closes every connection and accepts no new one for a while.
        if text.startswith("round"):
            server.process.send_signal(signal.SIGSTOP)
            for child in psutil.Process(server.process.pid).children(recursive=True):
                # The run is in a session of its own and is no child of the server.
                assert "conductor.py" not in " ".join(child.cmdline())
                child.kill()

    with pytest.raises(
        LinkLost, match="the run goes on there: give the same command again for its result"
    ):
        measure_on(
            server.url,
            {"m": model},
            progress=cut,
            patience_s=0.0,
            **{**call, "ssh_options": [*call["ssh_options"], "-o", "ConnectTimeout=1"]},
        )
    server.process.send_signal(signal.SIGCONT)
    (run,) = device_folder.iterdir()
    dropped_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = measure_on(server.url, {"m": model}, **call)["m"]
    # It is the same run, not a new one.
    assert found.started_at < dropped_at
    assert run.name.startswith("run-")
    assert found.summary().count >= 64
    assert list(device_folder.iterdir()) == []


@needs_sshd
def test_a_run_that_was_killed_is_reported(server: Server, tmp_path: Path) -> None:
    device_folder = tmp_path / "device"

    def kill(share: float, text: str) -> None:
        if text.startswith("round"):
            (run,) = device_folder.iterdir()
            kill_run(run)

    with pytest.raises(
        InputError, match=r"the run ended there without a result.*restarted, or the run was killed"
    ):
        measure_on(
            server.url,
            {"m": chain(tmp_path / "m.onnx")},
            ssh_options=server.options,
            folder=str(device_folder),
            progress=kill,
            **{**QUICK, "time_limit_s": 20.0, "least_rounds": 1000},
        )
    assert list(device_folder.iterdir()) == []


@needs_sshd
def test_a_failed_runner_is_reported_in_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"127\.0\.0\.1:\d+: m: broken\.onnx: onnxruntime .* cannot load it"
    ) as caught:
        measure_on(
            server.url,
            {"m": tmp_path / "broken.onnx"},
            ssh_options=server.options,
            folder=str(tmp_path / "device"),
            **QUICK,
        )
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "device").iterdir()) == []


def assert_refused(server: Server, tmp_path: Path, message: str, **changes: Any) -> None:
    call = {"ssh_options": server.options, "folder": str(tmp_path / "device"), **QUICK, **changes}
    url = call.pop("url", server.url)
    with pytest.raises(InputError, match=message) as caught:
        measure_on(url, {"m": chain(tmp_path / "m.onnx")}, patience_s=0.0, **call)
    assert "\n" not in str(caught.value)


@needs_sshd
def test_a_changed_host_key_is_reported(server: Server, tmp_path: Path) -> None:
    port, key = (
        server.url.rsplit(":", 1)[1],
        (server.folder / "unauthorized.pub").read_text().split(),
    )
    options = server.known(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    assert_refused(
        server,
        tmp_path,
        rf"its host key differs from the known one.*ssh-keygen -R '\[127\.0\.0\.1\]:{port}'",
        ssh_options=options,
    )


@needs_sshd
def test_an_unknown_host_key_is_reported(server: Server, tmp_path: Path) -> None:
    assert_refused(
        server,
        tmp_path,
        "its host key is not known yet; connect once by hand",
        ssh_options=server.known(""),
    )


@needs_sshd
def test_a_refused_login_is_reported(server: Server, tmp_path: Path) -> None:
    options = [
        option.replace(f"{server.folder}/user", f"{server.folder}/unauthorized")
        for option in server.options
    ]
    assert_refused(
        server, tmp_path, "the login was refused; put your public key there", ssh_options=options
    )


@needs_sshd
def test_a_missing_python_and_a_missing_runtime_are_reported(
    server: Server, tmp_path: Path
) -> None:
    assert_refused(
        server,
        tmp_path,
        "there is no python9; install Python 3.9 or newer",
        python="python9",
        runner="python",
    )
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    assert_refused(
        server, tmp_path, "has no onnxruntime and numpy; install them there", python=str(bare)
    )


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_sshd
def test_a_full_disk_is_reported(server: Server, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "256k") as small:
        message = r"its disk is full: \d+ bytes are free, \d+ are needed"
        assert_refused(server, tmp_path, message, folder=str(small))


@needs_sshd
def test_a_disk_that_fills_up_while_copying_or_running_is_reported(
    server: Server, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "small", "256k") as small:
        link = SshLink(SshAddress.parse(server.url), server.options)
        with pytest.raises(
            InputError, match="its disk is full; free some space there, then measure again"
        ):
            link.copy({"large": bytes(400_000)}, str(small / "there"))
        link.close()
    with small_disk(tmp_path / "large", "6m") as large:

        def fill(share: float, text: str) -> None:
            with contextlib.suppress(OSError), (large / "fill").open("ab", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))

        with pytest.raises(
            InputError, match="its disk is full; free some space there, then measure again"
        ):
            measure_on(
                server.url,
                {"m": chain(tmp_path / "m.onnx", width=16)},
                ssh_options=server.options,
                folder=str(large / "device"),
                progress=fill,
                **{**QUICK, "time_limit_s": 3.0, "least_rounds": 1000},
            )


@needs_sshd
def test_a_restarted_device_is_reported(server: Server, tmp_path: Path) -> None:
    device_folder = tmp_path / "device"
    other = subprocess.Popen(["sleep", "600"])

    def restart(share: float, text: str) -> None:
        # After a restart the run's process id may be that of another process.
        if text.startswith("round"):
            (run,) = device_folder.iterdir()
            kill_run(run)
            (run / "pid").write_text(f"{other.pid}\n")
            (run / "boot").write_text("another boot\n")

    with pytest.raises(
        InputError, match=r"the run ended there without a result.*the device was restarted"
    ):
        measure_on(
            server.url,
            {"m": chain(tmp_path / "m.onnx")},
            ssh_options=server.options,
            folder=str(device_folder),
            progress=restart,
            **{**QUICK, "time_limit_s": 20.0, "least_rounds": 1000},
        )
    assert list(device_folder.iterdir()) == []
    assert other.poll() is None
    other.kill()


@needs_sshd
def test_results_and_output_contain_no_address_and_no_secret(
    server: Server,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vitrim.cli import call

    monkeypatch.setenv("VITRIM_SECRET_OF_A_TEST", "a-password-in-the-environment")
    out = tmp_path / "out"
    words = [
        "bench",
        str(chain(tmp_path / "m.onnx")),
        "--on",
        server.url,
        "--python",
        sys.executable,
        "--time-limit",
        "0.5",
        "--out",
        str(out),
    ]
    for option in zip(server.options[::2], server.options[1::2], strict=True):
        words += ["--ssh-option", shlex.join(option)]
    assert call(words) == 0
    captured = capfd.readouterr()
    saved = (out / "m.json").read_text()
    for text in (saved, captured.out, captured.err):
        # The digits of a port also occur within measured times, as in 1.4581999e-05.
        assert not re.search(rf"(?<![\d.]){server.url.rsplit(':', 1)[1]}(?!\d)", text)
        for secret in (
            "127.0.0.1",
            "PRIVATE KEY",
            str(server.folder),
            socket.gethostname() + "@",
            "a-password-in",
        ):
            assert secret not in text
    assert str(tmp_path) not in saved


@needs_sshd
def test_an_address_without_a_server_is_reported(server: Server, tmp_path: Path) -> None:
    assert_refused(
        server,
        tmp_path,
        r"no connection \(.*refused\); is the device on",
        url=f"ssh://127.0.0.1:{free_port()}",
    )


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ssh://pi@raspberry", SshAddress("raspberry", "pi")),
        ("ssh://raspberry:2222/", SshAddress("raspberry", None, 2222)),
        ("ssh://pi@[fe80::1]:22", SshAddress("fe80::1", "pi", 22)),
    ],
)
def test_addresses_are_parsed(url: str, address: SshAddress) -> None:
    assert SshAddress.parse(url) == address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ssh://", "not an address; write ssh://user@host"),
        ("ssh://pi:secret@board", "a password does not belong in an address"),
        ("ssh://-oProxyCommand=x", "a name cannot begin with '-'"),
        ("ssh://board:99999", "port 99999 is outside"),
        ("ssh://board/path", "not an address"),
    ],
)
def test_an_invalid_address_is_refused_without_repeating_a_password(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SshAddress.parse(url)
    assert "secret" not in str(caught.value)


def test_an_unknown_kind_of_address_is_refused() -> None:
    with pytest.raises(InputError, match="not a known kind of address"):
        measure_on("smoke://signals", {})
