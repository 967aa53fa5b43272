"""Folders that `save_pretrained` of transformers wrote, on the command line and as checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vitrim
from photo_folder import write_photos
from vitrim.cli import call
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.pipeline.recipe_sections import ModelSection
from vitrim.pipeline.source_model import image_of, load_folder, source_model

SIZES: dict[str, Any] = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"intermediate_size": 48, "image_size": 16, "patch_size": 8},
}
PREPROCESSOR = {
    **{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.3, 0.3], "do_center_crop": True},
    **{"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 20}, "resample": 2},
}


def _clip(kind: str) -> Any:
    if kind == "vision":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
    text: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    text |= {"intermediate_size": 16, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=8)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, and three models: a backbone, one with a text tower, and a classifier."""
    folder = tmp_path_factory.mktemp("transformers")
    write_photos(folder / "photos")
    torch.manual_seed(0)
    backbone = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES))
    backbone.save_pretrained(folder / "backbone")
    (folder / "backbone" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    _clip("both").save_pretrained(folder / "two-towers")
    config = transformers.ViTConfig(**{**SIZES, "num_labels": 3})
    transformers.ViTForImageClassification(config).save_pretrained(folder / "classifier")
    return folder


def test_a_backbone_is_cut_and_exported_from_its_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    cut = ["--macs", "0.8", "--round-to", "4", "--data", "images:photos", "--out", "small"]
    assert call(["compact", "backbone", "--without-training", *cut]) == 0
    small = vitrim.load("small")
    data = small.architecture.data
    assert data is not None
    assert data.mean == (0.1, 0.2, 0.3)
    assert (data.crop_mode, data.crop_pct, data.interpolation) == ("center", 0.8, "bilinear")
    assert call(["export", "backbone", "--out", "artifact", "--output", "patches"]) == 0
    assert [output.name for output in Artifact.load("artifact").manifest.outputs] == ["patches"]


def test_the_folder_gives_the_function_of_the_model(place: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    backbone: Any = transformers.DINOv3ViTModel.from_pretrained(place / "backbone")
    both: Any = transformers.CLIPModel.from_pretrained(place / "two-towers")
    with torch.no_grad():
        for name, model in (("backbone", backbone), ("two-towers", both.vision_model)):
            wanted = model.eval()(images).pooler_output
            found = load_folder(place / name)(images)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_recipe_starts_from_a_folder(place: Path) -> None:
    section = ModelSection(checkpoint=str(place / "classifier"))
    assert image_of(section) == (3, 16, 16)
    assert vitrim.lift(source_model(section, 3)).architecture.classes == 3
    with pytest.raises(InputError, match="the model has 3 classes, the data set has 5"):
        source_model(section, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["NoModel"]}, "transformers has no model 'NoModel'"),
        ({"hidden_size": 48}, "transformers cannot load it"),
        ({"num_hidden_layers": 3}, "the weights have no"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "which BertModel needs"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in (place / "backbone").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert call(["compact", str(folder), "--keep-ratio", "0.5"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_a_preprocessor_without_a_mean_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in (place / "backbone").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    assert call(["compact", str(folder), "--keep-ratio", "0.5"]) == 2
    assert "no mean and std of the channels" in capsys.readouterr().err
