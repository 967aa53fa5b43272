"""Name, preprocessing and labels of an artifact: validated before the work of an export."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_samples import chain
from tiny_models import tiny_vit
from torch import nn
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.lift import lift
from vitrim.core.errors import InputError
from vitrim.export.exporter import export
from vitrim.export.graphs import imported_graph
from vitrim.export.graphs.imported_graph import export_graph
from vitrim.export.manifest import Manifest

CLASSES = ["ant", "bee", "cat", "dog", "fly"]
HALF = (0.5, 0.5, 0.5)
SPEC = {"channels": 3, "height": 16, "width": 16, "mean": HALF, "std": HALF}
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"labels": ["a", "b"]}, "labels: 2 for a model with 5 outputs"),
    ({"labels": []}, "labels: 0 for a model with 5 outputs"),
    ({"labels": [*CLASSES, "gnu"]}, "labels: 6 for a model with 5 outputs"),
    ({"labels": list(range(5))}, "labels: number 0 is 0; give each class a name, as a string"),
    ({"labels": ["a", "b", None, "d", "e"]}, "labels: number 2 is None"),
    ({"labels": ["a", "b", "  ", "d", "e"]}, "labels: number 2 is '  '"),
    ({"labels": ["a", "b", "c", "b", "e"]}, "labels: numbers 1 and 3 are both 'b'"),
    ({"labels": "abcde"}, "labels: a str; give a list of strings"),
    ({"labels": dict.fromkeys(CLASSES, 0)}, "labels: a dict; give a list of strings"),
    ({"labels": 5}, "labels: a int; give a list of strings"),
    ({"preprocessing": {**SPEC, "height": 64, "width": 64}}, "images of 3 x 64 x 64"),
    ({"preprocessing": {**SPEC, "channels": 1}}, "preprocessing: mean and std need 1 numbers"),
    (
        {"preprocessing": {**SPEC, "channels": 1, "mean": (0.5,), "std": (0.5,)}},
        "images of 1 x 16 x 16 (channels x height x width), but the model takes 3 x 16 x 16",
    ),
    ({"preprocessing": {**SPEC, "mean": (0.5,)}}, "mean and std need 3 numbers"),
    ({"preprocessing": {**SPEC, "std": (0.5, 0.0, 0.5)}}, "preprocessing: std: 1: "),
    ({"preprocessing": {**SPEC, "mean": (0.5, float("nan"), 0.5)}}, "preprocessing: mean: 1: "),
    ({"preprocessing": {**SPEC, "crop": 1}}, "preprocessing: crop: Extra inputs"),
    ({"preprocessing": {"mean": HALF}}, "preprocessing: channels: Field required"),
    ({"preprocessing": "imagenet"}, "preprocessing: a str; give a mapping with channels"),
    ({"preprocessing": [0.5]}, "preprocessing: a list; give a mapping with channels"),
    ({"name": ""}, "name: String should have at least 1 character"),
    ({"name": 5}, "name: Input should be a valid string"),
]


class Classifier(nn.Module):
    """A model that states neither its input size nor its number of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(images.flatten(1))
        return found


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / "made"
    return export(lift(tiny_vit()), folder, form="plain").model_path


@pytest.fixture(params=["compact model", "any module", "graph"])
def run_export(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: Path
) -> Callable[..., Any]:
    """An export whose work must not begin."""

    def began(*_: Any, **__: Any) -> None:
        pytest.fail("the work began")

    monkeypatch.setattr("vitrim.export.exporter._export", began)
    monkeypatch.setattr(imported_graph, "_export", began)
    monkeypatch.chdir(tmp_path)
    if request.param == "graph":
        return lambda **options: export_graph(graph, tmp_path / "out", **options)
    if request.param == "any module":
        module = Classifier().eval()
        return lambda **options: export(module, tmp_path / "out", image=(3, 16, 16), **options)
    model = lift(tiny_vit())
    return lambda **options: export(model, tmp_path / "out", **options)


@pytest.mark.parametrize(("options", "words"), UNFIT)
def test_what_does_not_fit_is_refused_before_the_work(
    run_export: Callable[..., Any], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as refused:
        run_export(**options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


def test_what_fits_is_in_the_manifest(tmp_path: Path) -> None:
    labels = tuple(map(np.str_, CLASSES))
    spec = Preprocessing(channels=3, height=16, width=16, mean=HALF, std=HALF)
    artifact = export(lift(tiny_vit()), tmp_path / "a", labels=labels, preprocessing=spec)
    assert artifact.manifest.labels == tuple(CLASSES)
    again = Manifest.model_validate(artifact.manifest.to_dict())
    assert again.preprocessing is not None
    assert again.preprocessing.mean == HALF


def test_a_graph_whose_file_states_no_number_of_outputs(tmp_path: Path) -> None:
    path = chain(tmp_path / "chain.onnx", batch="n")
    import onnx

    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    onnx.save(model, path)
    with pytest.raises(InputError, match="labels: 5 for a model with 10 outputs"):
        export_graph(path, tmp_path / "a", labels=CLASSES)
