"""`vitrim export --data`: whose labels must be the model's, and whose images need none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import vitrim
from photo_folder import CLASSES, write_photos
from tiny_models import tiny_vit
from vitrim.cli import call
from vitrim.commands.model_data import ModelData, calibration_images
from vitrim.compress.data import decoding
from vitrim.compress.data.loading import open_dataset
from vitrim.compress.data.named_datasets import default_preprocessing
from vitrim.compress.lift import lift
from vitrim.export.artifact import Artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three classes; models with five, three and no classes, saved and as graphs."""
    folder = tmp_path_factory.mktemp("made")
    write_photos(folder / "photos", train=12)
    for name, classes in (("five", 5), ("three", 3), ("features", 0)):
        model = lift(tiny_vit(num_classes=classes))
        vitrim.save(model, folder / name)
        artifact = vitrim.export(model, folder / "made" / name, form="plain")
        graph = onnx.load(artifact.model_path)
        onnx.save(graph, folder / f"{name}.onnx")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in os.listdir(made):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(os.listdir())
    assert call(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(os.listdir()) == before
    (line,) = captured.err.splitlines()
    return line.removeprefix("vitrim: ")


@pytest.mark.parametrize(
    ("model", "outputs"), [("five", 5), ("five.onnx", 5), ("features.onnx", 24)]
)
@pytest.mark.parametrize("more", [[], ["--precision", "int8-static"]])
def test_a_data_set_with_other_classes_is_refused_before_an_image_is_read(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    outputs: int,
    more: list[str],
) -> None:
    monkeypatch.setattr(decoding, "decode", lambda *_, **__: pytest.fail("an image was read"))
    monkeypatch.setattr("vitrim.compress.data.loading.decode", decoding.decode)
    line = refusal(capsys, "export", model, "--data", "imagefolder:photos", "--out", "small", *more)
    assert line == (
        f"imagefolder:photos has 3 classes, but the model has {outputs} outputs; name the data set "
        "that it was trained on, or images:FOLDER, whose images need no labels"
    )


@pytest.mark.parametrize("model", ["five", "five.onnx", "features.onnx"])
def test_images_without_labels_serve_any_model(work: Path, model: str) -> None:
    arguments = ["export", model, "--data", "images:photos", "--out", "small"]
    assert call([*arguments, "--precision", "int8-static"]) == 0
    manifest = Artifact.load("small").manifest
    assert manifest.labels is None
    assert manifest.preprocessing is not None
    assert {stage.input_kind for stage in manifest.parity} == {"images"}


@pytest.mark.parametrize("model", ["three", "three.onnx"])
def test_a_data_set_of_the_model_gives_its_labels(work: Path, model: str) -> None:
    assert call(["export", model, "--data", "imagefolder:photos", "--out", "small"]) == 0
    assert Artifact.load("small").manifest.labels == CLASSES


def test_features_have_no_labels(work: Path) -> None:
    assert call(["export", "features", "--data", "imagefolder:photos", "--out", "small"]) == 0
    assert Artifact.load("small").manifest.labels is None


def test_the_images_are_those_of_the_validation_split(work: Path) -> None:
    preprocessing = default_preprocessing("imagefolder:photos", (3, 16, 16))
    data = ModelData("imagefolder:photos", preprocessing, {"seed": 3, "validation": 0.5})
    opened = open_dataset(data.name, preprocessing=preprocessing, seed=3, validation=0.5)
    found, labels = calibration_images(data, 1000, 3)
    assert labels == list(CLASSES)
    np.testing.assert_array_equal(found, opened.val.arrays()[0])
    few, _ = calibration_images(data, 6, None)
    assert len(few) == 6
    whole = {image.tobytes() for image in opened.val.arrays()[0]}
    assert all(image.tobytes() in whole for image in few)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--bundle cpp: a bundle reads pictures, so the artifact needs the preprocessing"),
        (["--data", "imagefolder:photos", "--batch", "4"], "--bundle cpp: holds batches of 4"),
        (["--runtime", "openvino"], "--bundle cpp: runtime 'openvino' has no bundle"),
        (["--runtime", "all"], "--bundle cpp: runtime 'all' has no bundle"),
    ],
)
@pytest.mark.parametrize("model", ["three", "three.onnx"])
def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(
    work: Path, capsys: pytest.CaptureFixture[str], model: str, more: list[str], words: str
) -> None:
    line = refusal(capsys, "export", model, "--out", "small", "--bundle", "cpp", *more)
    assert line.startswith(words)
