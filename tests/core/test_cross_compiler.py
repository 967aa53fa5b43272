"""zig without any other compiler: it links compiled networks and builds the bundle's programs."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import vitrim
from aarch64 import emulator
from bench_samples import chain
from bundle_sample import artifact_in as runtime_artifact_in
from bundle_sample import build as build_with_runtime
from bundle_sample import logits_in
from onnxruntime_header import header_folder
from PIL import Image
from tiny_models import tiny_vit
from tvm_sample import (
    LABELS,
    PREPROCESSING,
    artifact_in,
    compiled,
    expected,
    images,
    job_of,
    source,
)
from vitrim.bench.remote import native_build
from vitrim.bench.remote.native_build import native_runner
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.core.cross_compiler import OLDEST_GLIBC
from vitrim.export.bundle import bundle
from vitrim.export.runtimes import runtime_named, tvm_runtime
from vitrim.export.sessions import open_session
from vitrim.export.tvm_kernels import link as tvm_link
from vitrim.export.tvm_kernels.execution_plan import NoExecutionPlan
from vitrim.runtimes.subprocess_inference import infer_in_subprocess

TOOLS = ("cmake", "make")
ZIG = ("-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake",)


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only zig, cmake and make can be found."""
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    pytest.importorskip("ziglang", reason="zig is not installed: pip install 'vitrim[zig]'")
    if not sys.platform.startswith("linux") or platform.machine().lower() not in (
        "x86_64",
        "amd64",
    ):
        pytest.skip("these tests are written for x86-64 Linux")
    folder = tmp_path_factory.mktemp("path")
    for name in TOOLS:
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    (folder / "python-zig").symlink_to(Path(sys.executable).with_name("python-zig"))
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    assert [
        name for name in ("g++", "clang++", "c++", "aarch64-linux-gnu-g++") if shutil.which(name)
    ] == []


def needs_cmake() -> None:
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install {' '.join(missing)}")


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def run(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_code_for_arm_computes_torchs_outputs_and_needs_no_newer_c_library(
    tmp_path: Path,
) -> None:
    emulator("apache-tvm-ffi")
    written = compiled(tmp_path / "a", "rpi4")
    assert written.session["entry"] == "program"
    assert any("linked by zig c++ " in note for note in written.notes)
    given = images(2)
    logits, _ = infer_in_subprocess(job_of(tmp_path / "a", written), given, command=written.command)
    close(logits, expected(given))
    required = re.findall(rb"GLIBC_([0-9.]+)\0", (tmp_path / "a" / "model.so").read_bytes())
    assert required
    assert max(version(found.decode()) for found in required) <= version(OLDEST_GLIBC)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_code_for_this_machine_computes_torchs_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = images(2)
    for entry in ("program", "machine"):
        written = compiled(tmp_path / entry)
        assert written.session["entry"] == entry
        assert any("linked by zig c++ " in note for note in written.notes)
        logits, _ = infer_in_subprocess(job_of(tmp_path / entry, written), given)
        close(logits, expected(given))

        def no_plan(network: object) -> None:
            raise NoExecutionPlan("it calls vm.builtin.shape_of")

        monkeypatch.setattr(tvm_runtime, "execution_plan", no_plan)


def test_zigs_cache_never_returns_the_object_of_other_weights(tmp_path: Path) -> None:
    # zig looks objects up by the source's text, and does not notice other weights, which the
    # source's assembly includes.
    given = images(4)
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = tiny_vit()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
            wanted = model(torch.from_numpy(given)).numpy()
        shutil.rmtree(tmp_path / "same", ignore_errors=True)
        (tmp_path / "same").mkdir()
        written = runtime_named("tvm").write(
            replace(source("host"), model=model, compact=vitrim.lift(model)), tmp_path / "same"
        )
        logits, _ = infer_in_subprocess(job_of(tmp_path / "same", written), given)
        close(logits, wanted)


def test_triples_are_translated_to_zigs_targets() -> None:
    for triple, target in (
        ("aarch64-linux-gnu", "aarch64-linux-gnu.2.27"),
        ("amd64-unknown-linux-gnu", "x86_64-linux-gnu.2.27"),
        ("arm-linux-gnueabihf", "arm-linux-gnueabihf.2.27"),
    ):
        assert f"--target={target}" in tvm_link.linker_for(triple).command


def test_the_bundle_with_the_model_in_it_needs_no_shared_library(tmp_path: Path) -> None:
    needs_cmake()
    machine = emulator()
    folder = bundle(artifact_in(tmp_path / "artifact", "rpi4"), tmp_path / "bundle")
    for command in (
        ["cmake", "-S", ".", "-B", "arm", "-DCMAKE_CXX_FLAGS=-Werror", "-DVITRIM_STATIC=ON", *ZIG],
        ["cmake", "--build", "arm"],
    ):
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=600, cwd=folder, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (31, 53, 3), dtype=np.uint8)
    )
    picture.save(tmp_path / "picture.ppm")
    wanted = expected(Preprocessing.model_validate(PREPROCESSING).apply(picture)[None])[0]
    lines = run(
        machine.qemu,
        "-cpu",
        "cortex-a72",
        folder / "arm" / "vitrim_example",
        tmp_path / "picture.ppm",
        "--logits",
    ).splitlines()
    close(logits_in(lines), wanted)
    assert lines[0].endswith(LABELS[int(wanted.argmax())])


def test_the_bundle_with_the_runtimes_library_builds_and_runs(tmp_path: Path) -> None:
    needs_cmake()
    arm = emulator("onnxruntime").like(["Cortex-A72"])
    header = header_folder()
    if header is None:
        pytest.skip(
            "onnxruntime_c_api.h is not here and could not be fetched: "
            "set ONNXRUNTIME_INCLUDE to its folder"
        )
    artifact = runtime_artifact_in(tmp_path / "artifact")
    program = build_with_runtime(folder := bundle(artifact, tmp_path / "bundle"), header, *ZIG)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31), dtype=np.uint8))
    picture.save(tmp_path / "picture.pgm", format="PPM")
    assert arm.onnxruntime_library is not None
    command = arm.command(
        [program, arm.onnxruntime_library, folder / "model", tmp_path / "picture.pgm", "--logits"]
    )
    lines = run(*command).splitlines()
    assert artifact.manifest.preprocessing is not None
    preprocessing = Preprocessing.model_validate(artifact.manifest.preprocessing.model_dump())
    wanted = open_session(artifact).run(None, {"images": preprocessing.apply(picture)[None]})[0][0]
    close(logits_in(lines), wanted)


def test_the_runner_for_a_device_without_python_builds_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = emulator("onnxruntime")
    # Not by XDG_CACHE_HOME, where zig keeps its libraries.
    monkeypatch.setattr(native_build, "cache", lambda: tmp_path)
    made = native_runner("aarch64", library=arm.onnxruntime_library)
    job = {"model": str(chain(tmp_path / "m.onnx", width=32)), "threads": 1}
    lines = "".join(
        json.dumps(line) + "\n" for line in (job, {"do": "run", "count": 2}, {"do": "stop"})
    )
    done = subprocess.run(
        arm.command(made.command()),
        input=lines,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["ready", "samples"]
    assert len(events[1]["latency_s"]) == 2
