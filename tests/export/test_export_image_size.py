"""An artifact for another image size: outputs, manifest, C++ program, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import vitrim
from bundle_sample import LABELS, build, logits_in, needs_compiler, runtime_library
from onnxruntime_header import NO_HEADER, header_folder
from photo_folder import CLASSES, write_photos
from PIL import Image
from tiny_models import tiny_vit
from vitrim import InputError, StructuredMask, UnsupportedModel
from vitrim.cli import call
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.network.architecture import Architecture
from vitrim.export import Artifact, export, open_session
from vitrim.export.bundle import bundle
from vitrim.export.graphs.model_facts import weights_sha256
from vitrim.export.resized_model import attention_bytes, require_memory

TRAINED = {
    "channels": 3,
    "height": 16,
    "width": 16,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 1.0],
    "resize": "center-crop",
    "crop_ratio": 0.9,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, torch.nn.Module, np.ndarray]:
    """One artifact of a pruned model resized from 16 x 16 to 24 x 32, and the same made by timm."""
    model: Any = tiny_vit("deit_tiny_distilled_patch16_224")
    mask = StructuredMask.random(model, 0.6, "unshared")
    images = np.random.default_rng(3).standard_normal((6, 3, 24, 32), dtype=np.float32)
    small = vitrim.compact(model, mask).eval()
    folder = tmp_path_factory.mktemp("made") / "artifact"
    artifact = export(
        small,
        folder,
        image_size=(24, 32),
        preprocessing=TRAINED,
        labels=list(LABELS),
        images=images,
        provenance={"source_sha": weights_sha256(small)},
    )
    model.set_input_size(img_size=(24, 32))
    return artifact, vitrim.compact(model, mask).eval(), images


def test_outputs_are_timms_at_that_size_and_the_manifest_records_the_source(
    made: tuple[Artifact, torch.nn.Module, np.ndarray],
) -> None:
    artifact, wanted, images = made
    session = open_session(artifact)
    found = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
    with torch.no_grad():
        expected = wanted(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    manifest = artifact.manifest
    assert manifest.inputs[0].shape == (1, 3, 24, 32)
    assert manifest.preprocessing is not None
    # Only the size changes; crop ratio, filter, mean and std stay.
    wanted_fields = TRAINED | {"height": 24, "width": 32, "interpolation": "bicubic"}
    assert json.loads(manifest.preprocessing.model_dump_json()) == wanted_fields
    details = dict(manifest.provenance.details)
    assert details.pop("resized_from") == "16x16"
    assert (
        details.pop("resized_from_weights_sha256")
        == details.pop("source_sha")
        != manifest.provenance.weights_sha256
    )
    assert not details
    assert manifest.notes[0] == (
        "image size 24x32: the model was trained at 16x16, not at this size; its accuracy here "
        "differs, and is not measured yet"
    )


def test_a_resampled_token_mask_is_noted_in_the_manifest(tmp_path: Path) -> None:
    model = tiny_vit(img_size=32, depth=3)
    cut = vitrim.compact(model, vitrim.choose_tokens(model, "radial", macs=0.7)).eval()
    line = "image size 48x48: the map of where patches leave was resampled from that of another"
    cases: list[tuple[Any, int | None, bool]] = [
        (cut, None, False),
        (cut, 48, True),
        # Resized before the export.
        (vitrim.resized(cut, 48), None, True),
        (vitrim.lift(model), 48, False),
    ]
    for number, (given, size, noted) in enumerate(cases):
        artifact = export(given, tmp_path / str(number), image_size=size)
        assert any(note.startswith(line) for note in artifact.manifest.notes) == noted


def test_the_cpp_program_prepares_pictures_for_the_new_size(
    made: tuple[Artifact, torch.nn.Module, np.ndarray], tmp_path: Path
) -> None:
    needs_compiler()
    header = header_folder()
    if header is None:
        pytest.skip(NO_HEADER)
    artifact, wanted, _ = made
    folder = bundle(artifact, tmp_path / "bundle")
    program = build(folder, header)
    assert artifact.manifest.preprocessing is not None
    prepare = Preprocessing.model_validate(artifact.manifest.preprocessing.model_dump())
    for number, shape in enumerate([(53, 31, 3), (9, 40, 3)]):
        picture = Image.fromarray(
            np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        )
        picture.save(tmp_path / "picture.ppm", format="PPM")
        command = [
            program,
            runtime_library(),
            folder / "model",
            tmp_path / "picture.ppm",
            "--logits",
        ]
        ran = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stderr
        logits = logits_in(ran.stdout.splitlines())
        with torch.no_grad():
            expected = wanted(torch.from_numpy(prepare.apply(picture))[None])[0].numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_the_command_uses_the_runs_own_images_at_the_new_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos")
    model = vitrim.save(tiny_vit("eva02_tiny_patch14_224", num_classes=3), tmp_path / "run/compact")
    card = {
        "schema": "vitrim.data/1",
        "name": f"imagefolder:{photos}",
        "seed": 0,
        "validation": 0.25,
        "preprocessing": TRAINED,
    }
    (tmp_path / "run/data.json").write_text(json.dumps(card))
    assert (
        call(["export", str(model), "--out", str(tmp_path / "out"), "--image-size", "24x16"]) == 0
    )
    printed = capsys.readouterr().out
    assert "image size 24x16: the model was trained at 16x16" in printed
    manifest = Artifact.load(tmp_path / "out").manifest
    assert manifest.inputs[0].shape == (1, 3, 24, 16)
    assert manifest.parity[-1].input_kind == "images"
    assert manifest.labels == CLASSES
    assert manifest.preprocessing is not None
    assert (
        manifest.preprocessing.height,
        manifest.preprocessing.width,
        manifest.preprocessing.crop_ratio,
    ) == (24, 16, 0.9)


def test_the_command_refuses_sizes_that_do_not_work_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vitrim.save(tiny_vit(), tmp_path / "model")
    graph = tmp_path / "given.onnx"
    picture, logits = (
        onnx.helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("images", [1, 3, 4, 4]), ("logits", [1, 48]))
    )
    node = onnx.helper.make_node("Flatten", ["images"], ["logits"])
    onnx.save(
        onnx.helper.make_model(
            onnx.helper.make_graph([node], "flat", [picture], [logits]),
            opset_imports=[onnx.helper.make_opsetid("", 18)],
        ),
        graph,
    )
    for given, size, line in (
        (
            model,
            "20",
            "image size 20x20: height 20 does not make whole patches, which start every 8 pixels; "
            "16 and 24 are the nearest that work",
        ),
        (
            model,
            "big",
            "image size 'big': write 160, or 160x192 for height x width, in pixels above 0 and up "
            "to 1000000",
        ),
        (
            graph,
            "8",
            f"{graph}: the image size of an .onnx file is fixed; export it again at 8, "
            "or name the saved model",
        ),
    ):
        assert (
            call(["export", str(given), "--out", str(tmp_path / "out"), "--image-size", size]) == 2
        )
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", f"vitrim: {line}\n")
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit_a_new_size_are_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    with pytest.raises(
        InputError,
        match="preprocessing: it makes images of 20x16, "
        "the model is for 16x16 and is resized to 24x24",
    ):
        export(model, tmp_path / "out", image_size=24, preprocessing=TRAINED | {"height": 20})
    with pytest.raises(
        InputError,
        match=r"images: shape \(2, 3, 16, 16\) does not fit the model's \(count, 3, 24, 24\)",
    ):
        export(model, tmp_path / "out", image_size=24, images=np.zeros((2, 3, 16, 16), np.float32))
    with pytest.raises(InputError, match="image and image_size both give the size"):
        export(model, tmp_path / "out", image_size=24, image=(3, 16, 16))
    with pytest.raises(UnsupportedModel, match="no rule for"):
        export(torch.nn.Flatten(), tmp_path / "out", image_size=24)
    assert not (tmp_path / "out").exists()


def test_attention_that_does_not_fit_the_memory_is_refused_before_it_is_computed() -> None:
    architecture = vitrim.lift(tiny_vit()).architecture
    data = architecture.model_dump(by_alias=True) | {"image": (3, 2032, 2032)}
    data["steps"][0][0]["core"] |= {"heads": 100_000, "qk": 1, "v": 1}
    huge = Architecture.model_validate(data)
    assert attention_bytes(huge) == 64_517**2 * 8 * 100_000
    needed = r"image size 2032x2032: its 64517 tokens need 3329955 GB for attention"
    with pytest.raises(
        InputError,
        match=needed + r", this machine has \d+ GB; (\d+)x\1 is the largest square that works",
    ):
        require_memory(huge)
    require_memory(architecture)
