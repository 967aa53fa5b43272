"""Every stage of an export stops at a broken graph and names the first node that differs.

Also the precisions besides int8.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import vitrim
from onnx import numpy_helper
from tiny_models import tiny_vit
from vitrim.core.errors import InputError
from vitrim.export import ParityError, export, open_session
from vitrim.export import onnxruntime_files as files_module
from vitrim.export.forms import Form, write_network
from vitrim.export.graphs import candidates as candidates_module
from vitrim.export.graphs import torch_graph as torch_graph_module
from vitrim.export.graphs.model_proto import open_graph
from vitrim.export.parity import model_outputs
from vitrim.export.quantization.quantize import int8_static

IMAGES = np.random.default_rng(6).standard_normal((16, 3, 16, 16), dtype=np.float32)


def damaged(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with other weights in the last wide product."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    products = [
        node
        for node in copy.graph.node
        if node.op_type in ("MatMul", "Gemm", "DynamicQuantizeMatMul")
    ]
    weights = {tensor.name: tensor for tensor in copy.graph.initializer}
    wide = [
        node
        for node in products
        if node.input[1] in weights and max(weights[node.input[1]].dims) >= 64
    ]
    tensor = weights[wide[-1].input[1]]
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value[::-1]), tensor.name))
    return copy


def breaks(
    module: Any, name: str, *, result: Callable[[Any], Any] = damaged
) -> Callable[[pytest.MonkeyPatch], None]:
    whole = getattr(module, name)

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            module, name, lambda *positional, **named: result(whole(*positional, **named))
        )

    return apply


STAGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], str]] = {
    "onnx": (
        breaks(torch_graph_module, "torch_to_onnx"),
        {"form": "plain"},
        r"stage onnx: outputs differ from torch by .* first difference: module ",
    ),
    "simplified": (
        breaks(torch_graph_module, "simplify", result=lambda pair: (damaged(pair[0]), None)),
        {"form": "plain"},
        r"stage simplified: outputs differ from torch by .* "
        r"first difference: node '.*' \(\w+\), by ",
    ),
    "form": (
        breaks(candidates_module, "write_network"),
        {"form": Form()},
        r"stage form matrix/.* outputs differ from torch by ",
    ),
    "int8": (
        breaks(files_module, "in_precision"),
        {"precision": "int8", "tolerances": {"int8": 0.05}},
        r"stage int8: outputs differ from torch by .* 5e-02 is allowed; first difference: ",
    ),
    "int8-static": (
        breaks(files_module, "in_precision"),
        {"precision": "int8-static", "tolerances": {"int8-static": 0.05}},
        r"stage int8-static: outputs differ from torch by ",
    ),
    "fp16": (
        breaks(files_module, "in_precision"),
        {"precision": "fp16", "target": "rpi5"},
        r"stage fp16: outputs differ from torch by .* 2e-02 is allowed",
    ),
    "ort file": (
        breaks(files_module, "ort_outputs", result=lambda logits: logits[:, ::-1].copy()),
        {"ort_format": True},
        "stage ort file: outputs differ from torch by ",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_stage_stops_the_export_and_leaves_no_files(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, options, message = STAGES[stage]
    apply(monkeypatch)
    with pytest.raises(ParityError, match=message) as caught:
        export(tiny_vit(), tmp_path / "out", images=IMAGES, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_runs_here_with_float32_input_and_output(tmp_path: Path) -> None:
    made = export(tiny_vit(), tmp_path / "out", images=IMAGES, precision="fp16", target="rpi5")
    graph = onnx.load(made.model_path)
    assert {
        value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)
    } == {onnx.TensorProto.FLOAT}
    weights = [tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    stage = next(stage for stage in made.manifest.parity if stage.stage == "fp16")
    assert 1e-6 < stage.max_relative_error < 1e-2
    assert stage.top1_agreement == 1.0
    logits = open_session(made).run(None, {"images": IMAGES[:1]})[0]
    assert logits.dtype == np.float32
    with pytest.raises(InputError, match="target 'x86-64-v3' does not compute in it"):
        export(tiny_vit(), tmp_path / "other", precision="fp16", target="x86-64-v3")


def test_all_calibrations_are_recorded_with_the_best(tmp_path: Path) -> None:
    made = export(
        tiny_vit(), tmp_path / "out", images=IMAGES, precision="int8-static", calibration="best"
    )
    tried = [note for note in made.manifest.notes if note.startswith("int8-static by ")]
    assert [
        note.split(" calibration")[0].removeprefix("int8-static by ") for note in tried[:3]
    ] == ["min-max", "percentile", "entropy"]
    assert all("same top-1 class on" in note for note in tried)
    # Parts that stay float were timed too, except those that the form writes as one operator.
    assert [note.split(" calibration, ")[1].split(" in eight bits")[0] for note in tried[3:]] == [
        "patch"
    ]
    assert "of the latency: " in tried[3]


def test_float_parts_of_a_form_are_timed_in_eight_bits_too(tmp_path: Path) -> None:
    form = Form(rows="batch", norm="layer", stem="matrix")
    made = export(
        tiny_vit(),
        tmp_path / "out",
        images=IMAGES,
        precision="int8-static",
        calibration="best",
        form=form,
    )
    tried = [note for note in made.manifest.notes if note.startswith("int8-static by ")]
    assert len(tried) == 6
    for note, part in zip(tried[3:], ("patch", "attention", "norm"), strict=True):
        assert f"{part} in eight bits too" in note
        assert "of the latency: " in note


@pytest.mark.parametrize(
    ("also", "kind"),
    [("patch", "MatMul"), ("attention", "Softmax"), ("norm", "LayerNormalization")],
)
def test_float_parts_are_quantized_on_request(also: str, kind: str) -> None:
    graph = write_network(
        vitrim.lift(tiny_vit()),
        Form(norm="layer", stem="matrix", last_keys=False),
        linears="product",
    )

    def quantized_inputs(model: onnx.ModelProto) -> int:
        quantized = {
            node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
        }
        return sum(node.op_type == kind and node.input[0] in quantized for node in model.graph.node)

    plain, more = int8_static(graph, IMAGES), int8_static(graph, IMAGES, also=(also,))  # type: ignore[arg-type]
    assert quantized_inputs(more) > quantized_inputs(plain)
    assert np.isfinite(model_outputs(more, IMAGES)).all()


def test_a_graph_too_large_for_a_message_is_loaded_through_a_file() -> None:
    graph = write_network(vitrim.lift(tiny_vit()), Form())
    feed = {"images": IMAGES[:1]}
    whole = open_graph(graph).run(None, feed)[0]
    np.testing.assert_array_equal(
        open_graph(graph, external_above_bytes=100).run(None, feed)[0], whole
    )


def test_an_opset_leaves_out_the_forms_that_need_more(tmp_path: Path) -> None:
    made = export(tiny_vit(), tmp_path / "out", images=IMAGES, opset=21)
    assert made.manifest.opset == 21
    assert made.manifest.form.startswith("matrix/split/")
    assert any("without the operators that opset 21 lacks" in note for note in made.manifest.notes)
    with pytest.raises(InputError, match="needs opset 23, and 21 was requested"):
        export(tiny_vit(), tmp_path / "other", opset=21, form=Form(attention="opset23"))
