"""Networks compiled by TVM: static plans, the virtual machine, other processors, refusals."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aarch64 import emulator
from tiny_models import tiny_vit
from tvm_sample import compiled, expected, images, job_of, source
from vitrim.core.errors import InputError
from vitrim.export.exporter import export
from vitrim.export.runtimes import runtime_named, tvm_runtime
from vitrim.export.tvm_kernels import link as tvm_link
from vitrim.export.tvm_kernels.execution_plan import NoExecutionPlan
from vitrim.export.tvm_kernels.weights import lift_weights
from vitrim.runtimes import EngineError, open_engine
from vitrim.runtimes.subprocess_inference import infer_in_subprocess


@pytest.fixture(autouse=True)
def _compiler() -> None:
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: apt-get install g++")


def loaded(job: dict[str, Any]) -> Any:
    engine = open_engine(job)
    engine.load()
    return engine


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_static_plan_needs_no_runtime_and_computes_torchs_outputs(tmp_path: Path) -> None:
    written = compiled(tmp_path / "a")
    assert written.session["entry"] == "program"
    assert sorted(os.listdir(tmp_path / "a")) == ["model.so"]
    given = images(1)
    # In a process that has numpy and no TVM.
    logits, facts = infer_in_subprocess(job_of(tmp_path / "a", written), given)
    close(logits, expected(given))
    assert facts["runtime"] == "tvm"
    engine = loaded(job_of(tmp_path / "a", written))
    # Images at an unaligned address.
    odd = np.empty(given.size + 1, dtype=np.float32)[1:].reshape(given.shape)
    odd[...] = given
    close(engine.infer(odd), expected(given))
    rows = engine.profile(given, 3)
    assert {row["calls"] for row in rows} == {3}
    assert all(row["seconds"] > 0 for row in rows)
    assert len({row["node"] for row in rows}) == len(rows) > 5
    assert engine.arena_bytes() > 0


def test_several_images_and_several_threads(tmp_path: Path) -> None:
    written = compiled(tmp_path / "a", batch=2, threads=2)
    assert written.session["threads"] == "2"
    given = images(2)
    wanted = expected(given)
    for threads in (1, 2, 3):
        engine = loaded(job_of(tmp_path / "a", written, batch=2, threads=threads))
        # Repeated, since races are rare.
        for _ in range(50):
            close(engine.infer(given), wanted)


def test_a_network_without_a_static_plan_runs_in_the_virtual_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_plan(network: Any) -> Any:
        raise NoExecutionPlan("it calls vm.builtin.shape_of")

    monkeypatch.setattr(tvm_runtime, "execution_plan", no_plan)
    lift = lift_weights
    monkeypatch.setattr(
        tvm_runtime,
        "lift_weights",
        lambda module: lift(module, least_tensor_bytes=512, least_bytes=1),
    )
    written = compiled(tmp_path / "a")
    assert written.session["entry"] == "machine"
    assert written.files == (("weights.bin", "weights"),)
    assert (
        "runs in TVM's virtual machine, because it has no static execution plan: "
        "it calls vm.builtin.shape_of" in written.notes
    )
    given = images(1)
    logits, _ = infer_in_subprocess(job_of(tmp_path / "a", written), given)
    close(logits, expected(given))
    job = job_of(tmp_path / "a", written)
    assert loaded(job).profile(given, 2)[0]["calls"] % 2 == 0
    weights = tmp_path / "a" / "weights.bin"
    whole = weights.read_bytes()
    for broken, reason in (
        (whole[:-4096], "a tensor is outside the file"),
        (whole.replace(b"vitrim.weights/1", b"vitrim.weights/9"), "schema 'vitrim.weights/9'"),
        (whole.replace(b'"float32"', b'"object" ', 1), "type 'object'"),
        (b"no table", "not a complete file of weights"),
    ):
        weights.write_bytes(broken)
        with pytest.raises(EngineError, match=reason):
            loaded(job)
    weights.unlink()
    with pytest.raises(
        EngineError, match=r"weights\.bin: no such file, and the model needs \d+ weights from it"
    ):
        loaded(job)
    with pytest.raises(InputError, match="static=yes: this model runs in TVM's virtual machine"):
        compiled(tmp_path / "b", options={"static": "yes"})


def test_code_for_arm_computes_torchs_outputs_and_is_refused_here(tmp_path: Path) -> None:
    emulator("apache-tvm-ffi")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
    written = compiled(tmp_path / "a", "rpi4")
    assert written.session["triple"] == "aarch64-linux-gnu"
    assert written.parity_skipped is None
    assert written.command is not None
    given = images(2)
    job = job_of(tmp_path / "a", written)
    logits, _ = infer_in_subprocess(job, given, command=written.command)
    close(logits, expected(given))
    refusal = r"model\.so was compiled for aarch64-linux-gnu, and this machine is x86_64"
    with pytest.raises(EngineError, match=refusal):
        loaded(job_of(tmp_path / "a", written))


def test_code_for_cuda_is_written_without_a_gpu(tmp_path: Path) -> None:
    if tvm_runtime.has_cuda():
        pytest.skip("this machine has a GPU")
    written = compiled(tmp_path / "a", "cuda")
    assert written.parity_skipped == (
        "there is no CUDA device on this machine; run `vitrim bench` on one that has it"
    )
    assert (tmp_path / "a" / written.main).stat().st_size > 10_000
    with pytest.raises(
        EngineError,
        match=r"was compiled for cuda, and this machine has no such device|libtvm_runtime_cuda",
    ):
        loaded(job_of(tmp_path / "a", written))


def test_the_export_computes_the_parity_of_the_compiled_network(tmp_path: Path) -> None:
    artifact = export(tiny_vit(), tmp_path / "a", runtime="tvm", images=images(4))
    compiled_stage = artifact.manifest.parity[-1]
    assert (compiled_stage.stage, compiled_stage.images) == ("tvm", 4)
    assert compiled_stage.max_relative_error < 1e-4
    assert artifact.manifest.versions["apache-tvm"] == artifact.manifest.session["compiler"]
    assert "compiled for llvm" in " ".join(artifact.manifest.notes)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"options": {"speed": "high"}},
            "runtime tvm: no option 'speed'; it has log, tune_s, schedule, static",
        ),
        ({"options": {"static": "perhaps"}}, "option static=perhaps: use yes or no"),
        ({"options": {"schedule": "quick"}}, "option schedule=quick: use ours or default"),
        (
            {"options": {"schedule": "default", "tune_s": "5"}},
            "tuning measures our own kernels, "
            "and this network, target or schedule has none of them",
        ),
        ({"options": {"tune_s": "long"}}, "option tune_s=long: give the seconds"),
        ({"options": {"log": "nowhere.jsonl"}}, r"option log=nowhere\.jsonl: no such file"),
        ({"target": "stm32h7"}, "no linker for thumbv7em-none-eabihf on this machine"),
        ({"target": "snapdragon-8-gen-2"}, "no linker for aarch64-linux-android on this machine"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        runtime_named("tvm").write(source(**{"target": "host", **settings}), tmp_path)


def test_compiled_code_has_no_dynamic_batch(tmp_path: Path) -> None:
    refusal = "runtime tvm: a file holds one batch size; export with batch 1 or another number, "
    with pytest.raises(InputError, match=f"{refusal}or for another runtime"):
        export(tiny_vit(), tmp_path / "a", runtime="tvm", batch="dynamic")


def test_a_missing_linker_is_reported_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert tvm_link.linker_for("x86_64-linux-gnu").name.split()[0].endswith("++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refusal = (
        r"no linker for aarch64-linux-gnu on this machine; "
        r"install one with `apt-get install g\+\+-aarch64-linux-gnu`"
    )
    with pytest.raises(InputError, match=refusal):
        tvm_link.linker_for("aarch64-linux-gnu")


def test_a_file_that_is_not_a_compiled_network_is_refused(tmp_path: Path) -> None:
    job = {
        "runtime": "tvm",
        "model": str(tmp_path / "model.so"),
        "session": {"entry": "program"},
        "input": {"shape": [1, 3, 16, 16]},
    }
    with pytest.raises(EngineError, match="no such file"):
        loaded(job)
    (tmp_path / "model.so").write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"model\.so: cannot be loaded"):
        loaded(job)
    with pytest.raises(EngineError, match="device 'tpu' is unknown to this engine"):
        open_engine({**job, "session": {"device": "tpu"}})
