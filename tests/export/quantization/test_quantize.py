"""Eight bits and fewer: what is quantized, what stays float, and how far outputs change."""

from __future__ import annotations

import platform
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import vitrim
from processors import HOST_BITS, WEIGHT_BITS
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.export import capabilities
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.parity import model_outputs, relative_error
from vitrim.export.quantization.quantize import (
    CALIBRATIONS,
    Calibration,
    int8_dynamic,
    int8_static,
    weights_only,
)
from vitrim.targets import catalog


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


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 1, 16, 16), dtype=np.float32)


def error_of(model: CompactModel, graph: onnx.ModelProto, images: np.ndarray) -> float:
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    return float(relative_error(expected, model_outputs(graph, images)).max())


def operators(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


def test_dynamic_forms_quantize_every_linear_but_the_patches(
    model: CompactModel, images: np.ndarray
) -> None:
    graph = write_network(model, FORMS[0], linears="int8", weight_bits=HOST_BITS)
    # Two blocks of q, k, v, out, fc1, fc2, and the head.
    assert operators(graph)["DynamicQuantizeMatMul"] == 13
    assert operators(graph)["Gemm"] == 1
    assert 1e-5 < error_of(model, graph, images) < 0.1


def test_seven_bit_weights_stay_in_their_range(model: CompactModel, images: np.ndarray) -> None:
    graph = write_network(model, FORMS[0], linears="int8", weight_bits=7)
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    ]
    assert max(int(np.abs(weight.astype(np.int16)).max()) for weight in weights) == 63
    assert error_of(model, graph, images) < 0.2


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_any_float_graph_can_be_quantized_with_dynamic_inputs(
    model: CompactModel, images: np.ndarray, bits: int
) -> None:
    graph = int8_dynamic(write_network(model, FORMS[1], linears="product"), weight_bits=bits)
    assert operators(graph)["MatMulInteger"] >= 13
    assert operators(graph)["Softmax"] == 2
    assert 1e-5 < error_of(model, graph, images) < 0.1


def test_weights_stacked_by_head_stay_float(model: CompactModel, images: np.ndarray) -> None:
    given = write_network(model, Form(rows="batch", norm="layer"))
    stacked = {tensor.name for tensor in given.graph.initializer if len(tensor.dims) == 3}
    products = [
        node for node in given.graph.node if node.op_type == "MatMul" and node.input[1] in stacked
    ]
    assert products
    for node in given.graph.node:
        # Other exporters leave nodes unnamed.
        node.name = ""
    graph = int8_dynamic(given, weight_bits=HOST_BITS)
    assert sum(
        node.op_type == "MatMul" and node.input[1] in stacked for node in graph.graph.node
    ) == len(products)
    assert operators(graph)["MatMulInteger"] > 0
    assert 1e-5 < error_of(model, graph, images) < 0.1


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_static_ranges_come_from_images_and_leave_softmax_and_norms_float(
    model: CompactModel, images: np.ndarray, calibration: Calibration, bits: int
) -> None:
    whole = write_network(model, Form(norm="layer"), linears="product")
    graph = int8_static(whole, images, calibration=calibration, weight_bits=bits)
    quantized = {node.output[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization", "Gelu", "Conv"):
            assert not quantized & set(node.input), node.name
    fed = [
        node
        for node in graph.graph.node
        if node.op_type in ("MatMul", "Gemm") and set(node.input[:2]) <= quantized
    ]
    assert len(fed) == 13
    assert 1e-5 < error_of(model, graph, images) < 0.3


def test_static_ranges_need_images_and_a_known_calibration(
    model: CompactModel, images: np.ndarray
) -> None:
    graph = write_network(model, FORMS[1], linears="product")
    with pytest.raises(InputError, match="needs calibration images and got none"):
        int8_static(graph, images[:0])
    with pytest.raises(
        InputError, match="calibration 'guess' is unknown; use one of min-max, percentile, entropy"
    ):
        int8_static(graph, images, calibration="guess")  # type: ignore[arg-type]


def test_products_that_cannot_be_quantized_are_reported(images: np.ndarray) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((16, 4)), "weight")
    nodes = [
        onnx.helper.make_node(
            "Cast", ["images"], ["wide"], name="wide", to=onnx.TensorProto.DOUBLE
        ),
        onnx.helper.make_node("MatMul", ["wide", "weight"], ["product"], name="product"),
        onnx.helper.make_node(
            "Cast", ["product"], ["logits"], name="narrow", to=onnx.TensorProto.FLOAT
        ),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 16, last])
        for name, last in (("images", 16), ("logits", 4))
    ]
    graph = onnx.helper.make_graph(nodes, "double", ends[:1], ends[1:], [weight])
    double = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    with pytest.raises(InputError, match="int8-static reached 0 of 1 products"):
        int8_static(double, images)


def test_fewer_bits_make_fewer_bytes_and_larger_errors(
    model: CompactModel, images: np.ndarray
) -> None:
    whole = write_network(model, FORMS[1], linears="product")
    eight, four = weights_only(whole, 8), weights_only(whole, 4)
    assert four.ByteSize() < eight.ByteSize() < whole.ByteSize()
    assert 0 < error_of(model, eight, images) < error_of(model, four, images) < 1


def test_int8_on_a_target_without_dot_products_warns() -> None:
    for target in ("rpi4", "x86-64", "x86-64-v3"):
        warning = capabilities.int8_warning(target)
        assert warning is not None
        assert "int8 saves bytes here and may cost time" in warning
    assert capabilities.int8_warning("x86-64-v4-vnni") is None


@pytest.mark.parametrize(
    ("target", "exact"),
    [("x86-64", False), ("x86-64-v3", False), ("x86-64-v4-vnni", True), ("rpi4", True)],
)
def test_only_x86_with_vnni_and_arm_have_whole_eight_bit_weights(target: str, exact: bool) -> None:
    assert capabilities.int8_exact(target) == exact


def test_an_x86_profile_without_instruction_sets_is_taken_to_saturate(tmp_path: Path) -> None:
    text = (catalog.FOLDER / "x86-64-v3.toml").read_text()
    own = tmp_path / "mine.toml"
    own.write_text(re.sub(r"features = \[[^\]]*\]", "features = []", text))
    assert not capabilities.int8_exact(str(own))


def test_measurements_here_are_valid_for_the_host_and_for_processors_like_it() -> None:
    assert capabilities.is_host("host")
    assert not capabilities.is_host("rpi4" if platform.machine() == "x86_64" else "x86-64")
    levels = ("x86-64", "x86-64-v3", "x86-64-v4-vnni")
    assert sum(capabilities.is_host(target) for target in levels) <= 1
