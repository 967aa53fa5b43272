"""Static eight bits: as the runtime's own products, or as pairs where the target needs them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import vitrim
from onnx import TensorProto, helper, numpy_helper
from processors import HOST_BITS
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export import capabilities
from vitrim.export.exporter import export
from vitrim.export.forms import FORMS, INT8_FORMS, Form, form_named, write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.graphs.model_proto import open_graph
from vitrim.export.parity import model_outputs, relative_error
from vitrim.export.quantization.quantize import int8_static
from vitrim.export.quantization.static_kernels import eight_bit_products
from vitrim.export.sessions import config_for, open_session

IMAGES = np.random.default_rng(0).standard_normal((16, 1, 16, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def model() -> CompactModel:
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
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vitrim.lift(made)


def operators(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


def error_of(model: CompactModel, graph: onnx.ModelProto) -> float:
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    return float(relative_error(expected, model_outputs(graph, IMAGES)).max())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_product_of_every_form_becomes_the_runtimes_own(
    model: CompactModel, form: Form
) -> None:
    whole = write_network(model, form, linears="product")
    graph, count = eight_bit_products(int8_static(whole, IMAGES, weight_bits=HOST_BITS))
    found = operators(graph)
    matrices = {tensor.name for tensor in whole.graph.initializer if len(tensor.dims) == 2}
    # q, k, v (or one product for the three), out, fc1 and fc2 of each block, and the head; the
    # patches stay float.
    products = sum(
        node.op_type == "MatMul" and node.input[1] in matrices and node.name != "stem"
        for node in whole.graph.node
    )
    assert products == (11 if form.attention == "fused-qkv" else 13)
    assert count == found["MatMulIntegerToFloat"] == products
    assert found["DequantizeLinear"] == 0
    # The three products that read one norm share its quantized output.
    assert found["QuantizeLinear"] <= 10
    assert 1e-5 < error_of(model, graph) < 0.3


def one_product(
    kind: str, *, columns: bool, transposed: bool, bias: str, signed: bool = False
) -> onnx.ModelProto:
    """images (1, 1, 16, 16) -> rows -> eight bits -> a product -> logits (16, 6)."""
    rng = np.random.default_rng(3)
    largest = 2 ** (HOST_BITS - 1) - 1
    weight = rng.integers(-largest, largest + 1, (6, 16) if transposed else (16, 6)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, 6 if columns else ()).astype(np.float32)
    zero, sums = (
        (np.int8(3) if signed else np.uint8(120)),
        rng.standard_normal(6).astype(np.float32),
    )
    stored = rng.integers(-900, 900, 6).astype(np.int32)
    constants = {
        "shape": np.array([16, 16]),
        "x.scale": np.float32(0.03),
        "x.zero": zero,
        "w": weight,
        "w.scale": scale,
        "w.zero": np.zeros(scale.shape, np.int8),
        "bias": sums,
        "bias.stored": stored,
        "bias.scale": (scale * np.float32(0.03)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["rows"], name="rows"),
        helper.make_node(
            "QuantizeLinear", ["rows", "x.scale", "x.zero"], ["rows.q"], name="rows.q"
        ),
        helper.make_node(
            "DequantizeLinear", ["rows.q", "x.scale", "x.zero"], ["rows.f"], name="rows.f"
        ),
        helper.make_node(
            "DequantizeLinear",
            ["w", "w.scale", "w.zero"],
            ["w.f"],
            name="w.f",
            axis=0 if transposed else 1,
        ),
    ]
    if bias == "stored":
        nodes.append(
            helper.make_node(
                "DequantizeLinear", ["bias.stored", "bias.scale"], ["bias.f"], name="bias.f", axis=0
            )
        )
    shift = {"none": [], "float": ["bias"], "stored": ["bias.f"]}[bias]
    if kind == "Gemm":
        nodes.append(
            helper.make_node(
                "Gemm",
                ["rows.f", "w.f", *shift],
                ["logits"],
                name="product",
                transB=int(transposed),
            )
        )
    else:
        nodes.append(
            helper.make_node(
                "MatMul", ["rows.f", "w.f"], ["sum" if shift else "logits"], name="product"
            )
        )
        if shift:
            nodes.append(helper.make_node("Add", ["sum", *shift], ["logits"], name="sum"))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 1, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [16, 6])],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
            if name in used
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bias", ["none", "float", "stored"])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    ("kind", "transposed"), [("MatMul", False), ("Gemm", False), ("Gemm", True)]
)
def test_a_fused_product_returns_the_numbers_of_its_pairs(
    kind: str, transposed: bool, columns: bool, bias: str, signed: bool
) -> None:
    pairs = one_product(kind, columns=columns, transposed=transposed, bias=bias, signed=signed)
    graph, count = eight_bit_products(pairs)
    assert count == 1
    assert operators(graph) == {"Reshape": 1, "QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    onnx.checker.check_model(graph)
    feed = {"images": IMAGES[:1]}
    exact = open_graph(pairs, optimised=False).run(None, feed)[0]
    np.testing.assert_allclose(open_graph(graph).run(None, feed)[0], exact, rtol=1e-5, atol=1e-5)


def test_pairs_that_cannot_be_fused_stay() -> None:
    wrong = one_product("MatMul", columns=False, transposed=False, bias="none")
    # A matrix that is quantized by rows has no scale for each column.
    for tensor, value in (
        ("w.scale", np.full(16, 0.01, np.float32)),
        ("w.zero", np.zeros(16, np.int8)),
    ):
        next(entry for entry in wrong.graph.initializer if entry.name == tensor).CopyFrom(
            numpy_helper.from_array(value, tensor)
        )
    next(node for node in wrong.graph.node if node.name == "w.f").attribute[0].i = 0
    scaled = one_product("Gemm", columns=True, transposed=False, bias="float")
    scaled.graph.node[-1].attribute.append(helper.make_attribute("alpha", 0.5))
    for graph in (wrong, scaled):
        found, count = eight_bit_products(graph)
        assert count == 0
        assert found is graph


def test_the_target_decides_whether_eight_bits_are_pairs(
    model: CompactModel, tmp_path: Path
) -> None:
    assert capabilities.needs_qdq_pairs("cuda")
    assert not capabilities.needs_qdq_pairs("x86-64-v4-vnni")
    assert not capabilities.needs_qdq_pairs("rpi5")
    best, why = best_form("cuda", 1, precision="int8-static")
    assert best.qdq
    assert not best.runtime_operators
    assert "TensorRT" in why
    made = export(model, tmp_path / "gpu", images=IMAGES, precision="int8-static", target="cuda")
    assert made.manifest.form == best.name
    graph = onnx.load(made.model_path)
    found = operators(graph)
    assert found["MatMulIntegerToFloat"] == 0
    assert found["DequantizeLinear"] > 13
    # TensorRT refuses zero points and biases of 32 bits.
    zeros = {
        node.input[2]
        for node in graph.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    assert {constants[name].data_type for name in zeros} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(constants[name]).any() for name in zeros)
    made = export(model, tmp_path / "cpu", images=IMAGES, precision="int8-static")
    assert made.manifest.form == best_form("host", 1, precision="int8-static")[0].name
    assert operators(onnx.load(made.model_path))["MatMulIntegerToFloat"] == 13


def test_pairs_are_a_form_that_can_be_requested(model: CompactModel, tmp_path: Path) -> None:
    form = replace(Form(norm="layer"), qdq=True)
    assert form.name.endswith("/qdq")
    assert form_named(form.name) == form
    made = export(model, tmp_path / "out", images=IMAGES, precision="int8-static", form=form.name)
    assert made.manifest.form == form.name
    assert operators(onnx.load(made.model_path))["DequantizeLinear"] > 13


@pytest.mark.parametrize("form", INT8_FORMS, ids=lambda form: form.name)
def test_patches_are_quantized_where_the_form_states_it(model: CompactModel, form: Form) -> None:
    assert form_named(form.name) == form
    assert error_of(model, write_network(model, form)) < 1e-4
    dynamic = write_network(model, form, linears="int8", weight_bits=HOST_BITS)
    assert operators(dynamic)["DynamicQuantizeMatMul"] == (14 if form.stem == "int8" else 13)
    assert 1e-5 < error_of(model, dynamic) < 0.1


def test_patches_of_a_static_form_follow_it(model: CompactModel, tmp_path: Path) -> None:
    made = export(
        model, tmp_path / "out", images=IMAGES, precision="int8-static", form=INT8_FORMS[0]
    )
    found = operators(onnx.load(made.model_path))
    assert found["MatMulIntegerToFloat"] == 14
    assert found["MatMul"] == 0
    best = export(
        model,
        tmp_path / "best",
        images=IMAGES,
        precision="int8-static",
        form=INT8_FORMS[0],
        calibration="best",
    )
    tried = [note for note in best.manifest.notes if note.startswith("int8-static by ")]
    assert len(tried) == 3
    assert all("patch in eight bits too: " in note for note in tried)


def test_a_stem_of_convolutions_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Overlapping patches cannot be cut out by a Reshape.
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=1,
        num_heads=2,
        num_classes=4,
    ).eval()
    network.get_submodule("patch_embed").proj = torch.nn.Conv2d(1, 32, 4, stride=4)
    compact = vitrim.lift(network)
    architecture = compact.architecture
    overlapping = architecture.model_copy(
        update={
            "stem": architecture.stem.model_copy(
                update={"patch": (6, 6), "stride": (4, 4), "padding": (1, 1)}
            )
        }
    )
    made = export(
        CompactModel(overlapping).eval(),
        tmp_path / "out",
        images=IMAGES,
        precision="int8-static",
        form=INT8_FORMS[0],
    )
    graph = onnx.load(made.model_path)
    assert operators(graph)["DequantizeLinear"] == 0
    assert next(node for node in graph.graph.node if node.op_type == "Conv").input[0] == "images"


def test_the_known_form_follows_precision_and_threads() -> None:
    large, why = best_form("x86-64-v4-vnni", 1, 197, precision="int8")
    assert large == best_form("x86-64-v4-vnni", 1, 197, precision="int8-static")[0] == INT8_FORMS[0]
    assert "patches in eight bits too" in why
    assert best_form("x86-64-v4-vnni", 1, 50, precision="int8")[0] == INT8_FORMS[1]
    assert best_form("x86-64-v4-vnni", 1, 197, precision="int8", threads=2)[0] == INT8_FORMS[2]
    assert best_form("x86-64-v4-vnni", 1, 197)[0].rows == "matrix"
    assert best_form("rpi5", "dynamic", 197, precision="int8")[0].stem == "matrix"


def test_an_artifact_for_several_threads_records_how_they_wait(
    model: CompactModel, tmp_path: Path
) -> None:
    made = export(model, tmp_path / "two", images=IMAGES, precision="int8", threads=2)
    assert made.manifest.session == config_for(2)
    assert made.manifest.session["session.force_spinning_stop"] == "1"
    assert made.manifest.form.startswith("batch/runtime/")
    logits = open_session(made, threads=2).run(None, {"images": IMAGES[:1]})[0]
    assert np.isfinite(logits).all()
    assert export(model, tmp_path / "one", images=IMAGES, precision="int8").manifest.session == {}
