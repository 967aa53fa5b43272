"""Export of a torch module to a verified artifact, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import vitrim
from torch import Tensor, nn
from vitrim.core.errors import InputError, UnsupportedModel
from vitrim.export import Artifact, ParityError, export, open_session, verify
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.graphs import candidates as candidates_module
from vitrim.export.graphs.model_facts import image_shape, weights_sha256
from vitrim.export.graphs.model_proto import save_model

PREPROCESSING = {"channels": 1, "height": 16, "width": 16, "mean": [0.3], "std": [0.4]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((12, 1, 16, 16), dtype=np.float32)


def logits_of(artifact: Artifact, images: np.ndarray) -> np.ndarray:
    session = open_session(artifact)
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])


@pytest.fixture(scope="module")
def made(
    model: nn.Module, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """One artifact for all tests that only read it: torch's exporter takes seconds."""
    return export(
        model,
        tmp_path_factory.mktemp("made") / "artifact",
        preprocessing=PREPROCESSING,
        labels=["a", "b", "c", "d"],
        images=images,
        provenance={"recipe": "test"},
        ort_format=True,
    )


def test_an_artifact_matches_the_model_and_describes_itself(
    model: nn.Module, made: Artifact, images: np.ndarray
) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(
        logits_of(made, images), expected, atol=1e-5 * np.abs(expected).max()
    )
    manifest = made.manifest
    assert [stage.stage for stage in manifest.parity] == [
        f"form {FORMS[0].name}",
        "ort file",
    ]
    assert all(
        stage.max_relative_error < 1e-5 and stage.top1_agreement == 1 for stage in manifest.parity
    )
    assert all(stage.input_kind == "images" and stage.images == 12 for stage in manifest.parity)
    assert manifest.form == FORMS[0].name
    assert manifest.inputs[0].shape == (1, 1, 16, 16)
    assert manifest.outputs[0].shape == (1, 4)
    assert manifest.provenance.weights_sha256 == weights_sha256(model)
    assert manifest.provenance.details == {"recipe": "test"}
    assert manifest.provenance.parameters == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert manifest.preprocessing is not None
    assert manifest.preprocessing.mean == (0.3,)
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert "file" in verify(made.folder)
    # The operators of a reduced runtime build contain no path of this machine.
    operators = (made.folder / "required_operators.config").read_text()
    assert "Gemm" in operators
    assert str(made.folder.parent) not in operators
    assert json.loads((made.folder / "manifest.json").read_text())["schema"] == "vitrim.manifest/1"


def test_a_flipped_weight_byte_is_detected(made: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    path = copy / made.model_path.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx: its SHA-256"):
        Artifact.load(copy)


def test_a_pruned_model_exports_in_eight_bits_smaller_with_close_outputs(
    model: nn.Module, images: np.ndarray, tmp_path: Path
) -> None:
    cut = vitrim.compact(model, vitrim.StructuredMask.random(model, keep_ratio=0.5)).eval()
    small = export(cut, tmp_path / "int8", precision="int8", images=images)
    big = write_network(cut, FORMS[0]).ByteSize()
    assert small.manifest.parity[-1].stage == "int8"
    assert 1e-5 < small.manifest.parity[-1].max_relative_error < 0.1
    assert small.bytes < 0.8 * big
    assert {node.op_type for node in onnx.load(small.model_path).graph.node} >= {
        "DynamicQuantizeMatMul"
    }


def test_a_dynamic_batch_takes_any_number(
    model: nn.Module, images: np.ndarray, tmp_path: Path
) -> None:
    made = export(model, tmp_path / "artifact", batch="dynamic", images=images)
    assert made.manifest.inputs[0].shape == ("batch", 1, 16, 16)
    session = open_session(made)
    whole = session.run(None, {"images": images})[0]
    np.testing.assert_allclose(session.run(None, {"images": images[:5]})[0], whole[:5], atol=1e-5)


class Convolutional(nn.Module):
    """A network that is no Vision Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.head(torch.nn.functional.gelu(self.conv(images)).mean((2, 3)))
        return hidden


def test_an_unknown_module_is_shipped_as_torch_exports_it(tmp_path: Path) -> None:
    learner = Convolutional().train()
    made = export(learner, tmp_path / "artifact", image=(1, 16, 16), precision="int8")
    # Noise is recorded as such, and the module's mode is restored.
    assert {(stage.input_kind, stage.seed) for stage in made.manifest.parity} == {
        ("seeded-noise", 0)
    }
    assert learner.training
    assert made.manifest.form == "plain"
    assert any("do not cover it" in note for note in made.manifest.notes)
    with pytest.raises(UnsupportedModel, match="form='plain'"):
        export(Convolutional(), tmp_path / "other", image=(1, 16, 16), form=FORMS[0])
    assert not (tmp_path / "other").exists()


def test_a_form_with_other_outputs_is_refused_with_its_first_different_node(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(compact: nn.Module, form: Form, **options: object) -> onnx.ModelProto:
        graph = write_network(compact, form, **options)  # type: ignore[arg-type]
        if form == FORMS[1]:
            for tensor in graph.graph.initializer:
                if tensor.name == "blocks.1.ffn.fc1.bias":
                    tensor.CopyFrom(
                        onnx.numpy_helper.from_array(
                            onnx.numpy_helper.to_array(tensor) + 0.5, tensor.name
                        )
                    )
        return graph

    monkeypatch.setattr(candidates_module, "write_network", broken)
    with pytest.raises(ParityError) as caught:
        export(model, tmp_path / "artifact", form=FORMS[1])
    message = str(caught.value)
    assert message.startswith(f"stage form {FORMS[1].name}: outputs differ from torch by ")
    assert "first difference: node 'blocks.1.ffn.act' (Gelu), by " in message
    assert not (tmp_path / "artifact").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"runtime": "tensorrt"}, "runtime 'tensorrt' is unknown"),
        ({"precision": "int3"}, "precision 'int3' is unknown; use one of fp32"),
        (
            {"precision": "fp16", "target": "x86-64-v3"},
            "target 'x86-64-v3' does not compute in it",
        ),
        ({"target": "mars"}, "target 'mars': no such profile; known are coral-dev-board, "),
        ({"target": "RPI4"}, "target 'RPI4': no such profile; did you mean 'rpi4'?"),
        (
            {"target": "x86_64-avx2", "precision": "int8"},
            "target 'x86_64-avx2': no such profile; did you mean 'x86-64-v3'?",
        ),
        ({"target": "./missing.toml"}, "missing.toml: cannot be read"),
        ({"options": {"foo": "bar"}}, "runtime onnxruntime: no option 'foo'; it has none"),
        ({"precision": "int8-static"}, "int8-static finds its ranges on images"),
        ({"batch": 0}, "batch 0: give a whole number above 0"),
        ({"batch": "many"}, "batch 'many'"),
        (
            {"target": "rpi4", "tune": True},
            "tune measures on this machine, and the target is 'rpi4'",
        ),
        ({"opset": 17}, "opset 17: the export needs at least 20"),
        ({"opset": 999}, "; lower it, leave it out, or update onnx"),
        (
            {"images": np.zeros((2, 3, 16, 16), np.float32)},
            "does not fit the model's (count, 1, 16, 16)",
        ),
        ({"images": np.full((2, 1, 16, 16), np.nan, np.float32)}, "infinite or missing"),
        ({"form": "fastest"}, "form 'fastest' is unknown"),
        ({"preprocessing": {"channels": 1}}, "preprocessing: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_options_are_refused_in_one_line_and_leave_no_files(
    model: nn.Module, tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        export(model, tmp_path / "artifact", **options)  # type: ignore[arg-type]
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_unchanged(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        export(model, tmp_path / "artifact")
    assert (tmp_path / "artifact" / "mine.txt").read_text() == "keep"


def test_broken_weights_are_refused_before_any_export(tmp_path: Path) -> None:
    broken = Convolutional()
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"head\.bias: it contains NaN"):
        export(broken, tmp_path / "artifact", image=(1, 16, 16))


def test_the_image_size_comes_from_the_model_or_the_caller(model: nn.Module) -> None:
    assert image_shape(model) == (1, 16, 16)
    assert image_shape(vitrim.lift(model)) == (1, 16, 16)
    assert image_shape(Convolutional(), (1, 9, 9)) == (1, 9, 9)
    with pytest.raises(InputError, match="does not state its image size"):
        image_shape(Convolutional())


def test_large_weights_are_stored_in_a_separate_file(model: nn.Module, tmp_path: Path) -> None:
    graph = write_network(vitrim.lift(model), FORMS[0])
    entries = save_model(graph, tmp_path, external_above_bytes=1000)
    assert [(entry.path, entry.role) for entry in entries] == [
        ("model.onnx", "model"),
        ("model.onnx.data", "weights"),
    ]
    image = np.ones((1, 1, 16, 16), np.float32)
    feed = {"images": image}
    separate = open_session(tmp_path / "model.onnx").run(None, feed)[0]
    single = open_session(graph.SerializeToString()).run(None, feed)[0]
    np.testing.assert_array_equal(separate, single)
