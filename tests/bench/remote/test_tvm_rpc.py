"""Measurements over TVM RPC, with a tracker and two boards on the loopback interface."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench_samples import chain
from loopback_ssh import free_port
from vitrim.bench.local.options import MeasureOptions
from vitrim.bench.remote.measure import measure_at
from vitrim.bench.remote.tvm_rpc import TrackerAddress, split_artifacts
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact, entry_for
from vitrim.export.manifest import Manifest, TensorSpec

pytest.importorskip("tvm", reason="needs TVM (pip install 'vitrim[tvm]')")
QUICK = MeasureOptions(time_limit_s=0.5, least_rounds=3)


def compiled(folder: Path, factor: float) -> Path:
    """Compile an artifact (1, 1, 2, 5) -> (1, 10) that multiplies each pixel by `factor`."""
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    images = relax.Var("images", relax.TensorType((1, 1, 2, 5), "float32"))
    with builder.function("main", [images]):
        with builder.dataflow():
            scaled = builder.emit(relax.op.multiply(images, relax.const(np.float32(factor))))
            logits = builder.emit_output(relax.op.reshape(scaled, (1, 10)))
        builder.emit_func_output(logits)
    folder.mkdir()
    tvm.compile(builder.get(), target=tvm.target.Target({"kind": "llvm"})).export_library(
        str(folder / "model.so")
    )
    manifest = Manifest(
        name=folder.name,
        inputs=(TensorSpec(name="images", shape=(1, 1, 2, 5), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(1, 10), layout="NC"),),
        target="x86-64",
        runtime="tvm",
        precision="fp32",
        form="plain",
        session={"device": "cpu"},
        files=(entry_for(folder, "model.so", "model"),),
    )
    return Artifact.write(folder, manifest).folder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compiled")
    return {
        "plus": compiled(folder / "plus", 2.0),
        "minus": compiled(folder / "minus", -2.0),
        "nil": compiled(folder / "nil", 0.0),
    }


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a tracker with two boards under the key `loop`."""
    port = free_port()
    work = tmp_path_factory.mktemp("farm")
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}

    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *words, "--host", "127.0.0.1", "--port-end", "65535"]
        return subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    farm = [start("tvm.exec.rpc_tracker", "--port", str(port))]
    try:
        wait_for(port)
        for _ in range(2):
            farm.append(
                start(
                    "tvm.exec.rpc_server",
                    "--port",
                    str(free_port()),
                    "--tracker",
                    f"127.0.0.1:{port}",
                    "--key",
                    "loop",
                )
            )
        wait_for_boards(port, 2)
        yield f"tvm-rpc://127.0.0.1:{port}"
    finally:
        for process in reversed(farm):
            # Its subprocesses are in the same process group.
            os.killpg(process.pid, 9)
            process.wait(timeout=10)


def wait_for(port: int) -> None:
    for _ in range(2400):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("the tracker did not start")


def wait_for_boards(port: int, count: int) -> None:
    from tvm import rpc

    found = rpc.connect_tracker("127.0.0.1", port)
    for _ in range(2400):
        if found.summary()["queue_info"].get("loop", {}).get("free", 0) >= count:
            found.close()
            return
        time.sleep(0.1)
    pytest.fail("the boards did not register")


def test_two_boards_measure_three_artifacts(
    tracker: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).standard_normal((8, 1, 2, 5), dtype=np.float32)
    np.savez(tmp_path / "d.npz", images=images, labels=images.reshape(8, 10).argmax(axis=1))
    options = MeasureOptions(
        time_limit_s=0.5, least_rounds=3, dataset=tmp_path / "d.npz", profile_runs=2
    )
    found = measure_at(f"{tracker}/loop", artifacts, options, target="rpi4", quiet=True)
    assert list(found) == ["plus", "minus", "nil"]
    # The outputs are the board's own: doubled images keep their largest pixel, and a factor of -2
    # makes it the smallest.
    assert (found["plus"].correct, found["minus"].correct) == (8, 0)
    for measured in found.values():
        assert (measured.device, measured.target, measured.runtime) == (
            "tvm-rpc loop",
            "rpi4",
            "tvm",
        )
        assert measured.peak_rss_bytes is None
        assert measured.cpu_share is None
        assert any(
            "reports nothing about the board's state" in warning for warning in measured.warnings
        )
        assert any("no profile of its operators" in warning for warning in measured.warnings)
        assert "127.0.0.1" not in str(measured.to_dict())
    # One board measured the first and the second artifact, the other the first and the third.
    assert found["plus"].session == found["minus"].session != found["nil"].session


def test_an_unknown_board_is_reported(tracker: str, artifacts: dict[str, Path]) -> None:
    message = (
        r"no board registered as 'unknown' \(it has loop\); "
        r"start one there: python -m tvm\.exec\.rpc_server"
    )
    with pytest.raises(InputError, match=message):
        measure_at(f"{tracker}/unknown", artifacts, QUICK, quiet=True)


def test_a_broken_library_is_reported_in_one_line(
    tracker: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.so").write_bytes(b"no library")
    manifest = Artifact.load(artifacts["plus"]).manifest
    Artifact.write(
        folder, manifest.model_copy(update={"files": (entry_for(folder, "model.so", "model"),)})
    )
    with pytest.raises(InputError, match="broken: the board cannot load it") as caught:
        measure_at(f"{tracker}/loop", {"broken": folder}, QUICK, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_missing_tracker_is_reported(artifacts: dict[str, Path]) -> None:
    with pytest.raises(
        InputError,
        match=r"no TVM tracker responds there \(.*refused\); "
        r"start one: python -m tvm\.exec\.rpc_tracker",
    ):
        measure_at(f"tvm-rpc://127.0.0.1:{free_port()}/x", artifacts, QUICK, quiet=True)


def test_another_runtimes_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="m: is made for onnxruntime, and TVM's boards run TVM artifacts; "
        "export it with --runtime tvm",
    ):
        measure_at("tvm-rpc://nowhere/x", {"m": chain(tmp_path / "m.onnx")}, QUICK, quiet=True)


def test_artifacts_are_split_with_the_first_one_on_every_board() -> None:
    assert split_artifacts(["a"], 4) == [["a"]]
    assert split_artifacts(["a", "b", "c", "d"], 2) == [["a", "b", "d"], ["a", "c"]]
    assert split_artifacts(["a", "b"], 8) == [["a", "b"]]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("tvm-rpc://tracker:9190/rpi4", TrackerAddress("tracker", 9190, "rpi4")),
        ("tvm-rpc://10.0.0.1/a-b", TrackerAddress("10.0.0.1", 9190, "a-b")),
        ("tvm-rpc://[::1]:7/x", TrackerAddress("::1", 7, "x")),
    ],
)
def test_addresses_are_parsed(url: str, address: TrackerAddress) -> None:
    assert TrackerAddress.parse(url) == address


@pytest.mark.parametrize(
    "url", ["tvm-rpc://", "tvm-rpc://tracker:9190", "tvm-rpc://t:99999/k", "tvm-rpc://u:p@t/k"]
)
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="write tvm-rpc://tracker:port/key"):
        TrackerAddress.parse(url)
