"""One product for queries, keys and values -> a product each, so that runtimes fuse attention and
later passes see each by itself.

Requires: x W (+ b) with one reader, either a Split of its last dimension into three, or a Reshape
to (batch, tokens, 3, heads, width), a Transpose that brings the 3 to the front, and readers that
take one of the three (Split and Squeeze, Slice and Squeeze, or Gather). Ensures: no such product.
"""

from __future__ import annotations

import numpy as np
import onnx

from .contract import Result
from .linear_chain import LinearChain, linear_making, write_linear
from .net import Array, Net, attribute

name = "split-qkv"
requires = "static shapes of heads, as constant folding leaves them"
ensures = "no product whose columns are split into queries, keys and values"


def apply(model: onnx.ModelProto) -> Result:
    """Rewrite a copy."""
    net = Net(model)
    count = 0
    for node in list(net.graph.node):
        if node.op_type == "Split":
            count += _last_dimension(net, node)
        elif node.op_type == "Transpose":
            count += _fifth_dimension(net, node)
    return Result(net.finished() if count else model, count)


def _last_dimension(net: Net, split: onnx.NodeProto) -> bool:
    chain = linear_making(net, split.input[0])
    if (
        chain is None
        or net.only_reader(chain.y) is None
        or attribute(split, "axis", 0) != -1
        or len(split.output) != 3
    ):
        return False
    sections = (
        net.value(split.input[1])
        if len(split.input) > 1 and split.input[1]
        else np.full(3, chain.weight.shape[1] // 3)
    )
    if sections is None or sections.sum() != chain.weight.shape[1]:
        return False
    ends = np.cumsum(sections)
    for part, output, start, end in zip("qkv", split.output, ends - sections, ends, strict=True):
        net.insert_before(
            split, _columns(net, chain, slice(int(start), int(end)), output, f"{chain.y}.{part}")
        )
    net.graph.node.remove(split)
    net.index()
    return True


def _fifth_dimension(net: Net, turn: onnx.NodeProto) -> bool:
    perm = list(attribute(turn, "perm", []))
    fold = net.made_by(turn.input[0], "Reshape")
    if (
        len(perm) != 5
        or perm[0] != 2
        or fold is None
        or net.only_reader(fold.output[0]) is None
        or net.only_reader(fold.input[0]) is None
    ):
        return False
    shape, chain = net.value(fold.input[1]), linear_making(net, fold.input[0])
    if shape is None or chain is None or len(shape) != 5 or shape[2] != 3:
        return False
    heads, width = int(shape[3]), int(shape[4])
    if (
        heads < 1
        or width < 1
        or 3 * heads * width != chain.weight.shape[1]
        or (attribute(fold, "allowzero", 0) and 0 in shape)
    ):
        return False
    taken = _taken(net, turn)
    if taken is None:
        return False
    rest = [axis - (axis > 2) for axis in perm[1:]]
    for which, output in taken:
        label = f"{chain.y}.{'qkv'[which]}"
        rows, apart = net.fresh(label), net.fresh(f"{label}.heads")
        columns = slice(which * heads * width, (which + 1) * heads * width)
        sizes = net.constant(
            f"{label}.sizes", np.array([shape[0], shape[1], heads, width], np.int64)
        )
        nodes = [
            *_columns(net, chain, columns, rows, label),
            net.node("Reshape", [rows, sizes], apart),
            net.node("Transpose", [apart], net.fresh(f"{label}.first"), perm=rest),
        ]
        net.insert_before(turn, nodes)
        net.replace_reads(output, nodes[-1].output[0])
    net.index()
    return True


def _columns(
    net: Net, chain: LinearChain, columns: slice, output: str, label: str
) -> list[onnx.NodeProto]:
    bias: Array | None = None if chain.bias is None else chain.bias[columns]
    return write_linear(net, chain, chain.weight[:, columns], bias, output, name=label)


def _taken(net: Net, turn: onnx.NodeProto) -> list[tuple[int, str]] | None:
    """(which of the three, the value without that dimension) for each reader of (3, …); None if
    somebody reads it otherwise.
    """
    found: list[tuple[int, str]] = []
    value = turn.output[0]
    if value in net.outputs:
        return None
    for reader in net.readers.get(value, []):
        if reader.op_type == "Gather" and attribute(reader, "axis", 0) == 0:
            index = net.value(reader.input[1])
            if index is None or index.ndim:
                return None
            found.append((int(index) % 3, reader.output[0]))
        elif (
            reader.op_type == "Split"
            and attribute(reader, "axis", 0) == 0
            and len(reader.output) == 3
        ):
            for which, part in enumerate(reader.output):
                if not _squeezed(net, part, which, found):
                    return None
        elif reader.op_type == "Slice":
            starts, ends, axes, steps = (
                net.value(reader.input[i]) if len(reader.input) > i and reader.input[i] else None
                for i in (1, 2, 3, 4)
            )
            if (
                starts is None
                or ends is None
                or axes is None
                or axes.tolist() != [0]
                or (steps is not None and steps.tolist() != [1])
            ):
                return None
            first, last = int(starts[0]), min(int(ends[0]), 3)
            if first < 0 or last - first != 1 or not _squeezed(net, reader.output[0], first, found):
                return None
        else:
            return None
    return found or None


def _squeezed(net: Net, part: str, which: int, found: list[tuple[int, str]]) -> bool:
    for reader in net.readers.get(part, []):
        axes = (
            net.value(reader.input[1])
            if reader.op_type == "Squeeze" and len(reader.input) > 1
            else None
        )
        if axes is None or axes.tolist() != [0] or reader.output[0] in net.outputs:
            return False
        found.append((which, reader.output[0]))
    return part not in net.outputs
