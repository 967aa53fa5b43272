"""The bundle builds from a clean folder, and its outputs are the artifact's."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from bundle_sample import (
    LABELS,
    artifact_in,
    build,
    logits_in,
    needs_compiler,
    runtime_library,
)
from onnx_graphs import channels_last, classifier, written
from onnxruntime_header import NO_HEADER, header_folder
from PIL import Image
from random_networks import early_learned_tokens
from selecting_models import divided, noise_images, sharp_selection
from tiny_models import add_noise, tiny_vit
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.select import SelectMethod, select_tokens
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.bundle import bundle
from vitrim.export.graphs.imported_graph import export_graph
from vitrim.export.manifest import CpuFeatures
from vitrim.export.sessions import open_session


@pytest.fixture(scope="module")
def header() -> Path:
    needs_compiler()
    found = header_folder()
    if found is None:
        pytest.skip(NO_HEADER)
    return found


def run(
    program: Path, bundle_folder: Path, picture: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    command = [
        str(program),
        str(runtime_library()),
        str(bundle_folder / "model"),
        str(picture),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_processor_on_which_the_outputs_would_be_wrong_is_refused(
    header: Path, tmp_path: Path
) -> None:
    artifact = artifact_in(tmp_path / "artifact")
    cpu = CpuFeatures(assumes=("sse8|sse9",))
    Artifact.write(artifact.folder, artifact.manifest.model_copy(update={"cpu": cpu}))
    folder = bundle(artifact.folder, tmp_path / "bundle")
    picture = tmp_path / "picture.ppm"
    Image.new("L", (8, 8)).save(picture, format="PPM")
    ran = run(build(folder, header), folder, picture)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "eight-bit weights for x86-64 assume sse8|sse9" in ran.stderr
    assert "export it for --target " in ran.stderr


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"interpolation": "bicubic"}, "L"),
        (
            {
                "channels": 3,
                "mean": [0.4, 0.5, 0.6],
                "std": [0.2, 0.3, 1.0],
                "resize": "center-crop",
                "crop_ratio": 0.9,
                "interpolation": "bilinear",
            },
            "RGB",
        ),
    ],
    ids=["grey, squashed", "colour, cropped"],
)
def test_the_outputs_of_the_program_are_the_artifacts(
    header: Path, tmp_path: Path, settings: dict[str, Any], mode: str
) -> None:
    artifact = artifact_in(tmp_path / "artifact", **settings)
    program = build(bundle(artifact, tmp_path / "bundle"), header)
    assert artifact.manifest.preprocessing is not None
    preprocessing = Preprocessing.model_validate(artifact.manifest.preprocessing.model_dump())
    session = open_session(artifact)
    random = np.random.default_rng(0)
    # Larger, smaller, oblong, and with other colour channels than the model's.
    for number, (height, width, kind) in enumerate(
        [(53, 31, mode), (16, 16, mode), (9, 40, mode), (24, 24, "L" if mode == "RGB" else "RGB")]
    ):
        picture = Image.fromarray(
            random.integers(
                0, 256, (height, width, 3) if kind == "RGB" else (height, width), dtype=np.uint8
            )
        )
        path = tmp_path / f"{number}.ppm"
        picture.save(path, format="PPM")
        ran = run(program, tmp_path / "bundle", path, "--logits", "--repeat", "3", "--report")
        assert ran.returncode == 0, ran.stderr
        lines = ran.stdout.splitlines()
        expected = session.run(None, {"images": preprocessing.apply(picture)[None]})[0][0]
        np.testing.assert_allclose(logits_in(lines), expected, atol=1e-4 * np.abs(expected).max())
        assert lines[0].endswith(LABELS[int(expected.argmax())])
        timed, *report = lines[-5:]
        assert timed.startswith("p50_s 0.")
        sizes = {name: int(value) for name, value in map(str.split, report)}
        assert 5_000_000 < sizes.pop("peak_rss_bytes") < 300_000_000
        library = runtime_library()
        assert library is not None
        files = {"program": program, "runtime": library, "model": artifact.model_path}
        assert sizes == {f"{name}_bytes": file.stat().st_size for name, file in files.items()}


def test_the_program_drops_the_tokens_that_the_model_drops(header: Path, tmp_path: Path) -> None:
    dense = vitrim.lift(tiny_vit(in_chans=1, patch_size=4, depth=3))
    mask = vitrim.StructuredMask.random(dense, {"token": 0.4, "ffn": 0.5}, seed=0)
    model = vitrim.compact(dense, mask).eval()
    counts = model.architecture.step_tokens()
    assert 17 > model.architecture.tokens > counts[0] > counts[-1]
    require_equal_outputs(model, header, tmp_path)


def test_learned_tokens_leave_the_program_before_patches(header: Path, tmp_path: Path) -> None:
    dense = vitrim.lift(
        tiny_vit("vit_small_patch14_reg4_dinov2", in_chans=1, img_size=16, patch_size=4, depth=3)
    )
    model = vitrim.compact(dense, early_learned_tokens(dense.architecture)).eval()
    assert model.architecture.inner is not None
    require_equal_outputs(model, header, tmp_path)


@pytest.mark.parametrize("method", ["dynamicvit", "evit"])
def test_the_program_selects_the_tokens_that_the_model_selects(
    method: SelectMethod, header: Path, tmp_path: Path
) -> None:
    dense = add_noise(tiny_vit(in_chans=1, patch_size=4, depth=3))
    model = select_tokens(dense, method, stages=[0, 1], ratio=0.6).eval()
    require_equal_outputs(model, header, tmp_path)


def test_the_program_gives_each_picture_its_bucket(header: Path, tmp_path: Path) -> None:
    counts, images = (3, 6, 11), noise_images(12)
    model = divided(sharp_selection(), counts, images)
    spec = Preprocessing(channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    artifact = vitrim.export(model, tmp_path / "artifact", preprocessing=spec)
    folder = bundle(artifact, tmp_path / "bundle")
    text = (folder / "vitrim_model.h").read_text()
    assert "VITRIM_BUCKET_COUNT 3" in text
    assert "VITRIM_BUCKETS[VITRIM_BUCKET_COUNT + 1] = {3, 6, 11, 0};" in text
    program, random = build(folder, header), np.random.default_rng(1)
    chosen = set()
    for number in range(6):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8) // (1 + number % 3)
        path = tmp_path / f"{number}.ppm"
        Image.fromarray(pixels).save(path, format="PPM")
        image = torch.from_numpy(spec.apply(Image.fromarray(pixels))[None])
        for forced in (0, 3, 11):
            ran = run(program, folder, path, "--logits", "--bucket", str(forced))
            assert ran.returncode == 0, ran.stderr
            lines = ran.stdout.splitlines()
            kept = forced or int(model.bucket_of(image)[0])
            assert f"kept_patches {kept}" in lines
            with torch.no_grad():
                expected = model.fixed(kept)(image)[0].numpy()
            found = logits_in(lines)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
            chosen.add(kept)
    assert len(chosen) > 2
    ran = run(program, folder, path, "--bucket", "4")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1)
    assert "no bucket of 4 patches; VITRIM_BUCKETS lists those that there are" in ran.stderr


def require_equal_outputs(model: CompactModel, header: Path, tmp_path: Path) -> None:
    """Build the bundle of a model, and compare its logits of one picture with the model's."""
    artifact = artifact_in(tmp_path / "artifact", model)
    program = build(bundle(artifact, tmp_path / "bundle"), header)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    picture.save(tmp_path / "picture.pgm", format="PPM")
    ran = run(program, tmp_path / "bundle", tmp_path / "picture.pgm", "--logits")
    assert ran.returncode == 0, ran.stderr
    assert artifact.manifest.preprocessing is not None
    preprocessing = Preprocessing.model_validate(artifact.manifest.preprocessing.model_dump())
    with torch.no_grad():
        expected = model(torch.from_numpy(preprocessing.apply(picture)[None]))[0].numpy()
    found = logits_in(ran.stdout.splitlines())
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_model_with_channels_last_gets_its_pictures_in_that_order(
    header: Path, tmp_path: Path
) -> None:
    spec = {"channels": 3, "height": 16, "width": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    first, last = (
        export_graph(written(model, tmp_path, f"{name}.onnx"), tmp_path / name, preprocessing=spec)
        for name, model in (("first", classifier()), ("last", channels_last(classifier())))
    )
    program = build(bundle(last, tmp_path / "bundle"), header)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "picture.ppm", format="PPM")
    ran = run(program, tmp_path / "bundle", tmp_path / "picture.ppm", "--logits")
    assert ran.returncode == 0, ran.stderr
    image = Preprocessing.model_validate(spec).apply(picture)[None]
    expected = open_session(first).run(None, {"x": image})[0][0]
    found = logits_in(ran.stdout.splitlines())
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_program_reports_errors_in_one_line(header: Path, tmp_path: Path) -> None:
    folder = bundle(artifact_in(tmp_path / "artifact"), tmp_path / "bundle")
    program = build(folder, header)
    broken = tmp_path / "short.pgm"
    broken.write_bytes(b"P5\n4 4\n255\nabc")
    ran = run(program, folder, broken)
    assert (ran.returncode, ran.stderr) == (2, f"{broken}: ends before its last pixel\n")
    broken.write_bytes(b"GIF89a")
    assert "not a binary PGM (P5) or PPM (P6)" in run(program, folder, broken).stderr
    whole = tmp_path / "whole.pgm"
    Image.new("L", (4, 4)).save(whole, format="PPM")
    (folder / "model" / "model.onnx").write_bytes(b"no model")
    ran = run(program, folder, whole)
    assert ran.returncode == 3
    assert len(ran.stderr.splitlines()) == 1


def test_artifacts_that_cannot_be_bundled_are_refused(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path / "artifact")
    for change, reason in (
        ({"preprocessing": None}, "has no preprocessing"),
        ({"batch": 4}, "holds batches of 4"),
    ):
        Artifact.write(artifact.folder, artifact.manifest.model_copy(update=change))
        with pytest.raises(InputError, match=reason):
            bundle(artifact.folder, tmp_path / "bundle")
    artifact.model_path.write_bytes(b"other bytes")
    Artifact.write(artifact.folder, artifact.manifest)
    with pytest.raises(InputError, match=r"model\.onnx: has 11 bytes"):
        bundle(artifact.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_bundle_contains_the_unchanged_artifact(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path / "artifact")
    folder = bundle(artifact, tmp_path / "bundle")
    assert Artifact.load(folder / "model").sha256 == artifact.sha256
    text = (folder / "vitrim_model.h").read_text()
    assert "@" not in text
    assert "#define VITRIM_CLASSES 5" in text
    assert '"na\\303\\257ve"' in text
    assert torch.tensor(1.0 / (255 * 0.4)).item() == np.float32(
        text.split("VITRIM_SCALE[VITRIM_CHANNELS] = {")[1].split("f}")[0]
    )
