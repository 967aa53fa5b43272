"""Writes a whole `CompactModel` as an ONNX graph in a given form.

Requires a `CompactModel` (any timm model that `lift` reads becomes one) and, for matrix rows, batch
1. Ensures the same function, which the exporter proves on every artifact. LayerScale is folded into
the output projection; a branch that writes only some channels gets an output projection with zero
columns for the others, or is placed by index, as the form says.
"""

from __future__ import annotations

from typing import Literal

import onnx

from ...compress.network.architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec
from ...compress.network.modules.model import CompactModel
from ...compress.surgery.stream_form import choose_stream_form
from ...core.errors import InputError, UnsupportedModel
from . import centring
from .attention import Asked, attention
from .coverage import reason_against
from .ffn import ffn
from .form import Form
from .graph import Array, Graph
from .head import head
from .rows import Linear, first_tokens, linear, norm, pick_channels, place
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
    opset: int | None = None,
) -> onnx.ModelProto:
    """The model in one form. `batch`: a size, or the name of a free dimension. `linears`: as Gemm,
    as MatMul and Add, or in eight bits with weights of `weight_bits` (7 where the processor's
    eight-bit products saturate). `opset`: at least the form's own.

    Errors: InputError if the form cannot hold the batch or the opset, UnsupportedModel naming what
    no form has a rule for.
    """
    reason = reason_against(model.architecture)
    if reason is not None:
        raise UnsupportedModel(f"the graph forms have no rule for {reason}")
    if form.rows == "matrix" and batch != 1:
        raise InputError(
            f"form {form.name} holds one image, and batch {batch} was asked for; take a form with batch rows"
        )
    if opset is not None and opset < form.opset:
        raise InputError(
            f"form {form.name} needs opset {form.opset}, and {opset} was asked for; raise the opset or take another form"
        )
    if form.stream == "cheaper":
        model = choose_stream_form(model).model
    architecture = model.architecture
    state = {
        name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()
    }
    graph = Graph()
    graph.linears, graph.weight_bits = linears, weight_bits
    if form.norm == "centred-rms" and centring.applicable(architecture):
        architecture, state = centring.centre(architecture, state)
        graph.runtime_norm = True
    writer = _Writer(graph, form, architecture)
    stream = Stream(
        graph, form, stem(graph, form, architecture, state, batch=batch, padding=writer.padding)
    )
    asked = architecture.pooled_prefix
    last = (
        _last_attention(architecture)
        if asked and (form.last_queries or architecture.last_queries)
        else None
    )
    for number, step in enumerate(architecture.steps):
        writer.step(
            stream, step, under(state, f"steps.{number}"), number, asked if number == last else None
        )
    if last is None and asked:
        stream.keep_first(asked, "pooled")
    elif not asked and writer.padding:
        stream.keep_first(architecture.tokens, "real")
    logits = head(graph, form, architecture, state, stream)
    channels, height, width = architecture.image
    return graph.model(
        [batch, channels, height, width], [batch, architecture.classes], logits, opset or form.opset
    )


def under(state: State, prefix: str) -> State:
    """The entries of `state` below `prefix`."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
    }


def _last_attention(architecture: Architecture) -> int | None:
    """The step after which tokens no longer meet."""
    found = [
        number
        for number, step in enumerate(architecture.steps)
        if any(isinstance(branch.core, AttentionSpec) for branch in step)
    ]
    return found[-1] if found else None


class _Writer:
    """The sub-layers, one after the other."""

    def __init__(self, graph: Graph, form: Form, architecture: Architecture) -> None:
        self.graph, self.form, self.embed = graph, form, architecture.embed
        self.tokens = architecture.tokens
        self.padding = -architecture.tokens % form.tile
        # Token rows of the stream; few are left after the last attention, and no padding among
        # them.
        self.rows = self.tokens + self.padding

    def step(
        self,
        stream: Stream,
        step: tuple[BranchSpec, ...],
        state: State,
        number: int,
        asked: int | None,
    ) -> None:
        """All branches read the stream as it was before the step; then they write. `asked`: from
        here on only so many first tokens are wanted.
        """
        graph, form = self.graph, self.form
        parts = [under(state, str(position)) for position in range(len(step))]
        inputs = [
            "" if isinstance(branch.core, ConstantSpec) else self._read(stream, branch, part)
            for branch, part in zip(step, parts, strict=True)
        ]
        padding = max(self.rows - self.tokens, 0)
        if asked is not None:
            stream.keep_first(asked, f"{step[0].name}.kept" if step else f"steps.{number}.kept")
            self.rows = asked
        for branch, part, x in zip(step, parts, inputs, strict=True):
            name, inner = branch.name, under(part, "core")
            if isinstance(branch.core, ConstantSpec):
                vector = (
                    inner["value"] * part["layer_scale"] if branch.layer_scale else inner["value"]
                )
                wide = (
                    vector
                    if branch.writes is None
                    else widen(vector, list(branch.writes), self.embed)
                )
                assert wide is not None
                stream.write_constant(wide, name)
                continue
            asking = x if asked is None else first_tokens(graph, form, x, asked, f"{name}.asking")
            if isinstance(branch.core, AttentionSpec):
                y, out = attention(
                    graph,
                    form,
                    branch.core,
                    inner,
                    Asked(x, asking, self.tokens, padding, asked),
                    name,
                )
            else:
                y, out = ffn(graph, form, branch.core, inner, asking, name)
            self._write(stream, branch, part, y, out)

    def _read(self, stream: Stream, branch: BranchSpec, part: State) -> str:
        weight, bias, name = part.get("norm.weight"), part.get("norm.bias"), f"{branch.name}.norm"
        if branch.reads is None and branch.norm is not None:
            return stream.read_normed(branch.norm, weight, bias, name)
        x = stream.read(f"{branch.name}.stream")
        if branch.reads is not None:
            x = pick_channels(self.graph, x, branch.reads, f"{branch.name}.reads")
        return x if branch.norm is None else norm(self.graph, x, branch.norm, weight, bias, name)

    def _write(self, stream: Stream, branch: BranchSpec, part: State, y: str, out: Linear) -> None:
        graph, form, writes = self.graph, self.form, branch.writes
        scale = part["layer_scale"] if branch.layer_scale else None
        name = f"{branch.name}.out"
        if branch.post_norm is not None:
            weight, bias = part.get("post_norm.weight"), part.get("post_norm.bias")
            if scale is not None:
                weight = scale if weight is None else weight * scale
                bias = None if bias is None else bias * scale
            y = norm(
                graph,
                linear(graph, form, y, out, name),
                branch.post_norm,
                weight,
                bias,
                f"{branch.name}.post_norm",
            )
            if writes is not None:
                y = place(graph, y, writes, self.embed, f"{branch.name}.place")
            stream.write(y, None, branch.name)
            return
        weight, bias = out.weight, out.bias
        if scale is not None:
            weight, bias = weight * scale, None if bias is None else bias * scale
        if writes is not None and form.stream == "dense":
            wide = widen(weight, list(writes), self.embed)
            assert wide is not None
            weight, bias, writes = wide, widen(bias, list(writes), self.embed), None
        if writes is not None:
            y = linear(graph, form, y, Linear(weight, bias), name)
            if form.rows == "matrix":
                stream.write_by_index(y, writes, self.rows, branch.name)
                return
            stream.write(
                place(graph, y, writes, self.embed, f"{branch.name}.place"), None, branch.name
            )
        elif stream.holds_back:
            stream.write(linear(graph, form, y, Linear(weight, None), name), bias, branch.name)
        else:
            stream.write(linear(graph, form, y, Linear(weight, bias), name), None, branch.name)
