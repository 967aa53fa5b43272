"""Reduced precision: each function takes a float graph and returns another.

- `int8`: weights in eight bits with a scale for each column, inputs quantized at run time for each
  image; for processors with eight-bit dot products.
- `int8-static`: weights and inputs in eight bits, with input ranges found on calibration images;
  softmax, norms and patch embedding stay float.
- `int8-weights`, `int4-weights`: only the stored weights are small; the arithmetic stays float. For
  devices with little storage.
- `fp16`: weights and inner values in 16 bits, for targets that compute in it.

In every precision the scores of selections of tokens are computed in single precision, since
rounding would change which tokens are chosen.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ...core.errors import InputError
from ..graphs.model_proto import in_selection, in_stem, keeps_single_precision

Calibration = Literal["min-max", "percentile", "entropy"]
CALIBRATIONS: tuple[Calibration, ...] = ("min-max", "percentile", "entropy")
CALIBRATION_IMAGES = 128
# What static quantization leaves float by default: the patch embedding, attention's own products
# with their softmax, and the norms.
FloatPart = Literal["patch", "attention", "norm"]


def int8_dynamic(model: onnx.ModelProto, *, weight_bits: int = 8) -> onnx.ModelProto:
    """Quantize the constant products of any unfused float graph, a scale for each column.

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
            # The quantizer writes scales for each column of stacked matrices, and the runtime
            # refuses them (1.31: "b zero point is not valid").
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
    model: onnx.ModelProto,
    images: NDArray[Any],
    *,
    calibration: Calibration = "min-max",
    weight_bits: int = 8,
    also: tuple[FloatPart, ...] = (),
    symmetric: bool = False,
) -> onnx.ModelProto:
    """Quantize weight products with input ranges found on calibration images.

    The result holds QuantizeLinear and DequantizeLinear pairs. Activations stay float.

    Args:
        model: A float graph, not fused yet.
        images: Calibration images, float32 (count, channels, height, width).
        calibration: How ranges are found.
        weight_bits: 8, or 7 for processors whose eight-bit products saturate.
        also: Parts to quantize as well; without it, softmax, norms, attention products and the
            patch embedding stay float.
        symmetric: Inputs in signed bits around zero and biases in float, as TensorRT requires
            (NVIDIA/TensorRT issue 2774, microsoft/onnxruntime issue 14229). Otherwise inputs are in
            unsigned bits with a zero point, which waste no codes where all values have one sign.

    Returns:
        The quantized graph.

    Raises:
        InputError: The calibration is unknown, there are too few images, or a product could not be
            quantized.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    if calibration not in CALIBRATIONS:
        raise InputError(
            f"calibration {calibration!r} is unknown; use one of {', '.join(CALIBRATIONS)}"
        )
    if len(images) == 0:
        raise InputError(
            "int8-static needs calibration images and got none; pass images, or use "
            "precision='int8', which needs none"
        )
    methods = {
        "min-max": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    selection = _Selection.of(model, also)
    with _files(model, selection.floats) as (source, target):
        quantize_static(
            source,
            target,
            _calibration_reader(model, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(selection.operators),
            nodes_to_quantize=[*selection.products, *selection.others],
            per_channel=True,
            reduce_range=weight_bits < 8,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=methods[calibration],
            # Only the products' inputs: quantizing their outputs too costs accuracy and saves
            # nothing, since norms and softmax need floats.
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "DedicatedQDQPair": False,
                "ActivationSymmetric": symmetric,
                "QuantizeBias": not symmetric,
            },
        )
        quantized = _with_float_selections(_read(target))
    done, expected = _quantized_products(quantized), len(selection.products)
    if done < expected:
        raise InputError(
            f"int8-static reached {done} of {expected} products; "
            "export with form='plain' or another precision"
        )
    return quantized


@dataclass(frozen=True)
class _Selection:
    """What of a graph is quantized.

    Attributes:
        products: Names of the products with constant matrices, except the patch embedding.
        others: Names of further nodes, of the parts named in `also`.
        operators: The operator types of both.
        floats: Values whose type must be stated: the quantizer skips values whose type it cannot
            infer, which are those after the runtime's own operators.
    """

    products: tuple[str, ...]
    others: tuple[str, ...]
    operators: tuple[str, ...]
    floats: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto, also: tuple[FloatPart, ...]) -> _Selection:
        nodes, initializers = model.graph.node, model.graph.initializer
        constants = {tensor.name for tensor in initializers}
        matrices = {tensor.name for tensor in initializers if len(tensor.dims) == 2}
        products = tuple(
            node.name
            for node in nodes
            if _is_product(node)
            and node.input[1] in matrices
            and not in_stem(node.name)
            and not in_selection(node.name)
        )
        outside = [
            node for node in nodes if not _in_soft_split(node.name) and not in_selection(node.name)
        ]
        parts = {
            # The patch embedding reads pixels, as a convolution or as a product.
            "patch": [
                node
                for node in outside
                if node.op_type == "Conv" or (_is_product(node) and node.name == "stem")
            ],
            "attention": [
                node
                for node in outside
                if node.op_type == "Softmax"
                or (node.op_type == "MatMul" and node.input[1] not in constants)
            ],
            "norm": [node for node in outside if node.op_type == "LayerNormalization"],
        }
        operators = {"patch": "Conv", "attention": "Softmax", "norm": "LayerNormalization"}
        others = tuple(node.name for part in parts if part in also for node in parts[part])
        integers = {
            tensor.name for tensor in initializers if tensor.data_type != onnx.TensorProto.FLOAT
        }
        return cls(
            products,
            others,
            ("MatMul", "Gemm", *(kind for part, kind in operators.items() if part in also)),
            frozenset(
                node.input[0]
                for node in nodes
                if node.name in {*products, *others} and not integers & set(node.input)
            ),
        )


def _with_float_selections(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let selections of tokens read values from before their quantization.

    The quantizer makes every reader read the dequantized value.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if not in_selection(node.name):
            continue
        for number, value in enumerate(node.input):
            pair = makers.get(value)
            if pair is None or pair.op_type != "DequantizeLinear":
                continue
            source = makers.get(pair.input[0])
            if source is not None and source.op_type == "QuantizeLinear":
                node.input[number] = source.input[0]
    return model


def _in_soft_split(name: str) -> bool:
    """Whether a node is a part of a layer before the patches, and not a whole convolution."""
    return in_stem(name) and "." in name.removeprefix("before.")


def _is_product(node: onnx.NodeProto) -> bool:
    return node.op_type in ("MatMul", "Gemm")


def _calibration_reader(model: onnx.ModelProto, images: NDArray[Any]) -> Any:
    """Return onnxruntime's reader over whole batches of the images."""
    from onnxruntime.quantization import CalibrationDataReader

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

    return Reader()


def _quantized_products(model: onnx.ModelProto) -> int:
    """Return how many products read two quantized inputs."""
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return sum(_is_product(node) and set(node.input[:2]) <= quantized for node in model.graph.node)


def weights_only(
    model: onnx.ModelProto, bits: Literal[4, 8], *, block_size: int = 32
) -> onnx.ModelProto:
    """Store constant product weights in `bits` bits, with a scale for `block_size` inputs.

    Arithmetic stays float (MatMulNBits).
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # Of the layers before the patches only the time would change, and a linear attention is exact
    # only with exact features.
    kept = [
        node.name
        for node in copy.graph.node
        if (in_stem(node.name) and node.name != "stem") or in_selection(node.name)
    ]
    with _silent():
        quantizer = MatMulNBitsQuantizer(
            copy,
            bits=bits,
            block_size=block_size,
            is_symmetric=True,
            nodes_to_exclude=kept,
        )
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    del quantized.graph.value_info[:]
    return quantized


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same graph in float16, with float32 input and output.

    A linear attention stays in float32, since its features leave the range of float16; so do the
    scores of selections of tokens.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    spared = _with_casts(copy)
    with warnings.catch_warnings():
        # Weights below the smallest half are set to it, with a warning for each.
        warnings.simplefilter("ignore")
        converted: onnx.ModelProto = convert_float_to_float16(
            copy,
            keep_io_types=True,
            disable_shape_infer=True,
            node_block_list=spared,
        )
    return converted


def _with_casts(model: onnx.ModelProto) -> list[str]:
    """Insert casts around the nodes that stay in float32; return the names of all of these.

    The converter inserts them only where it has the types of all values, and then once a use.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    spared = [node for node in model.graph.node if keeps_single_precision(node.name)]
    inside = {value for node in spared for value in node.output}
    # The places of a TopK and of a Gather are integers, which no cast may turn into floats.
    integers = {node.output[1] for node in spared if node.op_type == "TopK"}
    integers |= {node.input[1] for node in spared if node.op_type == "Gather"}
    others = [node for node in model.graph.node if not keeps_single_precision(node.name)]
    leaving = inside & {value for node in others for value in node.input} - integers
    nodes: list[onnx.NodeProto] = []
    entered: set[str] = set()
    for node in model.graph.node:
        if not keeps_single_precision(node.name):
            nodes.append(node)
            continue
        for number, value in enumerate(node.input):
            if not value or value in constants or value in integers:
                continue
            if value not in inside:
                node.input[number] = f"{value}.single"
                if value not in entered:
                    nodes.append(_cast(value, node.input[number], onnx.TensorProto.FLOAT))
                entered.add(value)
            elif value in leaving:
                node.input[number] = f"{value}.single"
        nodes.append(node)
        for number, value in enumerate(node.output):
            if value in leaving:
                node.output[number] = f"{value}.single"
                nodes.append(_cast(node.output[number], value, onnx.TensorProto.FLOAT16))
    given = {node.name for node in model.graph.node}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return [
        node.name for node in nodes if keeps_single_precision(node.name) or node.name not in given
    ]


def _cast(value: str, name: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [value], [name], name=f"{name}.cast", to=to)


class _files:
    """Temporary input and output files of a quantizer, with the types of `floats` stated."""

    def __init__(self, model: onnx.ModelProto, floats: Iterable[str] = ()) -> None:
        self.model, self.floats = model, floats

    def __enter__(self) -> tuple[str, str]:
        self._folder = tempfile.TemporaryDirectory(prefix="vitrim-quantize-")
        self._silent = _silent()
        self._silent.__enter__()
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        # Inner shapes from torch's exporter contradict the quantizer's own.
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
    """Silence for the quantizers, which log advice on every call and print their histograms."""

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
