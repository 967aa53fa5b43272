"""Writes a whole `CompactModel` as an ONNX graph in a given form.

LayerScale is folded into the output projection. A branch that writes only some channels gets an
output projection with zero columns for the others, or is scattered by index, as the form states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import onnx

from ...compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    FfnSpec,
)
from ...compress.network.modules.model import CompactModel
from ...compress.network.named_outputs import OutputSpec, needs_all_tokens
from ...compress.network.select_specs import reads_positions_behind, scoring_branches
from ...compress.surgery.stream_form import choose_stream_form
from ...core.errors import InputError, UnsupportedModel
from . import centring
from .attention import attention
from .attention_inputs import AttentionRows
from .coverage import reason_against
from .dense_outputs import DenseOutputs, form_for_outputs
from .ffn import ffn
from .form import Form
from .graph import Array, Graph, State, entries_below
from .head import head
from .positions import Positions
from .rows import (
    Linear,
    Norm,
    first_tokens,
    gather_channels,
    linear,
    norm,
    scatter_array,
    scatter_channels,
)
from .select import ScoringAttention, SelectionWriter, random_places
from .stem import stem
from .stream import Stream


def write_network(
    model: CompactModel,
    form: Form,
    *,
    batch: int | str = 1,
    linears: Literal["gemm", "product", "int8"] = "gemm",
    weight_bits: int = 8,
    opset: int | None = None,
    outputs: Sequence[OutputSpec] = (),
    share_maps: bool = False,
) -> onnx.ModelProto:
    """Write a model in one form.

    Args:
        model: A `CompactModel`; any timm model that `lift` reads becomes one.
        form: The form. Matrix rows hold one image.
        batch: Images in a batch, or the name of a free dimension.
        linears: Linears as Gemm where rows are a matrix, as MatMul and Add, or in eight bits.
        weight_bits: Bits of eight-bit weights; 7 where the processor's eight-bit products saturate.
        opset: Version of the standard's operators, at least the form's; None for the form's.
        outputs: The named outputs; empty for the logits alone.
        share_maps: Whether selections by column attention read the maps that the attention itself
            computes. Only for `gemm` graphs that stay in single precision: in others, scores need
            maps of their own.

    Returns:
        A graph `images` -> `logits`, or the named outputs. That it computes the same function is
        checked by the exporter, on every artifact.

    Raises:
        InputError: The form cannot hold the batch or the opset.
        UnsupportedModel: No form has a rule for a part of the model; the message names it.
    """
    _check(model.architecture, form, batch, opset)
    if model.architecture.pool.kind == "none" and not outputs:
        raise UnsupportedModel("the graph forms have no rule for tokens as logits; name outputs")
    form = form_for_outputs(form, model.architecture, outputs)
    if form.stream == "cheaper":
        model = choose_stream_form(model).model
    architecture = model.architecture
    state = {
        name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()
    }
    graph = Graph([output.name for output in outputs])
    graph.linears, graph.weight_bits, graph.operators = linears, weight_bits, form.operators
    if form.norm == "centred-rms" and centring.applicable(architecture):
        architecture, state = centring.centre(architecture, state, logits_only=not outputs)
        graph.runtime_norm = True
    selections = SelectionWriter(
        graph, form, architecture, state, random_places(model), one_image=batch == 1
    )
    share_maps = share_maps and linears == "gemm"
    writer = _StepWriter(graph, form, architecture, selections, share_maps=share_maps)
    rows = stem(graph, form, architecture, state, batch=batch, padding=writer.padding)
    stream = Stream(graph, form, rows)
    dense = DenseOutputs(graph, form, architecture, outputs)
    dense.after_steps(stream, 0)
    shorter = form.last_queries or architecture.last_queries
    shorter = shorter and not needs_all_tokens(architecture, outputs)
    counts = architecture.step_tokens(last_queries=shorter)
    for number, (step, count) in enumerate(zip(architecture.steps, counts, strict=True)):
        writer.select(stream, number)
        writer.step(stream, step, entries_below(state, f"steps.{number}"), count)
        dense.after_steps(stream, number + 1)
    writer.select(stream, len(architecture.steps))
    if architecture.pooled_prefix and not dense.all_tokens:
        writer.keep_first(stream, architecture.pooled_prefix, "pooled")
    else:
        writer.keep_first(stream, writer.tokens, "real")
    logits = head(graph, form, architecture, state, stream, dense)
    return graph.model([batch, *architecture.image], dense.values(logits), opset or form.opset)


def _check(architecture: Architecture, form: Form, batch: int | str, opset: int | None) -> None:
    reason = reason_against(architecture)
    if reason is not None:
        raise UnsupportedModel(f"the graph forms have no rule for {reason}")
    if form.rows == "matrix" and batch != 1:
        raise InputError(
            f"form {form.name} holds one image, and batch {batch} was requested; "
            "use a form with batch rows"
        )
    if opset is not None and opset < form.opset:
        raise InputError(
            f"form {form.name} needs opset {form.opset}, and {opset} was requested; "
            "raise the opset or use another form"
        )


class _StepWriter:
    """Writes the sub-layers and the selections between them, one step after the other."""

    def __init__(
        self,
        graph: Graph,
        form: Form,
        architecture: Architecture,
        selections: SelectionWriter,
        *,
        share_maps: bool,
    ) -> None:
        self.graph, self.form, self.embed = graph, form, architecture.embed
        self.selections = selections
        # The attentions whose maps a selection reads.
        self.shared: frozenset[str] = frozenset()
        if share_maps:
            self.shared = scoring_branches(architecture, ("column-attention",))
        # The attention of the last step that was written, which may score patches.
        self.scored: ScoringAttention | None = None
        # Which tokens of the stem the stream carries, behind a selection; None: the first ones.
        self.positions: Positions | None = None
        # The tokens that the stream carries; further rows pad them to a multiple of the tile.
        self.tokens = architecture.tokens
        self.rows = self.tokens + -self.tokens % form.tile

    @property
    def padding(self) -> int:
        """Number of rows of the stream that are no tokens."""
        return self.rows - self.tokens

    def keep_first(self, stream: Stream, count: int, name: str) -> None:
        """Drop all rows of the stream but the first `count` tokens."""
        if count < self.rows:
            stream.keep_first(count, name)
        self.tokens = self.rows = count

    def step(self, stream: Stream, step: tuple[BranchSpec, ...], state: State, count: int) -> None:
        """Write parallel branches, which all read the stream as it was before the step.

        Args:
            stream: The residual stream.
            step: The branches.
            state: Weights of the step.
            count: Number of tokens that are computed, and that the stream carries afterwards.
        """
        parts = [entries_below(state, str(position)) for position in range(len(step))]
        # Keys are all tokens that came in; everything else reads those that stay.
        inputs = [
            self._read(stream, branch, part) if isinstance(branch.core, AttentionSpec) else ""
            for branch, part in zip(step, parts, strict=True)
        ]
        tokens, padding, before = self.tokens, self.padding, self.rows
        self.scored = None
        for branch, part, x in zip(step, parts, inputs, strict=True):
            if isinstance(branch.core, AttentionSpec):
                core = entries_below(part, "core")
                self.scored = ScoringAttention(
                    branch.core, core, x, tokens, padding, positions=self.positions
                )
        if count < tokens:
            self._drop(stream, count, f"{step[0].name if step else 'step'}.kept")
        inputs = [
            self._read(stream, branch, part) if isinstance(branch.core, FfnSpec) else x
            for branch, part, x in zip(step, parts, inputs, strict=True)
        ]
        for branch, part, x in zip(step, parts, inputs, strict=True):
            name, core = branch.name, entries_below(part, "core")
            if isinstance(branch.core, ConstantSpec):
                self._write_constant(stream, branch, part, core["value"])
                continue
            if isinstance(branch.core, AttentionSpec):
                queries, query_count = x, None
                if self.rows < before:
                    query_count = self.rows
                    queries = first_tokens(self.graph, self.form, x, self.rows, f"{name}.queries")
                rows = AttentionRows(x, queries, tokens, padding, query_count, self.positions)
                keeps = query_count is None and name in self.shared
                y, out, maps = attention(
                    self.graph, self.form, branch.core, core, rows, name, keep_maps=keeps
                )
                if maps is not None and self.scored is not None:
                    self.scored = replace(self.scored, maps=maps)
            else:
                y, out = ffn(self.graph, self.form, branch.core, core, x, name)
            self._write(stream, branch, part, y, out)

    def select(self, stream: Stream, at: int) -> None:
        """Write the selections after `at` steps."""
        architecture = self.selections.architecture
        for number, spec in enumerate(architecture.selects):
            if spec.at != at:
                continue
            count = architecture.prefix + spec.left
            rows = self._rows_of(count)
            chosen = self.selections.write(stream, number, self.tokens, rows - count, self.scored)
            self.tokens, self.rows = count, rows
            if reads_positions_behind(architecture, at):
                before = self.positions
                self.positions = chosen if before is None else before.of(self.graph, chosen)

    def _rows_of(self, count: int) -> int:
        """The rows of `count` tokens in whole tiles."""
        # Fewer tokens than a tile are cheaper unpadded, as the class token alone.
        return count + -count % self.form.tile if count >= self.form.tile else count

    def _drop(self, stream: Stream, count: int, name: str) -> None:
        """Let the stream carry `count` tokens; some that it dropped may fill up the last tile."""
        rows = min(self._rows_of(count), self.rows)
        if rows < self.rows:
            stream.keep_first(rows, name)
        self.tokens, self.rows = count, rows

    def _read(self, stream: Stream, branch: BranchSpec, part: State) -> str:
        name = f"{branch.name}.norm"
        layer = None if branch.norm is None else Norm.of(branch.norm, part, "norm")
        if branch.reads is None and layer is not None:
            return stream.read_normed(layer, name)
        x = stream.read(f"{branch.name}.stream")
        if branch.reads is not None:
            x = gather_channels(self.graph, x, branch.reads, self.embed, f"{branch.name}.reads")
        return x if layer is None else norm(self.graph, x, layer, name)

    def _write_constant(
        self, stream: Stream, branch: BranchSpec, part: State, vector: Array
    ) -> None:
        if branch.layer_scale:
            vector = vector * part["layer_scale"]
        if branch.writes is not None:
            vector = scatter_array(vector, branch.writes, self.embed)
        stream.write_constant(vector, branch.name)

    def _write(self, stream: Stream, branch: BranchSpec, part: State, y: str, out: Linear) -> None:
        scale = part["layer_scale"] if branch.layer_scale else None
        if branch.post_norm is not None:
            layer = Norm.of(branch.post_norm, part, "post_norm")
            self._write_normed(stream, branch, _scaled_norm(layer, scale), y, out)
            return
        graph, form, writes, name = self.graph, self.form, branch.writes, f"{branch.name}.out"
        weight, bias = out.weight, out.bias
        if scale is not None:
            weight, bias = weight * scale, None if bias is None else bias * scale
        if writes is not None and form.stream == "dense":
            weight = scatter_array(weight, writes, self.embed)
            bias = None if bias is None else scatter_array(bias, writes, self.embed)
            writes = None
        if writes is None and stream.defers:
            y = linear(graph, form, y, Linear(weight, None), name)
            stream.write(y, bias, branch.name)
            return
        y = linear(graph, form, y, Linear(weight, bias), name)
        if writes is not None and form.rows == "matrix":
            stream.write_by_index(y, writes, self.rows, branch.name)
            return
        if writes is not None:
            y = scatter_channels(graph, y, writes, self.embed, f"{branch.name}.scattered")
        stream.write(y, None, branch.name)

    def _write_normed(
        self, stream: Stream, branch: BranchSpec, layer: Norm, y: str, out: Linear
    ) -> None:
        y = linear(self.graph, self.form, y, out, f"{branch.name}.out")
        y = norm(self.graph, y, layer, f"{branch.name}.post_norm")
        if branch.writes is not None:
            name = f"{branch.name}.scattered"
            y = scatter_channels(self.graph, y, branch.writes, self.embed, name)
        stream.write(y, None, branch.name)


def _scaled_norm(layer: Norm, scale: Array | None) -> Norm:
    """Fold LayerScale into a norm."""
    if scale is None:
        return layer
    weight = scale if layer.weight is None else layer.weight * scale
    return Norm(layer.spec, weight, None if layer.bias is None else layer.bias * scale)
