"""Writes a whole `CompactModel` as an ONNX graph in a given form.

Requires a `CompactModel` (any timm model that `lift` reads becomes one) and, for matrix rows, batch 1. Ensures the same function, which the
exporter proves on every artifact. LayerScale is folded into the output projection; a branch that writes only some channels gets an output
projection with zero columns for the others, since a scatter costs more than the products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import onnx

from ...compress.architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec
from ...compress.vit.model import CompactModel
from ...errors import InputError, UnsupportedModel
from . import centring
from .attention import attention
from .coverage import reason_against
from .ffn import ffn
from .form import Form
from .graph import Array, Graph
from .rows import Linear, first_tokens, linear, norm, pick_channels
from .stem import stem, widen
from .stream import Stream

State = dict[str, Array]


def write_network(
    model: CompactModel,
    form: Form,
    *,
    batch: int | str = 1,
    linears: Literal["gemm", "product", "int8"] = "gemm",
    weight_bits: int = 8,
) -> onnx.ModelProto:
    """The model in one form. `batch`: a size, or the name of a free dimension. `linears`: as Gemm, as MatMul and Add, or in eight bits
    with weights of `weight_bits` (7 where the processor's eight-bit products saturate).

    Errors: InputError if the form cannot hold the batch, UnsupportedModel naming what no form has a rule for.
    """
    architecture = model.architecture
    reason = reason_against(architecture)
    if reason is not None:
        raise UnsupportedModel(f"the graph forms have no rule for {reason}")
    if form.rows == "matrix" and batch != 1:
        raise InputError(f"form {form.name} holds one image, and batch {batch} was asked for; take a form with batch rows")
    state = {name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()}
    graph = Graph()
    graph.linears, graph.weight_bits = linears, weight_bits
    if form.norm == "centred-rms" and centring.applicable(architecture):
        architecture, state = centring.centre(architecture, state)
        graph.runtime_norm = True
    rows = stem(graph, form, architecture, state, batch=batch)
    if architecture.stem_norm is not None:
        rows = norm(graph, rows, architecture.stem_norm, state.get("stem_norm.weight"), state.get("stem_norm.bias"), "stem_norm")
        if architecture.stem_writes is not None:
            rows = _place(graph, rows, architecture.stem_writes, architecture.embed, "stem.place")
    stream = Stream(graph, form, rows)
    asked = architecture.pooled_prefix
    last = _last_attention(architecture) if asked and (form.last_queries or architecture.last_queries) else None
    for number, step in enumerate(architecture.steps):
        _step(graph, form, stream, step, under(state, f"steps.{number}"), architecture.embed, asked if number == last else None)
    if last is None and asked:
        stream.keep_first(asked, "pooled")
    logits = _head(graph, form, architecture, state, stream)
    channels, height, width = architecture.image
    return graph.model([batch, channels, height, width], [batch, architecture.classes], logits, form.opset)


def under(state: State, prefix: str) -> State:
    """The entries of `state` below `prefix`."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _last_attention(architecture: Architecture) -> int | None:
    """The step after which tokens no longer meet."""
    found = [number for number, step in enumerate(architecture.steps) if any(isinstance(branch.core, AttentionSpec) for branch in step)]
    return found[-1] if found else None


def _step(
    graph: Graph, form: Form, stream: Stream, step: tuple[BranchSpec, ...], state: State, embed: int, asked: int | None
) -> None:
    """All branches read the stream as it was before the step; then they write. `asked`: from here on only so many first tokens are wanted."""
    parts = [under(state, str(position)) for position in range(len(step))]
    inputs = ["" if isinstance(branch.core, ConstantSpec) else _read(graph, stream, branch, part) for branch, part in zip(step, parts, strict=True)]
    if asked is not None:
        stream.keep_first(asked, f"{step[0].name}.kept")
    for branch, part, x in zip(step, parts, inputs, strict=True):
        name, inner = branch.name, under(part, "core")
        if isinstance(branch.core, ConstantSpec):
            vector = inner["value"] * part["layer_scale"] if branch.layer_scale else inner["value"]
            wide = vector if branch.writes is None else widen(vector, list(branch.writes), embed)
            assert wide is not None
            stream.write_constant(wide, name)
            continue
        asking = x if asked is None else first_tokens(graph, form, x, asked, f"{name}.asking")
        if isinstance(branch.core, AttentionSpec):
            y, out = attention(graph, form, branch.core, inner, x, asking, name)
        else:
            y, out = ffn(graph, form, branch.core, inner, asking, name)
        _write(graph, form, stream, branch, part, y, out, embed)


def _read(graph: Graph, stream: Stream, branch: BranchSpec, part: State) -> str:
    weight, bias, name = part.get("norm.weight"), part.get("norm.bias"), f"{branch.name}.norm"
    if branch.reads is None and branch.norm is not None:
        return stream.read_normed(branch.norm, weight, bias, name)
    x = stream.read(f"{branch.name}.stream")
    if branch.reads is not None:
        x = pick_channels(graph, x, branch.reads, f"{branch.name}.reads")
    return x if branch.norm is None else norm(graph, x, branch.norm, weight, bias, name)


def _write(graph: Graph, form: Form, stream: Stream, branch: BranchSpec, part: State, y: str, out: Linear, embed: int) -> None:
    scale = part["layer_scale"] if branch.layer_scale else None
    name = f"{branch.name}.out"
    if branch.post_norm is not None:
        weight, bias = part.get("post_norm.weight"), part.get("post_norm.bias")
        if scale is not None:
            weight = scale if weight is None else weight * scale
            bias = None if bias is None else bias * scale
        y = norm(graph, linear(graph, form, y, out, name), branch.post_norm, weight, bias, f"{branch.name}.post_norm")
        if branch.writes is not None:
            y = _place(graph, y, branch.writes, embed, f"{branch.name}.place")
        stream.write(y, None, branch.name)
        return
    weight, bias = out.weight, out.bias
    if scale is not None:
        weight, bias = weight * scale, None if bias is None else bias * scale
    if branch.writes is not None:
        wide = widen(weight, list(branch.writes), embed)
        assert wide is not None
        weight, bias = wide, widen(bias, list(branch.writes), embed)
    if stream.holds_back:
        stream.write(linear(graph, form, y, Linear(weight, None), name), bias, branch.name)
    else:
        stream.write(linear(graph, form, y, Linear(weight, bias), name), None, branch.name)


def _place(graph: Graph, y: str, writes: tuple[int, ...], embed: int, name: str) -> str:
    """(…, written) -> (…, embed)."""
    selection = np.zeros((len(writes), embed), np.float32)
    selection[np.arange(len(writes)), list(writes)] = 1
    return str(graph.node("MatMul", [y, graph.constant(f"{name}.selection", selection)], name))


def _head(graph: Graph, form: Form, architecture: Architecture, state: State, stream: Stream) -> str:
    kind = architecture.pool.kind
    width = architecture.read_width(architecture.head_reads)
    spec, weight, bias = architecture.norm, state.get("norm.weight"), state.get("norm.bias")
    if architecture.head_reads is None and spec is not None:
        x = stream.read_normed(spec, weight, bias, "norm")
    else:
        x = stream.read("head.stream")
        if architecture.head_reads is not None:
            x = pick_channels(graph, x, architecture.head_reads, "head.reads")
        x = x if spec is None else norm(graph, x, spec, weight, bias, "norm")
    asked = architecture.pooled_prefix
    if asked:
        if form.rows == "batch" or asked > 1:
            x = str(graph.node("Reshape", [x, graph.sizes([-1, asked * width])], "pool"))
    else:
        axis = 0 if form.rows == "matrix" else 1
        if kind == "mean" and architecture.prefix:
            far = graph.sizes([architecture.tokens])
            x = str(graph.node("Slice", [x, graph.sizes([architecture.prefix]), far, graph.sizes([axis])], "patches"))
        x = str(graph.node("ReduceMean", [x, graph.sizes([axis])], "pool", keepdims=1 if form.rows == "matrix" else 0))
    if architecture.pool_norm is not None:
        x = norm(graph, x, architecture.pool_norm, state.get("pool_norm.weight"), state.get("pool_norm.bias"), "pool_norm")
    matrix, shift = state["head.weight"].T, state.get("head.bias")
    if kind == "distilled":
        # The mean of two classifiers on two rows is one classifier on the rows side by side.
        matrix = np.concatenate([matrix, state["head_dist.weight"].T]) / 2
        shift = None if shift is None else (shift + state["head_dist.bias"]) / 2
    return linear(graph, replace(form, rows="matrix"), x, Linear(np.ascontiguousarray(matrix), shift), "head")
