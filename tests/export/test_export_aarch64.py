"""Artifacts for ARM targets, verified on the emulated processor, and their C++ bundle."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import vitrim
from aarch64 import emulator
from bundle_sample import LABELS, artifact_in, build, logits_in, needs_compiler
from onnxruntime_header import NO_HEADER, header_folder
from PIL import Image
from processors import HOST_BITS
from tiny_models import add_noise, tiny_vit
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.select import select_tokens
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.bundle import bundle
from vitrim.export.exporter import export
from vitrim.export.sessions import open_session

IMAGES = np.random.default_rng(1).standard_normal((6, 3, 16, 16), dtype=np.float32)


def exported(
    folder: Path, target: str, precision: str, model: CompactModel | None = None
) -> Artifact:
    return export(
        vitrim.lift(tiny_vit()) if model is None else model,
        folder,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        images=IMAGES,
    )


@pytest.mark.parametrize(
    ("target", "cpu", "precision", "allowed"),
    [
        ("rpi4", "cortex-a72", "fp32", 1e-5),
        # With eight-bit dot products, which have kernels of their own; `python -m
        # benchmarks.accuracy.aarch64_parity` measures all targets.
        ("rpi5", "cortex-a76", "int8", 0.05),
        # Products with static ranges are the runtime's own there too.
        ("rpi5", "cortex-a76", "int8-static", 0.05),
    ],
)
def test_outputs_on_the_targets_processor_are_torchs(
    tmp_path: Path, target: str, cpu: str, precision: str, allowed: float
) -> None:
    found = emulator("onnxruntime")
    artifact = exported(tmp_path / "artifact", target, precision)
    stage = artifact.manifest.parity[-1]
    assert stage.stage == f"{target} under qemu-aarch64 {found.versions['qemu']} ({cpu})"
    assert (stage.reference, stage.images, stage.input_kind, stage.top1_agreement) == (
        "torch",
        len(IMAGES),
        "images",
        1.0,
    )
    assert stage.max_relative_error < allowed
    note = next(
        note
        for note in artifact.manifest.notes
        if note.startswith(f"{target}: verified under qemu-aarch64")
    )
    if precision == "fp32" or HOST_BITS == 8:
        assert float(note.split("its outputs differ by ")[1].split()[0]) < 1e-4
    else:
        assert "from this machine's, whose eight-bit products saturate, for the same file" in note


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("int8-static", 0.1)])
def test_tokens_leave_the_stream_on_the_targets_processor(
    tmp_path: Path, precision: str, allowed: float
) -> None:
    emulator("onnxruntime")
    dense = vitrim.lift(tiny_vit(patch_size=4, depth=3))
    mask = vitrim.StructuredMask.random(dense, {"token": 0.4, "ffn": 0.5}, seed=0)
    model = vitrim.compact(dense, mask).eval()
    assert model.architecture.tokens > model.architecture.step_tokens()[-1]
    artifact = exported(tmp_path / "artifact", "rpi5", precision, model)
    stage = artifact.manifest.parity[-1]
    assert stage.stage.startswith("rpi5 under qemu-aarch64 ")
    assert stage.max_relative_error < allowed


def test_tokens_are_selected_on_the_targets_processor_as_in_torch(tmp_path: Path) -> None:
    emulator("onnxruntime")
    dense = add_noise(tiny_vit(patch_size=4, depth=3))
    model = select_tokens(dense, "dynamicvit", stages=[0, 1], ratio=0.6).eval()
    stage = exported(tmp_path / "artifact", "rpi5", "fp32", model).manifest.parity[-1]
    assert stage.stage.startswith("rpi5 under qemu-aarch64 ")
    assert stage.max_relative_error < 1e-5
    assert [choice.equal for choice in stage.choices or ()] == [1.0, 1.0]


def test_without_emulation_the_manifest_records_that_parity_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRIM_EMULATION", str(tmp_path / "empty"))
    artifact = exported(tmp_path / "artifact", "rpi4", "fp32")
    note = (
        "parity was not run on rpi4: emulation is not prepared on this machine "
        "(vitrim targets emulate)"
    )
    assert note in artifact.manifest.notes
    assert all("under" not in stage.stage for stage in artifact.manifest.parity)


def test_the_manifest_of_a_target_without_an_emulator_records_the_reason(tmp_path: Path) -> None:
    artifact = exported(tmp_path / "artifact", "stm32h7", "fp32")
    assert (
        "parity was not run on stm32h7: programs for armv7e-m do not run on this machine"
        in artifact.manifest.notes
    )


def test_an_artifact_that_the_target_cannot_run_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = emulator("onnxruntime")
    from vitrim.targets.emulation.emulator import Emulator

    # A user land whose Python has no runtime.
    monkeypatch.setattr(
        Emulator,
        "command",
        lambda self, program: [str(found.qemu), "-L", str(found.root), str(found.python)],
    )
    with pytest.raises(
        InputError, match=r"rpi4: the artifact does not run under qemu-aarch64 .*numpy"
    ):
        exported(tmp_path / "artifact", "rpi4", "fp32")
    assert not (tmp_path / "artifact").exists()


def test_outputs_of_the_cross_compiled_example_are_the_artifacts(tmp_path: Path) -> None:
    arm = emulator("onnxruntime").like(["Cortex-A72"])
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
    needs_compiler()
    header = header_folder()
    if header is None:
        pytest.skip(NO_HEADER)
    artifact = artifact_in(tmp_path / "artifact")
    folder = bundle(artifact, tmp_path / "bundle")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31), dtype=np.uint8))
    picture.save(tmp_path / "picture.pgm", format="PPM")
    program = build(folder, header, "-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake")
    library = arm.onnxruntime_library
    assert library is not None
    command = arm.command(
        [
            program,
            library,
            folder / "model",
            tmp_path / "picture.pgm",
            "--logits",
            "--repeat",
            "1",
            "--report",
        ]
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()

    assert artifact.manifest.preprocessing is not None
    preprocessing = Preprocessing.model_validate(artifact.manifest.preprocessing.model_dump())
    expected = open_session(artifact).run(None, {"images": preprocessing.apply(picture)[None]})[0][
        0
    ]
    np.testing.assert_allclose(logits_in(lines), expected, atol=1e-5 * np.abs(expected).max())
    assert lines[0].endswith(LABELS[int(expected.argmax())])
    report = {
        name: int(value)
        for name, value in (
            line.split() for line in lines if "_bytes" in line and "p50" not in line
        )
    }
    assert report["program_bytes"] == program.stat().st_size
    assert report["runtime_bytes"] == library.stat().st_size
    assert report["model_bytes"] == artifact.model_path.stat().st_size
    # Time and memory are the emulator's, and are labelled so.
    assert set(report) == {
        "program_bytes",
        "runtime_bytes",
        "model_bytes",
        "peak_rss_bytes_with_emulator",
    }
    assert "p50_s_emulated" in done.stdout
    assert "p50_s " not in done.stdout
