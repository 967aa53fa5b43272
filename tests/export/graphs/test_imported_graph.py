"""Export of an .onnx file from another exporter: verified against the file, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import FLATTEN, HIDDEN, PRODUCT, channels_last, classifier, tensor, value, written
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app, call
from vitrim.core.errors import InputError
from vitrim.export import ParityError, export, open_session
from vitrim.export.artifact import Artifact
from vitrim.export.graphs import imported_graph
from vitrim.export.graphs.imported_graph import export_graph
from vitrim.export.graphs.torch_graph import torch_to_onnx
from vitrim.export.passes import Step
from vitrim.export.quantization.quantize import half, int8_dynamic, weights_only

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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch": 3}, "holds batches of 2, and batch 3 was requested; leave the batch out"),
        ({"batch": "dynamic"}, "holds batches of 2, and batch dynamic was requested"),
        ({"form": "matrix"}, "is exported as 'given' or 'passes'"),
        (
            {"precision": "int8-static", "images": IMAGES, "calibration": "guess"},
            "calibration 'guess' is unknown",
        ),
        ({"precision": "int9"}, "precision 'int9' is unknown"),
        ({"images": IMAGES[:, :, :8]}, r"images: shape \(6, 3, 8, 16\) does not fit"),
    ],
    ids=["batch", "free batch", "form", "calibration", "precision", "images"],
)
def test_options_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = written(classifier(entry=value("x", 2, 3, 16, 16)), tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        export_graph(path, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- channels last -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def last_file(file: Path) -> Path:
    """The file with an input of (batch, height, width, channels)."""
    return written(channels_last(onnx.load(str(file))), file.parent, "last.onnx")


@pytest.mark.parametrize(
    "options",
    [{}, {"batch": "dynamic"}, {"precision": "int8-static"}, {"form": "given", "tune": True}],
    ids=["fp32", "dynamic", "static", "given"],
)
def test_a_channels_last_file_keeps_its_layout_and_is_verified_on_images_in_that_order(
    last_file: Path, file: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    made = export_graph(last_file, tmp_path / "last", images=IMAGES, **options)
    entry = made.manifest.inputs[0]
    assert (entry.layout, entry.shape[1:]) == ("NHWC", (16, 16, 3))
    assert any("channels last" in note for note in made.manifest.notes)
    expected = logits(export_graph(file, tmp_path / "first", images=IMAGES))
    session = open_session(made)
    found = np.concatenate(
        [session.run(None, {"pixels": image.transpose(1, 2, 0)[None]})[0] for image in IMAGES]
    )
    tolerance = 0.1 if "precision" in options else 1e-4
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_a_channels_last_manifest_states_preprocessing_of_that_size(
    last_file: Path, tmp_path: Path
) -> None:
    spec = {"channels": 3, "height": 16, "width": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    made = export_graph(last_file, tmp_path / "out", preprocessing=spec)
    assert made.manifest.preprocessing is not None
    grey = {**spec, "channels": 1, "mean": [0.5], "std": [0.25]}
    one = made.manifest.to_dict() | {"preprocessing": grey}
    with pytest.raises(ValueError, match=r"preprocessing makes \(16, 16, 1\)"):
        type(made.manifest).model_validate(one)


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4-weights", "fp16"])
def test_a_file_that_is_quantized_already_is_recorded_so_and_not_rewritten(
    tmp_path: Path, kind: str
) -> None:
    model = {"int8": int8_dynamic, "int4-weights": four_bits, "fp16": half}[kind](classifier())
    path = written(model, tmp_path)
    made = export_graph(path, tmp_path / "out", target="x86-64-v3", images=IMAGES)
    manifest = made.manifest
    assert (manifest.precision, manifest.form) == (kind, "given")
    assert any("was not rewritten" in note for note in manifest.notes)
    assert [stage.stage for stage in manifest.parity] == ["optimised by the runtime"]
    kept = onnx.load(str(made.model_path)).graph.initializer
    assert [entry.raw_data for entry in kept] == [
        entry.raw_data for entry in model.graph.initializer
    ]
    for options, reason in (
        ({"precision": "int4-weights"}, f"is {kind} already .* int4-weights was requested"),
        ({"precision": "fp32"}, f"is {kind} already .* fp32 was requested; leave the precision"),
        ({"form": "passes"}, f"form 'passes' rewrites float32 graphs, and this one is {kind}"),
    ):
        with pytest.raises(InputError, match=reason):
            export_graph(path, tmp_path / "again", **options)  # type: ignore[arg-type]


def four_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    return weights_only(model, 4)


def test_weights_in_a_format_without_a_name_are_refused(tmp_path: Path) -> None:
    entry, result = (
        value(name, "n", *sizes, kind=TensorProto.DOUBLE)
        for name, sizes in (("x", (3, 16, 16)), ("y", (4,)))
    )
    weights = [tensor("w", 768, 4, dtype=np.float64)]
    path = written(classifier(entry=entry, result=result, weights=weights), tmp_path)
    with pytest.raises(InputError, match="100 % of its weights are float64, which is none of fp32"):
        export_graph(path, tmp_path / "out")


def test_half_precision_at_both_ends_becomes_float32_and_stays_half_inside(
    tmp_path: Path,
) -> None:
    ends = {
        "entry": value("x", "n", 3, 16, 16, kind=TensorProto.FLOAT16),
        "result": value("y", "n", 4, kind=TensorProto.FLOAT16),
    }
    weights = [tensor("w", 768, 4, dtype=np.float16)]
    # In the order in which a converter leaves it.
    path = written(classifier([PRODUCT, FLATTEN], weights=weights, **ends), tmp_path)
    manifest = export_graph(path, tmp_path / "out").manifest
    assert (manifest.precision, manifest.inputs[0].type) == ("fp16", "float32")
    assert "x was float16 and is float32; y was float16 and is float32" in manifest.notes


CONVOLUTION = [
    helper.make_node("Conv", ["x", "k"], ["c"], "conv"),
    helper.make_node("GlobalAveragePool", ["c"], ["p"]),
    helper.make_node("Flatten", ["p"], ["y"]),
]


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4-weights"])
def test_a_precision_that_changes_no_weight_is_refused(tmp_path: Path, precision: Any) -> None:
    path = written(classifier(CONVOLUTION, weights=[tensor("k", 4, 3, 3, 3)]), tmp_path)
    with pytest.raises(InputError, match=f"precision '{precision}' changes no weight"):
        export_graph(path, tmp_path / "graph", precision=precision)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    with pytest.raises(InputError, match=f"precision '{precision}' changes no weight"):
        export(module, tmp_path / "module", precision=precision, image=(3, 16, 16))


def test_what_the_quantizer_raises_is_one_line_with_the_file(tmp_path: Path) -> None:
    sparse = onnx.SparseTensorProto(dims=[768, 4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([3, 9]), "places"))
    model = classifier(weights=[])
    model.graph.sparse_initializer.append(sparse)
    path = written(model, tmp_path)
    with pytest.raises(InputError, match=r"model.onnx: cannot be written in int8 \("):
        export_graph(path, tmp_path / "out", precision="int8")
    export_graph(path, tmp_path / "out")


# ---- what the runtime refuses --------------------------------------------------------------------


def same_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = "same"


def later_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = onnx.defs.onnx_opset_version() + 1


def custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))


def brain_floats(model: onnx.ModelProto) -> None:
    kind = TensorProto.BFLOAT16
    model.graph.node[-1].output[0] = "z"
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["z"], ["short"], to=kind),
            helper.make_node("Add", ["short", "short"], ["twice"], "twice"),
            helper.make_node("Cast", ["twice"], ["y"], to=TensorProto.FLOAT),
        ]
    )


def other_matrix(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(tensor("w", 700, 4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (same_names, r"two nodes with same node name \(same\)"),
        (later_opset, "Opset|opset|No Op registered"),
        (custom_operator, "acme:MatMul"),
        (brain_floats, r"Could not find an implementation for Add\(14\) node with name 'twice'"),
        (other_matrix, "Incompatible dimensions for matrix multiplication"),
    ],
)
def test_what_the_runtime_refuses_ends_with_its_reason_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, reason: str
) -> None:
    model = classifier()
    change(model)
    path = written(model, tmp_path)
    assert call(["export", str(path), "--out", str(tmp_path / "out")]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"vitrim: {path}: ")
    assert re.search(reason, line)
    assert "onnxruntime_src" not in line
    assert not (tmp_path / "out").exists()


# ---- batches -------------------------------------------------------------------------------------


def inner_batch(size: int) -> onnx.ModelProto:
    """A free batch, and a Reshape to a fixed one."""
    shape = numpy_helper.from_array(np.array([size, 4]), "shape")
    nodes = [FLATTEN, HIDDEN, helper.make_node("Reshape", ["z", "shape"], ["y"], "fixed")]
    return classifier(nodes, weights=[tensor("w", 768, 4), shape])


@pytest.mark.parametrize(("inside", "batch"), [(1, "dynamic"), (1, 4), (4, None), (4, "dynamic")])
def test_a_batch_that_is_free_in_name_only_is_refused_with_the_size_inside(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], inside: int, batch: Any
) -> None:
    path = written(inner_batch(inside), tmp_path)
    with pytest.raises(
        InputError,
        match=f"declares a free batch, but its inside is made for batches of {inside}, so .*"
        rf"export with batch {inside} \(--batch {inside}\)",
    ):
        export_graph(path, tmp_path / "out", batch=batch)
    # The runtime's own log would be a second message.
    assert capfd.readouterr().err == ""
    export_graph(path, tmp_path / "out", batch=inside)


def test_outputs_that_depend_on_the_rest_of_the_batch_are_refused(tmp_path: Path) -> None:
    axes = numpy_helper.from_array(np.array([0]), "axes")
    nodes = [
        FLATTEN,
        HIDDEN,
        helper.make_node("ReduceMean", ["z", "axes"], ["mean"]),
        helper.make_node("Sub", ["z", "mean"], ["y"]),
    ]
    path = written(classifier(nodes, weights=[tensor("w", 768, 4), axes]), tmp_path)
    for batch in ("dynamic", 4):
        with pytest.raises(InputError, match="depend on the other images of its batch"):
            export_graph(path, tmp_path / "out", batch=batch)


def test_a_file_of_four_images_keeps_its_batch_in_the_command_and_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(classifier(entry=value("x", 4, 3, 16, 16)), tmp_path, "Four.ONNX")
    assert export_graph(path, tmp_path / "python").manifest.batch == 4
    arguments = ["export", str(path), "--out", str(tmp_path / "command")]
    assert call([*arguments, "--batch", "1"]) == 2
    assert "holds batches of 4, and batch 1 was requested" in capsys.readouterr().err
    assert call(arguments) == 0
    manifest = Artifact.load(tmp_path / "command").manifest
    assert (manifest.batch, manifest.inputs[0].shape) == (4, (4, 3, 16, 16))
    assert (manifest.name, manifest.precision) == ("Four", "fp32")


def test_outputs_that_differ_between_two_runs_are_refused_with_the_first_node(
    tmp_path: Path,
) -> None:
    nodes = [
        FLATTEN,
        HIDDEN,
        helper.make_node("Not", ["off"], ["training"]),
        helper.make_node("Dropout", ["z", "", "training"], ["y"], "drop"),
    ]
    off = numpy_helper.from_array(np.array(False), "off")
    path = written(classifier(nodes, weights=[tensor("w", 768, 4), off]), tmp_path)
    with pytest.raises(
        InputError, match=r"two runs on the same images differ .* first at node 'drop' \(Dropout\)"
    ):
        export_graph(path, tmp_path / "out")


def test_outputs_that_are_not_finite_or_no_logits_are_refused_with_the_file(
    tmp_path: Path,
) -> None:
    log = helper.make_node("Log", ["z"], ["y"])
    path = written(classifier([FLATTEN, HIDDEN, log]), tmp_path)
    with pytest.raises(InputError, match=r"model.onnx: returns infinite or missing numbers"):
        export_graph(path, tmp_path / "out")
    axes = numpy_helper.from_array(np.array([1]), "axes")
    deeper = helper.make_node("Unsqueeze", ["z", "axes"], ["y"])
    model = classifier([FLATTEN, HIDDEN, deeper], weights=[tensor("w", 768, 4), axes])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    path = written(model, tmp_path)
    with pytest.raises(InputError, match=r"model.onnx: output 'y' is \(\?, 1, 4\); a classifier"):
        export_graph(path, tmp_path / "out")


def test_a_model_that_is_a_file_cannot_be_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(classifier(), tmp_path)
    assert call(["compact", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "an ONNX graph" in capsys.readouterr().err
