"""The recipes of large data sets: complete, and of the sizes that they state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from vitrim.compress.lift import lift
from vitrim.compress.network.count import count_macs
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import prepare
from vitrim.pipeline.source_model import build, preprocessing_of

IMAGENET = ("imagenet_deit", "imagenet_deit_base_sizes")
OTHERS = ("cifar10_vit_tiny_384", "tiny_imagenet_vit_small")
DEITS = (
    "deit_tiny_patch16_224.fb_in1k",
    "deit_small_patch16_224.fb_in1k",
    "deit_base_patch16_224.fb_in1k",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
)


def macs_of(model: str) -> int:
    with torch.device("meta"):
        return count_macs(lift(build(model, {})).architecture)


def write_photos(root: Path, classes: int = 3, count: int = 40) -> Path:
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(classes):
            (root / part / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 255, (50, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / str(label) / f"{number}.jpg")
    return root


@pytest.mark.parametrize("name", [*IMAGENET, *OTHERS])
def test_a_recipe_starts_from_published_weights(name: str) -> None:
    recipe = load_recipe(name)
    assert timm.is_model_pretrained(recipe.model.name)
    assert recipe.model.pretrained
    assert recipe.train.optimizer == "adamw"
    assert recipe.train.workers > 0
    assert recipe.train.batch_size % 2 == 0


@pytest.mark.parametrize("model", DEITS)
@pytest.mark.parametrize("macs", [0.5, 0.3])
def test_deits_are_compressed_to_half_and_to_30_percent(model: str, macs: float) -> None:
    recipe = load_recipe("imagenet_deit", [f"model.name={model}", f"masks.macs={macs}"])
    assert (recipe.model.name, recipe.masks.macs) == (model, macs)
    assert timm.is_model_pretrained(model)
    # The file names each of them.
    text = Path(load_recipe.__code__.co_filename).parents[1] / "recipes" / "imagenet_deit.toml"
    assert model in text.read_text(encoding="utf-8").replace("\n#", "")


@pytest.mark.parametrize(
    ("share", "macs"), [(0.2366, 4.16e9), (0.1485, 2.61e9), (0.0688, 1.21e9), (0.0353, 0.62e9)]
)
def test_the_sizes_of_isomorphic_pruning(share: float, macs: float) -> None:
    recipe = load_recipe("imagenet_deit_base_sizes", [f"masks.macs={share}"])
    assert recipe.masks.macs is not None
    assert recipe.masks.macs * macs_of(recipe.model.name) == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize("name", [*IMAGENET, *OTHERS])
def test_a_recipe_can_be_prepared(name: str, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    small = "deit_tiny_patch16_224.fb_in1k"
    sets = [f"data.name=imagefolder:{photos}", "model.pretrained=false", "data.validation=0.1"]
    if name in IMAGENET:
        sets.append(f"model.name={small}")
    prepared = prepare(load_recipe(name, sets), quiet=True)
    assert prepared.dense.architecture.image[1:] == ((384, 384) if "384" in name else (224, 224))
    # 240 images of 224 x 224 are below the limit; those of the other recipes are never cached.
    assert prepared.data.train.decoded == (name in IMAGENET)


def test_a_budget_that_no_mask_meets_is_refused(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    sets = [
        f"data.name=imagefolder:{photos}",
        "model.pretrained=false",
        "model.name=deit_tiny_patch16_224.fb_in1k",
        "masks.macs=0.0001",
    ]
    with pytest.raises(InputError, match="smallest"):
        prepare(load_recipe("imagenet_deit", sets), quiet=True)


@pytest.mark.parametrize("size", [(50, 70), (375, 500), (500, 333), (224, 224), (1000, 300)])
@pytest.mark.parametrize(
    "model", ["deit_small_patch16_224.fb_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k"]
)
def test_evaluation_crops_as_timm_does(model: str, size: tuple[int, int]) -> None:
    section = load_recipe("imagenet_deit", [f"model.name={model}"]).model
    with torch.device("meta"):
        config = resolve_data_config({}, model=timm.create_model(model))
    preprocessing = preprocessing_of(section, "imagenet-1k", config["input_size"], "center-crop")
    assert preprocessing.crop_ratio == config["crop_pct"]
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = create_transform(**config)(image)
    found = preprocessing.apply(image)
    assert np.abs(found - expected.numpy()).max() < 1e-5
