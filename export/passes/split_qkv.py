"""One product for queries, keys and values -> one product each.

Runtimes fuse attention then, and later passes see each product alone.

Requires x W (+ b) with one reader: either a Split of its last dimension into three, or a Reshape to
(batch, tokens, 3, heads, width), a Transpose that moves the 3 to the front, and readers that select
one of the three (Split and Squeeze, Slice and Squeeze, or Gather).
"""

from __future__ import annotations

import numpy as np
import onnx

from .graph_editor import Array, GraphEditor, Pass, Result, attribute
from .linear_chain import LinearChain, linear_making, write_linear


def _apply(model: onnx.ModelProto) -> Result:
    editor = GraphEditor(model)
    count = 0
    for node in list(editor.graph.node):
        if node.op_type == "Split":
            count += _split_columns(editor, node)
        elif node.op_type == "Transpose":
            count += _split_dimension(editor, node)
    return Result(editor.finished() if count else model, count)


def _split_columns(editor: GraphEditor, split: onnx.NodeProto) -> bool:
    chain = linear_making(editor, split.input[0])
    if (
        chain is None
        or editor.only_reader(chain.y) is None
        or attribute(split, "axis", 0) != -1
        or len(split.output) != 3
    ):
        return False
    sections = (
        editor.value(split.input[1])
        if len(split.input) > 1 and split.input[1]
        else np.full(3, chain.weight.shape[1] // 3)
    )
    if sections is None or sections.sum() != chain.weight.shape[1]:
        return False
    ends = np.cumsum(sections)
    for part, output, start, end in zip("qkv", split.output, ends - sections, ends, strict=True):
        editor.insert_before(
            split, _columns(editor, chain, slice(int(start), int(end)), output, f"{chain.y}.{part}")
        )
    editor.graph.node.remove(split)
    editor.index()
    return True


def _split_dimension(editor: GraphEditor, transpose: onnx.NodeProto) -> bool:
    perm = list(attribute(transpose, "perm", []))
    reshape = editor.made_by(transpose.input[0], "Reshape")
    if (
        len(perm) != 5
        or perm[0] != 2
        or reshape is None
        or editor.only_reader(reshape.output[0]) is None
        or editor.only_reader(reshape.input[0]) is None
    ):
        return False
    shape, chain = editor.value(reshape.input[1]), linear_making(editor, reshape.input[0])
    if shape is None or chain is None or len(shape) != 5 or shape[2] != 3:
        return False
    heads, width = int(shape[3]), int(shape[4])
    if (
        heads < 1
        or width < 1
        or 3 * heads * width != chain.weight.shape[1]
        or (attribute(reshape, "allowzero", 0) and 0 in shape)
    ):
        return False
    selected = _selected(editor, transpose)
    if selected is None:
        return False
    rest = [axis - (axis > 2) for axis in perm[1:]]
    for which, output in selected:
        label = f"{chain.y}.{'qkv'[which]}"
        rows, heads_last = editor.fresh(label), editor.fresh(f"{label}.heads")
        columns = slice(which * heads * width, (which + 1) * heads * width)
        sizes = editor.constant(
            f"{label}.sizes", np.array([shape[0], shape[1], heads, width], np.int64)
        )
        nodes = [
            *_columns(editor, chain, columns, rows, label),
            editor.node("Reshape", [rows, sizes], heads_last),
            editor.node("Transpose", [heads_last], editor.fresh(f"{label}.first"), perm=rest),
        ]
        editor.insert_before(transpose, nodes)
        editor.replace_reads(output, nodes[-1].output[0])
    editor.index()
    return True


def _columns(
    editor: GraphEditor, chain: LinearChain, columns: slice, output: str, label: str
) -> list[onnx.NodeProto]:
    bias: Array | None = None if chain.bias is None else chain.bias[columns]
    return write_linear(editor, chain, chain.weight[:, columns], bias, output, name=label)


def _selected(editor: GraphEditor, transpose: onnx.NodeProto) -> list[tuple[int, str]] | None:
    """Return the selections from a value (3, …).

    Each is (which of the three, the name of the value without that dimension). None if the value is
    read in any other way.
    """
    found: list[tuple[int, str]] = []
    value = transpose.output[0]
    if value in editor.outputs:
        return None
    for reader in editor.readers.get(value, []):
        selections = _selections_by(editor, reader)
        if selections is None:
            return None
        found += selections
    return found or None


def _selections_by(editor: GraphEditor, reader: onnx.NodeProto) -> list[tuple[int, str]] | None:
    if reader.op_type == "Gather" and attribute(reader, "axis", 0) == 0:
        index = editor.value(reader.input[1])
        return None if index is None or index.ndim else [(int(index) % 3, reader.output[0])]
    parts: list[tuple[int, str]]
    if reader.op_type == "Split" and attribute(reader, "axis", 0) == 0 and len(reader.output) == 3:
        parts = list(enumerate(reader.output))
    elif reader.op_type == "Slice" and (which := _sliced_index(editor, reader)) is not None:
        parts = [(which, reader.output[0])]
    else:
        return None
    found: list[tuple[int, str]] = []
    for which, part in parts:
        squeezed = _squeezed(editor, part)
        if squeezed is None:
            return None
        found += [(which, output) for output in squeezed]
    return found


def _sliced_index(editor: GraphEditor, reader: onnx.NodeProto) -> int | None:
    """Return which of the three a Slice selects, or None if it is another Slice."""
    starts, ends, axes, steps = (
        editor.value(reader.input[i]) if len(reader.input) > i and reader.input[i] else None
        for i in (1, 2, 3, 4)
    )
    if starts is None or ends is None or axes is None or axes.tolist() != [0]:
        return None
    if steps is not None and steps.tolist() != [1]:
        return None
    first, last = int(starts[0]), min(int(ends[0]), 3)
    return first if first >= 0 and last - first == 1 else None


def _squeezed(editor: GraphEditor, part: str) -> list[str] | None:
    """Return the outputs of the Squeezes that read a part, or None if it has another use."""
    if part in editor.outputs:
        return None
    found = []
    for reader in editor.readers.get(part, []):
        squeeze = reader.op_type == "Squeeze" and len(reader.input) > 1
        axes = editor.value(reader.input[1]) if squeeze else None
        if axes is None or axes.tolist() != [0] or reader.output[0] in editor.outputs:
            return None
        found.append(reader.output[0])
    return found


SPLIT_QKV = Pass(
    "split-qkv",
    requires="static shapes of heads, as constant folding leaves them",
    ensures="no product whose columns are split into queries, keys and values",
    apply=_apply,
)
