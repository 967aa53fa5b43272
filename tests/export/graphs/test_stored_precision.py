"""What a graph is in already: the quantizers' own files, and weights that are only stored small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import FLATTEN, PRODUCT, classifier, tensor
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from tiny_models import tiny_vit
from vitrim import lift
from vitrim.export.forms import FORMS, write_network
from vitrim.export.graphs.stored_precision import stored_precision
from vitrim.export.quantization.quantize import half, int8_dynamic, int8_static, weights_only

IMAGES = np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)
SCALE = numpy_helper.from_array(np.array(0.01, np.float32), "s")


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return write_network(lift(tiny_vit()), FORMS[0], linears="product")


def precision_of(model: onnx.ModelProto) -> str | None:
    return stored_precision(model).precision


def stored(kind: str, weights: onnx.TensorProto, **attributes: Any) -> onnx.ModelProto:
    """A product whose matrix is made by one operator of small stored weights."""
    inputs = [weights.name, *(["s"] if kind == "DequantizeLinear" else [])]
    make = helper.make_node(kind, inputs, ["w"], **attributes)
    return classifier([make, FLATTEN, PRODUCT], weights=[weights, SCALE], opset=21)


def test_our_own_quantizers_and_forms_are_recognised(network: onnx.ModelProto) -> None:
    assert precision_of(network) == "fp32"
    assert precision_of(int8_dynamic(network)) == "int8"
    assert precision_of(int8_static(network, IMAGES)) == "int8-static"
    assert precision_of(weights_only(network, 8)) == "int8-weights"
    assert precision_of(weights_only(network, 4)) == "int4-weights"
    assert precision_of(half(network)) == "fp16"
    form = write_network(lift(tiny_vit()), FORMS[0], linears="int8")
    assert precision_of(form) == "int8"


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.images: Iterator[dict[str, Any]] = iter({"x": image[None]} for image in IMAGES)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.images, None)


@pytest.mark.parametrize(
    ("how", "precision"),
    [
        ({}, "int8"),
        ({"quant_format": QuantFormat.QDQ}, "int8-static"),
        ({"quant_format": QuantFormat.QOperator}, "int8-static"),
        (
            {
                "quant_format": QuantFormat.QDQ,
                "activation_type": QuantType.QUInt16,
                "weight_type": QuantType.QInt16,
            },
            None,
        ),
    ],
    ids=["dynamic", "pairs", "operators", "sixteen bits"],
)
def test_files_of_the_runtimes_quantizer_are_recognised(
    tmp_path: Path, how: dict[str, Any], precision: str | None
) -> None:
    source, target = str(tmp_path / "float.onnx"), str(tmp_path / "quantized.onnx")
    onnx.save(classifier(), source)
    if how:
        quantize_static(source, target, Reader(), **how)
    else:
        quantize_dynamic(source, target)
    assert precision_of(onnx.load(target)) == precision


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        (stored("DequantizeLinear", tensor("q", 768, 4, dtype=np.int8)), "int8-weights"),
        (stored("DequantizeLinear", tensor("q", 768, 4, dtype=ml_dtypes.int4)), "int4-weights"),
        (stored("DequantizeLinear", tensor("q", 768, 4, dtype=np.int16)), None),
        (stored("Cast", tensor("q", 768, 4, dtype=np.int8), to=1), "int8-weights"),
        (stored("Cast", tensor("q", 768, 4, dtype=np.float16), to=1), "fp16"),
        (stored("Cast", tensor("q", 768, 4), to=TensorProto.FLOAT16), "fp16"),
        (stored("Cast", tensor("q", 768, 4, dtype=ml_dtypes.bfloat16), to=1), "bf16"),
        (stored("Cast", tensor("q", 768, 4, dtype=ml_dtypes.float8_e4m3fn), to=1), None),
        (stored("Cast", tensor("q", 768, 4, dtype=np.float64), to=1), "fp32"),
    ],
    ids=["eight", "four", "sixteen", "cast", "half", "autocast", "brain", "float8", "double"],
)
def test_weights_that_are_only_stored_small_are_recognised(
    model: onnx.ModelProto, precision: str | None
) -> None:
    assert precision_of(model) == precision


def test_weights_that_training_rounds_in_the_graph_are_eight_bits() -> None:
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["xq"], "rounded"),
        helper.make_node("DequantizeLinear", ["xq", "s", "zero"], ["xd"]),
        helper.make_node("Flatten", ["xd"], ["f"]),
        helper.make_node("QuantizeLinear", ["wf", "s", "zero"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "zero"], ["w"]),
        PRODUCT,
    ]
    found = stored_precision(classifier(nodes, weights=[tensor("wf", 768, 4), SCALE, zero]))
    assert found.precision == "int8-static"
    assert "node 'rounded' (QuantizeLinear) quantizes their inputs" in found.description
    # Only values are rounded: no precision of the manifest fits.
    only = [*nodes[:3], PRODUCT]
    found = stored_precision(classifier(only, weights=[tensor("w", 768, 4), SCALE, zero]))
    assert found.precision is None
    assert "no weight is quantized" in found.description


def test_small_integers_that_index_or_mask_are_no_weights() -> None:
    index = numpy_helper.from_array(np.arange(768, dtype=np.uint8) % 7, "index")
    mask = numpy_helper.from_array(np.ones((1, 768), np.uint8), "mask")
    nodes = [
        helper.make_node("Cast", ["index"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["row"]),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.BOOL),
        FLATTEN,
        helper.make_node("Where", ["m", "f", "row"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["y"]),
    ]
    weights = [tensor("w", 768, 4), tensor("table", 7), index, mask]
    assert precision_of(classifier(nodes, weights=weights)) == "fp32"


def test_quantized_weights_inside_of_functions_are_found() -> None:
    body = [
        helper.make_node("Constant", [], ["q"], value=tensor("q", 768, 4, dtype=np.int8)),
        helper.make_node("Cast", ["q"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    function = helper.make_function(
        "local", "Product", ["f"], ["y"], body, [helper.make_opsetid("", 20)]
    )
    call = helper.make_node("Product", ["f"], ["y"], domain="local")
    model = classifier([FLATTEN, call], weights=[], functions=[function])
    assert precision_of(model) == "int8-weights"
