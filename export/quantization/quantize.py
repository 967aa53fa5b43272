"""Eight bits and fewer. Each way takes a float graph and gives another, and says what it cost.

- `int8`: weights in eight bits with a scale a column, inputs quantized for each image as it comes;
  for processors with eight-bit dot products.
- `int8-static`: weights and inputs in eight bits, with input ranges found on calibration images;
  softmax, norms and patch embedding stay float.
- `int8-weights`, `int4-weights`: only the stored weights are small; the arithmetic stays float. For
  devices short of bytes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ...core.errors import InputError

Calibration = Literal["min-max", "percentile", "entropy"]
CALIBRATIONS: tuple[Calibration, ...] = ("min-max", "percentile", "entropy")
CALIBRATION_IMAGES = 128
# What static quantization leaves float unless it is named: the patch embedding, attention's own
# products with their softmax, and the norms.
Also = Literal["patch", "attention", "norm"]


def int8_dynamic(model: onnx.ModelProto, *, weight_bits: int = 8) -> onnx.ModelProto:
    """Quantize the constant products of any float graph, a scale a column. Requires: not fused yet.
    Ensures: same inputs and outputs.

    `weight_bits` 7 keeps sums of two products inside 16 bits, on processors whose eight-bit
    products saturate (no VNNI).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    named = onnx.ModelProto()
    named.CopyFrom(model)
    for number, node in enumerate(named.graph.node):
        node.name = node.name or f"node.{number}"
    stacked = {tensor.name for tensor in named.graph.initializer if len(tensor.dims) > 2}
    with _files(named) as (source, target):
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            # Scales a column of a matrix for each head are written by the quantizer and refused by
            # the runtime (1.31: "b zero point is not valid").
            nodes_to_exclude=[
                node.name
                for node in named.graph.node
                if node.op_type == "MatMul" and node.input[1] in stacked
            ],
            per_channel=True,
            reduce_range=weight_bits < 8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return _read(target)


def int8_static(
    model: onnx.ModelProto, images: NDArray[Any], *, calibration: Calibration = "min-max", weight_bits: int = 8, also: tuple[Also, ...] = (),
    symmetric: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    """Quantize weight products with input ranges found on calibration images, as QuantizeLinear and
    DequantizeLinear pairs.

    images: float32 (count, channels, height, width). Softmax, norms, attention products and the
    patch embedding stay float, but for those named in `also`; activations always do. symmetric:
    inputs in signed bits around zero, and biases in float, as TensorRT wants them (NVIDIA/TensorRT
    issues 2774 and onnxruntime's 14229); without it in unsigned bits with a zero point, which lose
    nothing on a side that no value takes. Errors: InputError for an unknown calibration or too few
    images, or if a product could not be reached.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    if calibration not in CALIBRATIONS:
        raise InputError(
            f"calibration {calibration!r} is unknown; take one of {', '.join(CALIBRATIONS)}"
        )
    if len(images) == 0:
        raise InputError(
            "int8-static needs calibration images and got none; pass images, or take precision='int8', which needs none"
        )
    name = model.graph.input[0].name
    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[NDArray[Any]] = (
                images[first : first + size] for first in range(0, len(images) - size + 1, size)
            )

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: np.ascontiguousarray(batch, dtype=np.float32)}

    method = {
        "min-max": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }[calibration]
    constants = {tensor.name for tensor in model.graph.initializer}
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [
        node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in matrices
    ]
    # The patch embedding reads pixels, be it a convolution or a product.
    stems = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" or (node.op_type in ("MatMul", "Gemm") and node.name == "stem")
    ]
    weighted = [node.name for node in products if node.name != "stem"]
    more = [node.name for node in stems] if "patch" in also else []
    if "attention" in also:
        more += [
            node.name
            for node in model.graph.node
            if node.op_type == "Softmax"
            or (node.op_type == "MatMul" and node.input[1] not in constants)
        ]
    if "norm" in also:
        more += [node.name for node in model.graph.node if node.op_type == "LayerNormalization"]
    kinds = [
        "MatMul",
        "Gemm",
        *(["Conv"] if "patch" in also else []),
        *(["Softmax"] if "attention" in also else []),
    ]
    kinds += ["LayerNormalization"] if "norm" in also else []
    # The quantizer passes over values whose type it does not know, and it knows none behind the
    # runtime's own operators.
    others = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type != onnx.TensorProto.FLOAT
    }
    floats = {
        node.input[0]
        for node in model.graph.node
        if node.name in {*weighted, *more} and not others & set(node.input)
    }
    with _files(model, floats) as (source, target):
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=kinds,
            nodes_to_quantize=weighted + more,
            per_channel=True,
            reduce_range=weight_bits < 8,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            # Only the products' inputs: quantizing their outputs too costs accuracy and saves
            # nothing, since norms and softmax want floats.
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "DedicatedQDQPair": False,
                "ActivationSymmetric": symmetric,
                "QuantizeBias": not symmetric,
            },
        )
        quantized = _read(target)
    answered = {
        node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"
    }
    done = sum(
        node.op_type in ("MatMul", "Gemm") and set(node.input[:2]) <= answered
        for node in quantized.graph.node
    )
    if done < len(weighted):
        raise InputError(
            f"int8-static reached {done} of {len(weighted)} products; export with form='plain' or another precision"
        )
    return quantized


def weights_only(
    model: onnx.ModelProto, bits: Literal[4, 8], *, block_size: int = 32
) -> onnx.ModelProto:
    """Store constant product weights in `bits` bits with a scale a block of `block_size` inputs;
    arithmetic stays float (MatMulNBits).
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with _silent():
        quantizer = MatMulNBitsQuantizer(copy, bits=bits, block_size=block_size, is_symmetric=True)
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    del quantized.graph.value_info[:]
    return quantized


class _files:
    """The quantizers read and write files; these two live as long as the block. floats: values
    whose type is stated for them.
    """

    def __init__(self, model: onnx.ModelProto, floats: Iterable[str] = ()) -> None:
        self.model, self.floats = model, floats

    def __enter__(self) -> tuple[str, str]:
        self._folder = tempfile.TemporaryDirectory(prefix="vitrim-quantize-")
        self._silent = _silent()
        self._silent.__enter__()
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        # Shapes of inner values that torch's exporter left behind contradict the quantizer's own.
        del copy.graph.value_info[:]
        copy.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in sorted(self.floats)
        )
        source = Path(self._folder.name) / "float.onnx"
        onnx.save(copy, str(source))
        return str(source), str(source.with_name("quantized.onnx"))

    def __exit__(self, *_: object) -> None:
        self._silent.__exit__()
        self._folder.cleanup()


class _silent:
    """The quantizers advise about preprocessing on every call, and print their histograms; here
    that is done and not wanted.
    """

    def __enter__(self) -> None:
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self._output = contextlib.redirect_stdout(io.StringIO())
        self._output.__enter__()

    def __exit__(self, *_: object) -> None:
        self._output.__exit__(None, None, None)
        logging.disable(self._level)


def _read(path: str) -> onnx.ModelProto:
    model = onnx.load(path)
    del model.graph.value_info[:]
    return model
