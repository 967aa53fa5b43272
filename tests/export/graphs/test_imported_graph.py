"""Export of an .onnx file from another exporter: verified against the file, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app
from vitrim.core.errors import InputError
from vitrim.export import ParityError, open_session
from vitrim.export.artifact import Artifact
from vitrim.export.graphs import imported_graph
from vitrim.export.graphs.imported_graph import export_graph
from vitrim.export.graphs.torch_graph import torch_to_onnx
from vitrim.export.passes import Step

IMAGES = np.random.default_rng(5).standard_normal((6, 3, 16, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch's graph with a free batch, and other names of input and output."""
    graph = torch_to_onnx(tiny_vit(), (3, 16, 16), batch="dynamic", opset=20)
    for node in graph.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    graph.graph.input[0].name, graph.graph.output[0].name = "pixels", "scores"
    path = tmp_path_factory.mktemp("given") / "classifier.onnx"
    onnx.save(graph, str(path))
    return path


def logits(artifact: Artifact) -> np.ndarray:
    session = open_session(artifact)
    return np.concatenate([session.run(None, {"pixels": image[None]})[0] for image in IMAGES])


def test_an_imported_graph_becomes_an_artifact_with_equal_outputs(
    file: Path, tmp_path: Path
) -> None:
    made = export_graph(
        file, tmp_path / "out", images=IMAGES, labels=[str(number) for number in range(5)]
    )
    with torch.no_grad():
        expected = tiny_vit()(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(logits(made), expected, atol=2e-5 * np.abs(expected).max())
    manifest = made.manifest
    names = [stage.stage for stage in manifest.parity]
    assert names[0] == "optimised by the runtime"
    assert {"pass split-qkv", "pass first-tokens", "simplified"} <= set(names)
    assert {stage.reference for stage in manifest.parity} == {"given"}
    assert (manifest.inputs[0].name, manifest.outputs[0].name, manifest.batch) == (
        "pixels",
        "scores",
        1,
    )
    assert (manifest.form, manifest.name, manifest.provenance.source) == (
        "passes",
        "classifier",
        "onnx graph by pytorch",
    )
    assert any(note.startswith("pass split-qkv: ") for note in manifest.notes)


def test_an_imported_graph_exports_in_eight_bits_and_with_a_dynamic_batch(
    file: Path, tmp_path: Path
) -> None:
    whole = export_graph(file, tmp_path / "fp32", images=IMAGES, form="given")
    small = export_graph(file, tmp_path / "int8", images=IMAGES, precision="int8")
    assert small.bytes < 0.7 * whole.bytes
    assert small.manifest.parity[-1].stage == "int8"
    assert whole.manifest.form == "given"
    free = export_graph(file, tmp_path / "free", images=IMAGES, batch="dynamic")
    np.testing.assert_allclose(
        open_session(free).run(None, {"pixels": IMAGES})[0], logits(whole), atol=1e-4
    )


def test_the_command_takes_a_file(file: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["export", str(file), "--out", str(tmp_path / "out"), "--tune"])
    assert ran.exit_code == 0, ran.output
    assert "pass split-qkv against given" in ran.output
    assert "tuned here: " in ran.output
    assert Artifact.load(tmp_path / "out").manifest.form in ("passes", "given")
    ran = CliRunner().invoke(
        app, ["export", str(file), "--out", str(tmp_path / "other"), "--runtime", "tvm"]
    )
    assert "is exported for onnxruntime and keeps its opset" in f"{ran.output}{ran.exception}"


def test_a_pass_that_changes_outputs_is_refused_with_its_first_different_node(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: onnx.ModelProto) -> list[Step]:
        wrong = onnx.ModelProto()
        wrong.CopyFrom(graph)
        gelu = next(node for node in wrong.graph.node if node.op_type == "Gelu")
        gelu.op_type = "Relu"
        del gelu.attribute[:]
        return [Step("careless", graph, wrong, 1)]

    monkeypatch.setattr(imported_graph, "steps", broken)
    with pytest.raises(
        ParityError,
        match=r"stage pass careless: outputs differ from given by .* "
        r"first difference: node '.*' \(Relu\), by ",
    ):
        export_graph(file, tmp_path / "out", images=IMAGES)
    assert not (tmp_path / "out").exists()


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, list[int | str]]],
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((256, 4), np.float32), "w")
    return helper.make_model(
        helper.make_graph(
            nodes,
            "sample",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


FLAT = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (graph_of(FLAT, [("x", ["b", 1, 16, 16]), ("z", [1])]), {}, "has 2 inputs and 1 outputs"),
        (graph_of(FLAT, [("x", ["b", 1, "h", "w"])]), {}, r"input 'x' is \(\?, 1, \?, \?\)"),
        (graph_of(FLAT, [("x", ["b", 256])]), {}, r"input 'x' is \(\?, 256\)"),
        (
            graph_of(FLAT, [("x", [2, 1, 16, 16])]),
            {"batch": 3},
            "holds batches of 2, and batch 3 was requested",
        ),
        (
            graph_of(FLAT, [("x", [1, 1, 16, 16])]),
            {"form": "matrix"},
            "is exported as 'given' or 'passes'",
        ),
        (
            graph_of(FLAT, [("x", [1, 1, 16, 16])]),
            {"precision": "int8-static", "images": IMAGES[:, :1], "calibration": "guess"},
            "calibration 'guess' is unknown",
        ),
    ],
    ids=["two inputs", "free size", "no image", "other batch", "graph form", "calibration"],
)
def test_graphs_that_are_no_image_classifier_are_refused(
    tmp_path: Path, model: onnx.ModelProto, options: dict[str, object], reason: str
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    with pytest.raises(InputError, match=reason) as caught:
        export_graph(path, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_invalid_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InputError, match="no such file"):
        export_graph(path, tmp_path / "out")
    path.write_bytes(b"\x08\x0a not a model")
    with pytest.raises(InputError, match="not a valid ONNX model") as caught:
        export_graph(path, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../secret.bin", "link.bin"])
def test_weights_outside_of_the_files_folder_are_not_read(tmp_path: Path, place: str) -> None:
    (tmp_path / "secret.bin").write_bytes(np.ones((256, 4), np.float32).tobytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    os.symlink("../secret.bin", inside / "link.bin")
    model = graph_of(FLAT, [("x", [1, 1, 16, 16])])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not a valid ONNX model"):
        export_graph(inside / "model.onnx", tmp_path / "out")
