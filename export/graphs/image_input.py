"""The image input of an imported graph: its type, its batch, and which dimension are channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...core.errors import InputError
from ..manifest import Array, Layout
from .model_proto import STANDARD_DOMAINS, unused_name

Sizes = tuple[int | None, ...]

# Grey, colour; and colour with transparency, where no other dimension fits better.
_CHANNELS, _MORE_CHANNELS = (1, 3), (1, 3, 4)
# Types that a Cast turns into float32 and back.
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_ELEMENTWISE = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Neg", "Cast", "Clip", "Identity", "Min", "Max", "Pad"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Dropout"),
    }
)
# Operators whose second dimension are channels, by the standard.
_CHANNELS_FIRST = frozenset(
    {
        *("Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "DepthToSpace", "SpaceToDepth"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "LRN", "Upsample"),
        *("BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    }
)
# The layout of an input that a transposition turns into the other one.
_TRANSPOSED: dict[tuple[int, ...], Layout] = {(0, 3, 1, 2): "NHWC", (0, 2, 3, 1): "NCHW"}


@dataclass(frozen=True)
class ImageInput:
    """The one input of an image classifier.

    Attributes:
        name: Its name.
        batch: The fixed batch; None where it is free.
        shape: Of one image, in the graph's own order.
        layout: The order of the dimensions.
    """

    name: str
    batch: int | None
    shape: tuple[int, int, int]
    layout: Layout

    @classmethod
    def of(cls, graph: onnx.ModelProto, path: Path) -> ImageInput:
        """Read the input.

        Raises:
            InputError: The model is no image classifier; the message names the file and the reason.
        """
        inputs, outputs = graph_inputs(graph), graph.graph.output
        if len(inputs) != 1 or len(outputs) != 1:
            raise InputError(
                f"{path}: has {_named(inputs, 'input')} and {_named(outputs, 'output')}; an image "
                "classifier has one of each, so export it with the images and the logits alone"
            )
        only = inputs[0]
        sizes = _image_sizes(only, path)
        _require_logits(outputs[0], path)
        layout = _layout(graph, only.name, sizes, path)
        batch, *shape = sizes
        if batch == 0:
            raise InputError(f"{path}: input {only.name!r} takes batches of 0 images; {_WAY_OUT}")
        first, second, third = (int(size or 0) for size in shape)
        own = batch if batch is not None and batch > 0 else None
        return cls(only.name, own, (first, second, third), layout)

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        if self.layout == "NCHW":
            return self.shape
        height, width, channels = self.shape
        return channels, height, width

    def arranged(self, images: Array) -> Array:
        """Return images in the graph's order; those of another shape are returned unchanged.

        Args:
            images: (count, channels, height, width).
        """
        if self.layout == "NCHW" or tuple(images.shape[1:]) != self.image:
            return images
        return np.ascontiguousarray(np.moveaxis(images, 1, 3))


_WAY_OUT = "export it again with a fixed image size, and a batch that is fixed or free"


def graph_inputs(graph: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are not weights as well."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    weights |= {sparse.values.name for sparse in graph.graph.sparse_initializer}
    return [value for value in graph.graph.input if value.name not in weights]


def _image_sizes(value: onnx.ValueInfoProto, path: Path) -> Sizes:
    """Return the four sizes of an input of images, None where they are free."""
    subject = f"{path}: input {value.name!r} is"
    if not value.type.HasField("tensor_type"):
        kind = (value.type.WhichOneof("value") or "a value without a type").removesuffix("_type")
        raise InputError(f"{subject} a {kind}, no tensor of images; {_WAY_OUT}")
    kind = value.type.tensor_type.elem_type
    sizes = _sizes(value)
    if kind not in _FLOATS:
        raise InputError(
            f"{subject} {_type_name(kind)} {_shown(sizes)}; give a model of float32 images, with "
            f"{_input_advice(kind)}"
        )
    if sizes is None:
        raise InputError(f"{subject} of unknown shape; {_WAY_OUT}")
    if len(sizes) != 4:
        raise InputError(
            f"{subject} {_shown(sizes)}; images have 4 dimensions (batch, channels, height, width)"
        )
    if any(size is None or size < 1 for size in sizes[1:]):
        problem = "a size of 0" if 0 in sizes[1:] else "free sizes"
        raise InputError(f"{subject} {_shown(sizes)}, with {problem}; {_WAY_OUT}")
    return sizes


def _require_logits(value: onnx.ValueInfoProto, path: Path) -> None:
    subject = f"{path}: output {value.name!r} is"
    if not value.type.HasField("tensor_type"):
        kind = (value.type.WhichOneof("value") or "a value without a type").removesuffix("_type")
        raise InputError(f"{subject} a {kind}; export the model with the tensor of its logits")
    kind, sizes = value.type.tensor_type.elem_type, _sizes(value)
    if kind not in _FLOATS:
        raise InputError(
            f"{subject} {_type_name(kind)}; a classifier returns float logits (batch, classes), "
            "so export it without ArgMax or TopK"
        )
    if sizes is not None and (len(sizes) != 2 or sizes[1] == 0):
        raise InputError(f"{subject} {_shown(sizes)}; a classifier returns (batch, classes)")


def _sizes(value: onnx.ValueInfoProto) -> Sizes | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        side.dim_value if side.HasField("dim_value") and side.dim_value >= 0 else None
        for side in kind.shape.dim
    )


def _shown(sizes: Sizes | None) -> str:
    if sizes is None:
        return "of unknown shape"
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"


def _type_name(kind: int) -> str:
    name = str(TensorProto.DataType.Name(kind)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _input_advice(kind: int) -> str:
    if kind == TensorProto.UINT8:
        return "the normalisation of its pixels outside of the graph"
    return "nothing but images as its input"


def _named(values: Sequence[onnx.ValueInfoProto], kind: str) -> str:
    names = ", ".join(value.name for value in values[:8])
    plural = kind if len(values) == 1 else f"{kind}s"
    return f"{len(values)} {plural}{f' ({names})' if names else ''}"


# ---- layout --------------------------------------------------------------------------------------


def _layout(graph: onnx.ModelProto, name: str, sizes: Sizes, path: Path) -> Layout:
    """Return the order of an input's dimensions: of what reads it, or of its sizes.

    Raises:
        InputError: Neither the second nor the last dimension are the channels of an image.
    """
    readers = list(_first_readers(graph, name))
    if any(_reads_channels_last(node) for node in readers):
        return "NHWC"
    if any(node.op_type in _CHANNELS_FIRST and node.domain in STANDARD_DOMAINS for node in readers):
        return "NCHW"
    second, last = sizes[1], sizes[3]
    moved = [_TRANSPOSED.get(_permutation(node)) for node in readers]
    for channels in (_CHANNELS, _MORE_CHANNELS):
        first_fits, last_fits = second in channels, last in channels
        if first_fits != last_fits:
            return "NCHW" if first_fits else "NHWC"
        if first_fits and last_fits:
            return next((layout for layout in moved if layout), "NCHW")
    raise InputError(
        f"{path}: input {name!r} is {_shown(sizes)}, and neither {second} (dimension 1) nor {last} "
        f"(dimension 3) are the channels of an image ({', '.join(map(str, _MORE_CHANNELS))}); "
        "give a model of images"
    )


def _first_readers(graph: onnx.ModelProto, name: str) -> Iterator[onnx.NodeProto]:
    """Yield the first nodes behind an input that are not elementwise."""
    values = {name}
    for node in graph.graph.node:
        if not values.intersection(node.input):
            continue
        if node.op_type in _ELEMENTWISE:
            values.update(node.output)
        else:
            yield node


def _reads_channels_last(node: onnx.NodeProto) -> bool:
    if node.domain == "com.ms.internal.nhwc" or node.op_type.startswith("Nhwc"):
        return True
    return node.op_type in _CHANNELS_FIRST and any(
        entry.name == "channels_last" and entry.i for entry in node.attribute
    )


def _permutation(node: onnx.NodeProto) -> tuple[int, ...]:
    if node.op_type != "Transpose":
        return ()
    return next((tuple(entry.ints) for entry in node.attribute if entry.name == "perm"), ())


# ---- the graph with a float32 input and a fixed or dynamic batch -------------------------------


def require_connection(graph: onnx.ModelProto, entry: ImageInput, path: Path) -> None:
    """Raise InputError where the output does not depend on the images."""
    reached = {entry.name}
    for node in graph.graph.node:
        if reached.intersection(node.input):
            reached.update(name for name in node.output if name)
    if graph.graph.output[0].name not in reached - {entry.name}:
        raise InputError(
            f"{path}: output {graph.graph.output[0].name!r} does not depend on input "
            f"{entry.name!r}; export the whole model"
        )


def set_batch(
    graph: onnx.ModelProto, entry: ImageInput, batch: int | str, classes: int | None = None
) -> None:
    """Write the batch into the shapes of input and output, in place.

    Args:
        graph: A graph of one input and one output.
        entry: Its input.
        batch: A size, or the name of a free dimension.
        classes: Of the output; None for a free number.
    """
    ends = ((graph.graph.input[0], [*entry.shape]), (graph.graph.output[0], [classes]))
    for value, sizes in ends:
        kind = value.type.tensor_type.elem_type
        value.type.CopyFrom(helper.make_tensor_type_proto(kind, [batch, *sizes]))


def drop_weight_inputs(graph: onnx.ModelProto) -> None:
    """Remove weights from the inputs: they could be overridden, so no runtime folds them."""
    kept = list(graph_inputs(graph))
    del graph.graph.input[:]
    graph.graph.input.extend(kept)


def cast_ends(graph: onnx.ModelProto) -> str | None:
    """Give float32 images and logits to a graph of other floats; return a note if it changed.

    The graph is changed in place; the names of its input and output stay.
    """
    notes = []
    used = {name for node in graph.graph.node for name in (*node.input, *node.output)}
    source, result = graph.graph.input[0], graph.graph.output[0]
    for value in (source, result):
        kind = value.type.tensor_type.elem_type
        if kind == TensorProto.FLOAT:
            continue
        is_input = value is source
        inner = unused_name(f"{value.name}.{_type_name(kind)}", used)
        _rename_value(graph.graph, value.name, inner)
        ends = (value.name, inner) if is_input else (inner, value.name)
        to = kind if is_input else TensorProto.FLOAT
        cast = helper.make_node("Cast", [ends[0]], [ends[1]], f"{inner}.cast", to=to)
        graph.graph.node.insert(0 if is_input else len(graph.graph.node), cast)
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        notes.append(f"{value.name} was {_type_name(kind)} and is float32")
    return "; ".join(notes) or None


def _rename_value(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
