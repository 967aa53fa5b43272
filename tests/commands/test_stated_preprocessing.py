"""Images of a data set without statistics of its own are prepared as the model states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vitrim
from photo_folder import write_photos
from tiny_models import tiny_vit
from vitrim.cli import call
from vitrim.commands.compact_options import ModelOptions, Selection
from vitrim.commands.compact_source import data_of, load_source
from vitrim.compress.data.named_datasets import IMAGENET_MEAN
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.export.artifact import Artifact

HALF = (0.5, 0.5, 0.5)
CONFIG = {"mean": HALF, "std": (0.25, 0.5, 0.5), "crop_pct": 0.9, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, a model with a data config and one without, and weights under a name of timm."""
    folder = tmp_path_factory.mktemp("stated")
    write_photos(folder / "photos")
    model: Any = tiny_vit(num_classes=3)
    model.pretrained_cfg = CONFIG
    vitrim.save(vitrim.lift(model), folder / "stated")
    model.pretrained_cfg = {}
    vitrim.save(vitrim.lift(model), folder / "unstated")
    return folder


def _prepared(options: ModelOptions, data: str) -> Preprocessing:
    selection = Selection(data=data)
    return data_of(load_source(options), selection, "--without-training").preprocessing


@pytest.mark.parametrize("data", ["images:photos", "imagefolder:photos"])
def test_a_cut_prepares_images_as_the_saved_model_states(
    place: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.chdir(place)
    found = _prepared(ModelOptions(source=Path("stated")), data)
    assert (found.mean, found.std) == (HALF, (0.25, 0.5, 0.5))
    assert (found.resize, found.crop_ratio, found.interpolation) == ("center-crop", 0.9, "bilinear")
    assert _prepared(ModelOptions(source=Path("unstated")), data).mean == IMAGENET_MEAN
    # Data sets that are known have a mean and std of their own.
    assert _prepared(ModelOptions(source=Path("stated")), "cifar10").mean == (
        *(0.4914, 0.4822, 0.4465),
    )


def test_a_checkpoint_file_is_prepared_as_its_timm_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 3,
    }
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    torch.save(model.state_dict(), "weights.pth")
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    options = ModelOptions(Path("weights.pth"), model="vit_tiny_patch16_224", overrides=overrides)
    # Not those of ImageNet: the weights of that name were trained with others.
    assert _prepared(options, "images:photos").mean == HALF


def test_an_artifact_prepares_images_as_the_saved_model_states(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert call(["export", "stated", "--data", "images:photos", "--out", "artifact"]) == 0
    found = Artifact.load("artifact").manifest.preprocessing
    assert found is not None
    assert found.mean == HALF
    assert (found.resize, found.crop_ratio) == ("center-crop", 0.9)
