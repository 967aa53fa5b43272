"""The input of an imported graph: its layout, and why inputs and outputs are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import FLATTEN, HIDDEN, PRODUCT, classifier, tensor, value
from vitrim.core.errors import InputError
from vitrim.export.graphs.image_input import ImageInput, cast_ends, require_connection

PATH = Path("model.onnx")


def entry_of(*sizes: int | str, nodes: list[onnx.NodeProto] | None = None) -> ImageInput:
    model = classifier(nodes or [FLATTEN, PRODUCT], entry=value("x", *sizes))
    return ImageInput.of(model, PATH)


def conv(source: str = "x") -> list[onnx.NodeProto]:
    return [
        helper.make_node("Conv", [source, "kernel"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]


def transposed(perm: list[int]) -> list[onnx.NodeProto]:
    """A normalisation, and a transposition behind it."""
    return [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Transpose", ["centred"], ["t"], perm=perm),
        *conv("t"),
    ]


@pytest.mark.parametrize(
    ("sizes", "layout", "image"),
    [
        (("n", 3, 16, 24), "NCHW", (3, 16, 24)),
        ((2, 1, 28, 28), "NCHW", (1, 28, 28)),
        (("n", 16, 24, 3), "NHWC", (3, 16, 24)),
        ((1, 28, 28, 1), "NHWC", (1, 28, 28)),
        (("n", 4, 16, 16), "NCHW", (4, 16, 16)),
        (("n", 16, 24, 4), "NHWC", (4, 16, 24)),
    ],
)
def test_sizes_decide_which_dimension_are_channels(
    sizes: tuple[int | str, ...], layout: str, image: tuple[int, int, int]
) -> None:
    entry = entry_of(*sizes)
    assert (entry.layout, entry.image) == (layout, image)


def test_what_reads_the_input_decides_where_it_is_a_convolution_or_a_transposition() -> None:
    # Twelve channels, as satellites have, and images of three columns.
    assert entry_of("n", 12, 16, 3, nodes=conv()).layout == "NCHW"
    assert entry_of("n", 3, 8, 3, nodes=transposed([0, 3, 1, 2])).layout == "NHWC"
    assert entry_of("n", 3, 8, 3, nodes=transposed([0, 2, 3, 1])).layout == "NCHW"


def test_dimensions_that_are_no_channels_are_refused_with_both_sizes() -> None:
    with pytest.raises(
        InputError, match=r"is \(\?, 32, 16, 24\), and neither 32 .* nor 24 .* channels of an image"
    ):
        entry_of("n", 32, 16, 24)


def test_images_are_arranged_in_the_graphs_order() -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 24), dtype=np.float32)
    last = entry_of("n", 16, 24, 3).arranged(images)
    assert last.flags.c_contiguous
    np.testing.assert_array_equal(last, images.transpose(0, 2, 3, 1))
    # In the graph's order already.
    np.testing.assert_array_equal(entry_of("n", 16, 24, 3).arranged(last), last)
    np.testing.assert_array_equal(entry_of("n", 3, 16, 24).arranged(images), images)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (value("x", "n", 768), r"input 'x' is \(\?, 768\); images have 4 dimensions"),
        (value("x", "n", 3, "h", "w"), r"is \(\?, 3, \?, \?\), with free sizes"),
        (value("x", "n", 3, 0, 16), r"is \(\?, 3, 0, 16\), with a size of 0"),
        (value("x", 0, 3, 16, 16), "batches of 0 images"),
        (value("x", "n", 16, kind=TensorProto.INT64), r"is int64 \(\?, 16\); give .* float32"),
        (value("x", "n", 3, 16, 16, kind=TensorProto.UINT8), "is uint8 .* normalisation"),
        (value("x", 1, kind=TensorProto.STRING), r"is string \(1\)"),
        (helper.make_tensor_sequence_value_info("x", 1, [1, 3, 8, 8]), "is a sequence, no tensor"),
        (helper.make_tensor_value_info("x", 1, None), "of unknown shape"),
    ],
)
def test_inputs_that_are_no_images_are_refused(entry: onnx.ValueInfoProto, reason: str) -> None:
    with pytest.raises(InputError, match=f"^model.onnx: .*{reason}"):
        ImageInput.of(classifier(entry=entry), PATH)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (value("y", "n", kind=TensorProto.INT64), "output 'y' is int64; .* without ArgMax"),
        (value("y", "n", 4, 1), r"output 'y' is \(\?, 4, 1\); a classifier returns"),
        (value("y", "n", 0), r"output 'y' is \(\?, 0\)"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(result: onnx.ValueInfoProto, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ImageInput.of(classifier(result=result), PATH)


def test_other_numbers_of_inputs_and_outputs_are_refused_with_their_names() -> None:
    model = classifier()
    model.graph.input.append(value("mask", 1))
    with pytest.raises(InputError, match=r"has 2 inputs \(x, mask\) and 1 output \(y\)"):
        ImageInput.of(model, PATH)
    model = classifier()
    model.graph.output.append(value("f", "n", 768))
    with pytest.raises(InputError, match=r"has 1 input \(x\) and 2 outputs \(y, f\)"):
        ImageInput.of(model, PATH)
    # A weight that is an input as well is no input.
    model = classifier()
    model.graph.input.append(value("w", 768, 4))
    assert ImageInput.of(model, PATH).name == "x"


def test_an_output_that_does_not_depend_on_the_images_is_refused() -> None:
    model = classifier([helper.make_node("Identity", ["w"], ["y"])], weights=[tensor("w", 1, 4)])
    with pytest.raises(InputError, match="output 'y' does not depend on input 'x'"):
        require_connection(model, ImageInput.of(model, PATH), PATH)


def test_other_floats_at_both_ends_become_float32_under_the_same_names() -> None:
    half = TensorProto.FLOAT16
    model = classifier(
        entry=value("x", "n", 3, 16, 16, kind=half),
        result=value("y", "n", 4, kind=half),
        weights=[tensor("w", 768, 4, dtype=np.float16)],
    )
    assert cast_ends(model) == "x was float16 and is float32; y was float16 and is float32"
    assert [node.op_type for node in model.graph.node] == ["Cast", "Flatten", "MatMul", "Cast"]
    assert {value.name for value in (*model.graph.input, *model.graph.output)} == {"x", "y"}
    onnx.checker.check_model(model, full_check=True)
    assert cast_ends(classifier([FLATTEN, HIDDEN, helper.make_node("Relu", ["z"], ["y"])])) is None
