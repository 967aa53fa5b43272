"""The C++ runner has the protocol and the figures of runner.py: here, over a link, under qemu."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adb_device import adb_device
from bench_samples import chain, images_with_labels
from loopback_ssh import Server, needs_sshd, ssh_server
from onnx_graphs import channels_last, classifier, value, written
from onnxruntime_header import header_folder
from selecting_models import divided, noise_images, sharp_selection
from tiny_models import tiny_vit
from vitrim import export
from vitrim.bench.remote import native_build
from vitrim.bench.remote.device_link import LinkLost
from vitrim.bench.remote.measure import measure_on
from vitrim.bench.remote.native_build import NativeRunner, native_runner
from vitrim.bench.remote.native_run import dataset_files
from vitrim.compress.lift import lift
from vitrim.compress.network.named_outputs import output_specs
from vitrim.core.errors import InputError
from vitrim.export.forms import FORMS, write_network
from vitrim.targets.emulation import ready

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler is installed (Debian: apt-get install g++)"
)
PYTHON_RUNNER = Path(native_build.__file__).parents[1] / "local" / "runner.py"
# The programs that the shell scripts of a remote run call; Python is not among them.
TOOLS = (
    *("sh", "bash", "cat", "chmod", "df", "env", "kill", "mkdir"),
    *("rm", "sleep", "tail", "tar", "uname", "nohup", "setsid"),
)
QUICK: dict[str, Any] = {"time_limit_s": 0.5, "least_rounds": 3, "quiet": True, "poll_s": 0.1}


@pytest.fixture(scope="module")
def runner() -> NativeRunner:
    return native_runner()


def events_of(
    command: list[str], job: dict[str, Any], *commands: dict[str, Any]
) -> list[dict[str, Any]]:
    lines = "".join(json.dumps(line) + "\n" for line in (job, *commands))
    done = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=300)
    events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (3 if events[-1]["event"] == "error" else 0), done.stderr
    return events


def run_native(
    runner: NativeRunner, job: dict[str, Any], *commands: dict[str, Any]
) -> list[dict[str, Any]]:
    return events_of(runner.command(), job, *commands)


def test_it_follows_the_protocol_of_the_python_runner(runner: NativeRunner, tmp_path: Path) -> None:
    model = chain(tmp_path / "m.onnx")
    data = images_with_labels(tmp_path / "d.npz", model)
    (tmp_path / "d").mkdir()
    for name, content in dataset_files(data, None).items():
        (tmp_path / "d" / Path(name).name).write_bytes(content)  # type: ignore[arg-type]
    job = {"model": str(model), "threads": 1, "session": {"session.set_denormal_as_zero": "1"}}
    commands: list[dict[str, Any]] = [
        {"do": "warm", "limit_s": 1.0},
        {"do": "run", "count": 7, "settle": 1},
        {"do": "memory"},
    ]
    commands += [
        {"do": "score", "dataset": str(tmp_path / "d"), "limit": None},
        {"do": "profile", "count": 4},
        {"do": "stop"},
    ]
    native_events = run_native(runner, job, *commands)
    python_events = events_of([sys.executable, str(PYTHON_RUNNER), "-"], job, *commands)
    assert (
        [event["event"] for event in native_events]
        == [event["event"] for event in python_events]
        == ["ready", "warm", "samples", "memory", "score", "profile"]
    )
    for native, python in zip(native_events, python_events, strict=True):
        # Only the engines in Python report their allocator and a GPU.
        assert set(python) - set(native) <= {
            "arena_bytes",
            "copies_timed",
            "device_memory_peak_bytes",
        }
    for key in (
        "runtime",
        "runtime_version",
        "provider",
        "provider_nodes",
        "input_shape",
        "input_type",
        "peak_rss_exact",
    ):
        assert native_events[0][key] == python_events[0][key]
    assert len(native_events[2]["latency_s"]) == 7
    assert native_events[2]["cpu_s"] > 0
    assert native_events[3]["peak_rss_bytes"] > native_events[0]["floor_rss_bytes"] > 0
    assert (
        (native_events[4]["correct"], native_events[4]["total"])
        == (python_events[4]["correct"], python_events[4]["total"])
        == (15, 20)
    )
    assert {
        (row["node"], row["operator"], row["calls"], str(row["output_shapes"]))
        for row in native_events[5]["rows"]
    } == {
        (row["node"], row["operator"], row["calls"], str(row["output_shapes"]))
        for row in python_events[5]["rows"]
    }


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_images_are_arranged_for_channels_last_as_in_python(
    runner: NativeRunner, tmp_path: Path, kind: type[np.generic]
) -> None:
    model = written(channels_last(classifier(entry=value("x", 4, 3, 16, 16))), tmp_path)
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (10, 3, 16, 16)).astype(kind), rng.integers(0, 4, 10)
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    (tmp_path / "d").mkdir()
    for name, content in dataset_files(tmp_path / "d.npz", None).items():
        (tmp_path / "d" / Path(name).name).write_bytes(content)  # type: ignore[arg-type]
    spec = {"mean": [0.2, 0.4, 0.6], "std": [0.2, 0.1, 0.3]}
    command = {"do": "score", "dataset": str(tmp_path / "d")}
    for layout in ({}, {"layout": "NHWC"}):
        job = {"model": str(model), "preprocessing": spec, "input": {"name": "x", **layout}}
        native = run_native(runner, job, command)[-1]
        assert native == events_of([sys.executable, str(PYTHON_RUNNER), "-"], job, command)[-1]
        assert 0 < native["correct"] < 10


@pytest.mark.parametrize("limit", [None, 6])
def test_uint8_images_are_normalised_as_in_python(
    runner: NativeRunner, tmp_path: Path, limit: int | None
) -> None:
    model = chain(tmp_path / "m.onnx", batch=4)
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (10, 28, 28), dtype=np.uint8), rng.integers(0, 10, 10)
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    (tmp_path / "d").mkdir()
    for name, content in dataset_files(tmp_path / "d.npz", None).items():
        (tmp_path / "d" / Path(name).name).write_bytes(content)  # type: ignore[arg-type]
    job = {"model": str(model), "preprocessing": {"mean": [0.3], "std": [0.2]}}
    command = {"do": "score", "dataset": str(tmp_path / "d"), "limit": limit}
    command = command if limit else {"do": "score", "dataset": str(tmp_path / "d")}
    native_events, python_events = (
        run_native(runner, job, command)[-1],
        events_of([sys.executable, str(PYTHON_RUNNER), "-"], job, command)[-1],
    )
    assert native_events == python_events
    assert native_events["total"] == (limit or 10)


def test_buckets_are_forced_and_counted_as_in_python(runner: NativeRunner, tmp_path: Path) -> None:
    images = noise_images(12)
    model = divided(sharp_selection(), (3, 6, 11), images)
    path = export(model, tmp_path / "a").model_path
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "images.npy", images.numpy())
    np.save(tmp_path / "d" / "labels.npy", np.arange(12) % 3)
    command = {"do": "score", "dataset": str(tmp_path / "d")}
    python = [sys.executable, str(PYTHON_RUNNER), "-"]
    correct = []
    for inputs in ({"bucket": 3}, {"bucket": 11}, {}):
        job = {"model": str(path), "inputs": inputs}
        native = run_native(runner, job, command)[-1]
        assert native == events_of(python, job, command)[-1]
        correct.append(native["correct"])
    counted = {"model": str(path), "inputs": {"bucket": 3}, "buckets": [3, 6, 11]}
    native = run_native(runner, counted, command)[-1]
    assert native == events_of(python, counted, command)[-1]
    # Images get their own bucket, whichever is timed.
    assert native["correct"] == correct[-1]
    assert sum(total for _, _, total in native["buckets"]) == 12
    assert sum(total > 0 for _, _, total in native["buckets"]) > 1


@pytest.mark.parametrize(
    ("job", "commands", "message"),
    [
        ({"model": "missing.onnx"}, [], "missing.onnx: no such file"),
        ({"model": "BROKEN"}, [], "onnxruntime .* cannot load it"),
        ({"model": "MODEL", "batch": 3}, [], "has the fixed batch 1, and batch 3 was requested"),
        (
            {"model": "MODEL", "output": "nothing"},
            [],
            "the model has no output 'nothing'; it has logits",
        ),
        (
            {"model": "MODEL", "providers": ["CUDAExecutionProvider"]},
            [],
            "measures CPUExecutionProvider only, not CUDA",
        ),
        (
            {"model": "MODEL", "runtime": "tvm"},
            [],
            "the native runner measures onnxruntime models, not tvm",
        ),
        ({"model": "MODEL", "pinning": [999]}, [], "cannot pin to the CPUs .999."),
        ({"model": "MODEL"}, [{"do": "dance"}], "unknown command 'dance'"),
        (
            {"model": "MODEL"},
            [{"do": "score", "dataset": "nowhere"}],
            "images.npy: is not an .npy file",
        ),
        ({"nothing": 1}, [], "the job is no JSON object with a model"),
        (
            {"model": "MODEL", "cpu": {"target": "mars", "needs": ["sse9"], "assumes": []}},
            [],
            "m.onnx: the model's code for mars uses sse9, which this processor does not have",
        ),
        (
            {"model": "MODEL", "cpu": {"target": "mars", "needs": [], "assumes": ["a|b"]}},
            [],
            "eight-bit weights for mars assume a.b, which this processor does not have",
        ),
    ],
)
def test_an_invalid_job_is_reported_in_one_line(
    runner: NativeRunner,
    tmp_path: Path,
    job: dict[str, Any],
    commands: list[dict[str, Any]],
    message: str,
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"x")
    names = {"MODEL": str(chain(tmp_path / "m.onnx")), "BROKEN": str(tmp_path / "broken.onnx")}
    event = run_native(
        runner,
        {**job, **({"model": names.get(job["model"], job["model"])} if "model" in job else {})},
        *commands,
    )[-1]
    assert event["event"] == "error"
    assert re.search(message, event["message"])
    assert "\n" not in event["message"]


def test_invalid_json_is_reported_in_one_line(runner: NativeRunner) -> None:
    for text in ("nonsense", '{"model": ', "[" * 100, '{"model": "a\\q"}'):
        done = subprocess.run([*runner.command()[:2], text], capture_output=True, timeout=60)
        assert done.returncode == 3
        assert json.loads(done.stdout)["event"] == "error"


def test_a_broken_library_is_reported_in_one_line(runner: NativeRunner, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no library")
    event = events_of(
        runner.command(library=str(tmp_path / "lib.so")), {"model": str(chain(tmp_path / "m.onnx"))}
    )[-1]
    assert "the runtime is missing here" in event["message"]


def test_the_positions_in_the_runtimes_table_are_those_of_the_header(tmp_path: Path) -> None:
    folder = header_folder()
    if folder is None:
        pytest.skip("onnxruntime_c_api.h is not available here")
    listed = (native_build.SOURCES / "ort_api.h").read_text()
    positions = dict(re.findall(r"^    ([A-Z]\w+) = (\d+),$", listed, re.M))
    assert len(positions) > 30
    checks = "\n".join(
        f'static_assert(offsetof(OrtApi, {name}) == {position} * sizeof(void *), "{name}");'
        for name, position in positions.items()
    )
    numbers = (
        "static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == 1 && "
        "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 == 2 && ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10 "
        "&& ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE == 11 && ORT_LOGGING_LEVEL_ERROR == 3 && "
        'OrtArenaAllocator == 1 && OrtMemTypeDefault == 0, "");'
    )
    (tmp_path / "check.cpp").write_text(
        f"#include <cstddef>\n#include <onnxruntime_c_api.h>\n{checks}\n{numbers}\n"
    )
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", f"-I{folder}", str(tmp_path / "check.cpp")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_cmake_builds_it_without_a_warning(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    subprocess.run(
        ["cmake", "-S", native_build.SOURCES, "-B", tmp_path], check=True, capture_output=True
    )
    done = subprocess.run(["cmake", "--build", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def bare_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run an sshd whose commands find no Python."""
    folder = tmp_path_factory.mktemp("bare")
    tools = folder / "tools"
    tools.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    with ssh_server(folder, path=str(tools)) as running:
        yield running


@needs_sshd
def test_a_device_without_python_is_measured_over_ssh(bare_server: Server, tmp_path: Path) -> None:
    small, large = (
        chain(tmp_path / "small.onnx", width=64),
        chain(tmp_path / "large.onnx", width=1500),
    )
    data = images_with_labels(tmp_path / "d.npz", small)
    device_folder = tmp_path / "device"
    call: dict[str, Any] = {
        "ssh_options": bare_server.options,
        "folder": str(device_folder),
        **QUICK,
    }
    with pytest.raises(
        InputError, match=r"there is no python3; install Python 3\.9 or newer there"
    ):
        measure_on(bare_server.url, {"small": small}, runner="python", **call)
    found = measure_on(
        bare_server.url, {"small": small, "large": large}, dataset=data, dataset_limit=19, **call
    )
    assert found["small"].device == "ssh"
    assert found["small"].session == found["large"].session
    assert found["large"].summary().p50_s > found["small"].summary().p50_s
    assert (found["small"].correct, found["small"].total) == (14, 19)
    where = found["small"].environment
    assert where.python is None
    assert where.cores == os.cpu_count()
    assert where.architecture == platform.machine()
    assert where.cpu_model
    assert where.memory_total_bytes
    assert where.busy_cores_before is not None
    assert list(device_folder.iterdir()) == []
    text = str(found["small"].to_dict())
    assert "127.0.0.1" not in text
    assert str(tmp_path) not in text


@needs_sshd
def test_a_failing_native_runner_is_reported_in_one_line(
    bare_server: Server, tmp_path: Path
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"x")
    call: dict[str, Any] = {
        "ssh_options": bare_server.options,
        "folder": str(tmp_path / "device"),
        **QUICK,
    }
    with pytest.raises(
        InputError, match=r"^127\.0\.0\.1:\d+: m: broken\.onnx: onnxruntime .* cannot load it"
    ):
        measure_on(bare_server.url, {"m": tmp_path / "broken.onnx"}, **call)
    with pytest.raises(
        InputError, match="measures CPUExecutionProvider only, not CUDAExecutionProvider"
    ):
        measure_on(
            bare_server.url,
            {"m": chain(tmp_path / "m.onnx")},
            providers=["CUDAExecutionProvider"],
            **call,
        )
    with pytest.raises(InputError, match=r"--runner-file .*: no such file"):
        measure_on(
            bare_server.url,
            {"m": chain(tmp_path / "m.onnx")},
            runner_file=tmp_path / "none",
            **call,
        )
    assert list((tmp_path / "device").iterdir()) == []


@needs_sshd
def test_without_python_the_run_ends_with_the_link(tmp_path: Path) -> None:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    def cut(share: float, text: str) -> None:
        if text.startswith("round"):
            connections = psutil.Process(running.process.pid).children(recursive=True)
            running.process.kill()
            running.process.wait(timeout=10)
            for connection in connections:
                connection.kill()

    with ssh_server(tmp_path) as running:
        call: dict[str, Any] = {
            "ssh_options": running.options,
            "runner": "native",
            **QUICK,
            "time_limit_s": 20.0,
            "least_rounds": 1000,
        }
        with pytest.raises(
            LinkLost, match="without Python there the run ended with the link: measure again"
        ):
            measure_on(
                running.url,
                {"m": chain(tmp_path / "m.onnx")},
                folder=str(tmp_path / "device"),
                progress=cut,
                **call,
            )


def test_the_native_runner_runs_over_adb(tmp_path: Path) -> None:
    with adb_device() as address:
        found = measure_on(
            address,
            {"m": chain(tmp_path / "m.onnx")},
            folder=str(tmp_path / "device"),
            runner="native",
            **QUICK,
        )
    assert found["m"].device == "adb"
    assert found["m"].environment.python is None
    assert list((tmp_path / "device").iterdir()) == []


def test_an_aarch64_runner_runs_under_qemu(tmp_path: Path) -> None:
    emulator = ready()
    if emulator is None:
        pytest.skip("aarch64 emulation is not prepared (vitrim targets emulate)")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip(
            "no aarch64 compiler is installed (Debian: apt-get install g++-aarch64-linux-gnu)"
        )
    built = native_runner("aarch64", library=emulator.onnxruntime_library)
    model = chain(tmp_path / "m.onnx", width=32)
    data = images_with_labels(tmp_path / "d.npz", model)
    (tmp_path / "d").mkdir()
    for name, content in dataset_files(data, None).items():
        (tmp_path / "d" / Path(name).name).write_bytes(content)  # type: ignore[arg-type]
    events = events_of(
        emulator.command(built.command()),
        {"model": str(model)},
        {"do": "run", "count": 2},
        {"do": "score", "dataset": str(tmp_path / "d")},
    )
    assert [event["event"] for event in events] == ["ready", "samples", "score"]
    assert events[-1]["correct"] == 15


def test_a_missing_compiler_and_an_android_device_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(native_build, "ZIG", {})
    with pytest.raises(
        InputError,
        match=r"no C\+\+ compiler for aarch64 here .*apt-get install g\+\+-aarch64-linux-gnu",
    ):
        native_runner("aarch64")
    with pytest.raises(InputError, match="build bench/native with the NDK"):
        native_runner("aarch64", android=True)


def test_it_runs_every_output_and_scores_the_first(runner: NativeRunner, tmp_path: Path) -> None:
    model = lift(tiny_vit(in_chans=3))
    names = ("logits", "patches", "blocks.0")
    outputs = output_specs(model.architecture, names)
    path = tmp_path / "m.onnx"
    path.write_bytes(write_network(model, FORMS[0], outputs=outputs).SerializeToString())
    entries = [{"name": output.name, "shape": [1, *output.shape]} for output in outputs]
    job = {"model": str(path), "threads": 1, "outputs": entries}
    commands: list[dict[str, Any]] = [{"do": "run", "count": 3, "settle": 1}]
    ready, samples = run_native(runner, job, *commands, {"do": "stop"})
    assert ready["input_shape"] == [1, 3, 16, 16]
    assert len(samples["latency_s"]) == 3
    wrong = {**job, "outputs": [*entries, {"name": "tokens", "shape": [1, 17, 32]}]}
    (error,) = run_native(runner, wrong, {"do": "stop"})
    assert error["message"] == (
        "the model has no output 'tokens'; it has logits, patches, blocks.0"
    )
