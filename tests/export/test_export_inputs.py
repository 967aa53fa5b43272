"""What `export` is given: the model's type and numbers, and images as bytes or as floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_vit
from torch import Tensor, nn
from vitrim import InputError, export, lift, load, save
from vitrim.export import Artifact, open_session
from vitrim.export.manifest import PreprocessingSpec
from vitrim.export.request import input_images, preprocessing_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PREPROCESSING = {"channels": 3, "height": 16, "width": 16, "mean": MEAN, "std": STD}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)


def described() -> PreprocessingSpec:
    found = preprocessing_of(PREPROCESSING)
    assert found is not None
    return found


def normalized(pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (MEAN, STD))
    found: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
    return found


@pytest.mark.parametrize(
    "images",
    [PIXELS, torch.from_numpy(PIXELS), PIXELS.transpose(0, 2, 3, 1)],
    ids=["array", "tensor", "channels last"],
)
def test_bytes_are_normalized_by_the_preprocessing(images: Any) -> None:
    found = input_images(images, described())
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, normalized(PIXELS), rtol=1e-6)


def test_floats_are_normalized_already() -> None:
    floats = normalized(PIXELS)
    tensor = torch.from_numpy(floats)
    for images in (floats, floats.astype(np.float64), tensor, tensor.requires_grad_()):
        found = input_images(images, described())
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, floats, rtol=1e-6)
    half = input_images(tensor.bfloat16(), None)
    assert half is not None
    np.testing.assert_allclose(half, floats, rtol=1e-2)


@pytest.mark.parametrize("kind", ["uint8", "int8", "int64", "bool", "complex64"])
def test_other_numbers_are_refused_with_what_to_do(kind: str, tmp_path: Path) -> None:
    images = PIXELS.astype(kind)
    with pytest.raises(InputError, match=rf"images: {kind} numbers.*pixels / 255 - mean"):
        export(tiny_vit(), tmp_path / "out", images=images)
    if kind != "uint8":
        with pytest.raises(InputError, match=f"images: {kind} numbers"):
            export(tiny_vit(), tmp_path / "out", images=images, preprocessing=PREPROCESSING)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(4, 3, 16), (4, 2, 16, 16), (3, 16, 16)])
def test_bytes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"images: shape .* where \(count, 3, height, width\)"):
        input_images(np.zeros(shape, dtype=np.uint8), described())


def test_a_list_of_images_is_refused() -> None:
    with pytest.raises(InputError, match="images: a list where an array or a tensor"):
        input_images([PIXELS], None)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "model: None where"),
        ("vit_tiny", "model: the text 'vit_tiny'"),
        ({"head.weight": torch.zeros(2, 2)}, "model: a table of tensors"),
    ],
)
def test_what_is_no_module_is_refused(given: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        export(given, tmp_path / "out")


class Classifier(nn.Module):
    """A module that `lift` does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.flatten(1))
        return out


@pytest.mark.parametrize("kind", ["timm", "lifted", "other"])
def test_broken_weights_are_refused_by_path(kind: str, tmp_path: Path) -> None:
    models: dict[str, Callable[[], nn.Module]] = {
        "timm": tiny_vit,
        "lifted": lambda: lift(tiny_vit()),
        "other": Classifier,
    }
    path = {"timm": "blocks.0.attn.proj", "lifted": "steps.0.0.core.out", "other": "linear"}[kind]
    model = models[kind]()
    with torch.no_grad():
        model.get_parameter(f"{path}.weight")[1] = float("nan")
    with pytest.raises(InputError, match=rf"{path}\.weight: it contains NaN"):
        export(model, tmp_path / "out")


def test_whole_number_weights_of_a_known_model_are_refused(tmp_path: Path) -> None:
    model: Any = tiny_vit()
    layer = model.blocks[0].attn.proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.proj\.weight: numbers of type int8"):
        export(model, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:the model is in")
@pytest.mark.parametrize("kind", ["timm", "lifted", "loaded", "other"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_exported_in_float32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: nn.Module = Classifier() if kind == "other" else tiny_vit()
    if kind in ("lifted", "loaded"):
        model = lift(model)
    model = model.to(dtype).eval()
    if kind == "loaded":
        model = load(save(model, tmp_path / "saved"))
    made = export(model, tmp_path / "out", image=(3, 16, 16))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    images = normalized(PIXELS[:1])
    with torch.no_grad():
        wanted = model.float()(torch.from_numpy(images)).numpy()
    assert np.abs(_logits(made, images) - wanted).max() < 1e-4 * np.abs(wanted).max()


def _logits(artifact: Artifact, images: np.ndarray) -> np.ndarray:
    found: np.ndarray = open_session(artifact).run(None, {"images": images})[0]
    return found
