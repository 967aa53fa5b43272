"""The bundle of a compiled network, built from a clean folder for this machine and for ARM.

The model is linked into the program, or the program opens it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from aarch64 import emulator
from bundle_sample import logits_in, needs_compiler
from PIL import Image
from processors import emulated_x86, taken_for
from tvm_sample import LABELS, PREPROCESSING, artifact_in, compiled, expected
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.bundle import bundle
from vitrim.targets.instruction_sets import CPU_FEATURES


@pytest.fixture(autouse=True)
def _tools() -> None:
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    needs_compiler()


def build(folder: Path, place: str, *settings: str) -> Path:
    for command in (
        ["cmake", "-S", ".", "-B", place, "-DCMAKE_CXX_FLAGS=-Werror", *settings],
        ["cmake", "--build", place],
    ):
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=600, cwd=folder, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / place / "vitrim_example"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False
    )


def picture_in(folder: Path) -> tuple[Path, np.ndarray]:
    """A picture of another size than the model's input, and torch's logits for it."""
    pixels = np.random.default_rng(0).integers(0, 256, (31, 53, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / "picture.ppm")
    image = Preprocessing.model_validate(PREPROCESSING).apply(picture)
    return folder / "picture.ppm", expected(image[None])[0]


def check(ran: subprocess.CompletedProcess[str], wanted: np.ndarray) -> dict[str, int]:
    """Check the label and the logits; returns the program's report."""
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    np.testing.assert_allclose(logits_in(lines), wanted, atol=1e-4 * np.abs(wanted).max())
    assert lines[0].endswith(LABELS[int(wanted.argmax())])
    return {name: int(number) for name, number in (line.split() for line in lines[-4:])}


def test_the_model_is_linked_into_the_program_or_opened_by_it(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path / "artifact")
    folder = bundle(artifact, tmp_path / "bundle")
    assert Artifact.load(folder / "model").sha256 == artifact.sha256
    picture, wanted = picture_in(tmp_path)
    linked = build(folder, "linked")
    report = check(run(linked, picture, "--logits", "--report"), wanted)
    # No runtime: the program contains code and weights, and needs a few megabytes of memory.
    assert report["runtime_bytes"] == report["model_bytes"] == 0
    assert report["program_bytes"] < 2_000_000
    assert 1_000_000 < report["peak_rss_bytes"] < 20_000_000
    needed = run("readelf", "-d", linked).stdout
    assert "tvm" not in needed
    opened = build(folder, "opened", "-DVITRIM_LINKED=OFF")
    report = check(run(opened, "-", folder / "model", picture, "--logits", "--report"), wanted)
    assert report["model_bytes"] == artifact.bytes
    (folder / "model" / "model.so").write_bytes(b"no library")
    ran = run(opened, "-", folder / "model", picture)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (3, 1)
    assert "cannot open the model" in ran.stderr


def test_a_program_for_every_x86_64_processor_runs_on_an_old_one(tmp_path: Path) -> None:
    nehalem = emulated_x86("Nehalem")
    folder = bundle(artifact_in(tmp_path / "artifact", "x86-64"), tmp_path / "bundle")
    picture, wanted = picture_in(tmp_path)
    check(run(*nehalem, build(folder, "linked"), picture, "--logits", "--report"), wanted)


def test_the_default_program_of_a_machine_with_avx2_runs_without_avx512(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    haswell = emulated_x86("Haswell")
    monkeypatch.setenv(CPU_FEATURES, taken_for("x86-64-v3")[CPU_FEATURES])
    folder = bundle(artifact_in(tmp_path / "artifact"), tmp_path / "bundle")
    picture, wanted = picture_in(tmp_path)
    check(run(*haswell, build(folder, "linked"), picture, "--logits", "--report"), wanted)


def test_a_processor_without_the_instruction_sets_is_refused_in_one_line(tmp_path: Path) -> None:
    haswell = emulated_x86("Haswell")
    folder = bundle(artifact_in(tmp_path / "artifact", "x86-64-v4-vnni"), tmp_path / "bundle")
    picture, _ = picture_in(tmp_path)
    opened = build(folder, "opened", "-DVITRIM_LINKED=OFF")
    header = folder / "vitrim_model.h"
    for command in ([build(folder, "linked")], [opened, "-", folder / "model"]):
        ran = run(*haswell, *command, picture)
        assert ran.returncode == 2
        assert lines_of(ran) == [
            "the model's code for x86-64-v4-vnni uses avx512f, which this processor does not have; "
            "export it for --target x86-64-v3"
        ]
    # The library itself refuses too, whatever the program checked.
    text = header.read_text()
    header.write_text(re.sub('VITRIM_CPU_NEEDS ".*"', 'VITRIM_CPU_NEEDS ""', text))
    ran = run(*haswell, build(folder, "unchecked"), picture)
    assert ran.returncode == 3
    assert "uses avx512f, which this processor does not have" in lines_of(ran)[0]


def lines_of(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """What a program reported, without qemu's remarks about the core."""
    return [line for line in ran.stderr.splitlines() if not line.startswith("qemu")]


def test_one_file_for_arm_needs_no_shared_library(tmp_path: Path) -> None:
    machine = emulator()
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
    folder = bundle(artifact_in(tmp_path / "artifact", "rpi4"), tmp_path / "bundle")
    program = build(folder, "arm", "-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake", "-DVITRIM_STATIC=ON")
    picture, wanted = picture_in(tmp_path)
    # Without an ARM system's libraries.
    command = (machine.qemu, "-cpu", "cortex-a72", program, picture, "--logits", "--report")
    report = check(run(*command), wanted)
    assert report["program_bytes"] == program.stat().st_size < 4_000_000


def test_what_cannot_be_bundled_is_refused(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path / "artifact")
    Artifact.write(
        artifact.folder, artifact.manifest.model_copy(update={"session": {"entry": "machine"}})
    )
    with pytest.raises(
        InputError, match="this model runs in TVM's virtual machine, which no bundle contains"
    ):
        bundle(artifact.folder, tmp_path / "bundle")
    Artifact.write(artifact.folder, artifact.manifest.model_copy(update={"runtime": "ncnn"}))
    with pytest.raises(
        InputError, match="runtime 'ncnn' has no bundle; export for onnxruntime or tvm"
    ):
        bundle(artifact.folder, tmp_path / "bundle")


def test_without_objects_the_program_opens_the_model(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path / "artifact")
    shutil.rmtree(artifact.folder / "objects")
    only = compiled(tmp_path / "only")
    assert only.files == ()
    Artifact.write(
        artifact.folder, artifact.manifest.model_copy(update={"files": artifact.manifest.files[:1]})
    )
    folder = bundle(artifact.folder, tmp_path / "bundle")
    # A program without shared libraries cannot open one either.
    for number, setting in enumerate(("-DVITRIM_LINKED=ON", "-DVITRIM_STATIC=ON")):
        configured = subprocess.run(
            ["cmake", "-S", ".", "-B", f"build{number}", setting],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert configured.returncode != 0
        assert "an artifact that was exported with" in " ".join(configured.stderr.split())
