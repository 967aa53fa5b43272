"""Selections of tokens by content: scores, the best patches by TopK, and one gather of rows.

The nodes of a selection are named after it. Those of its scores contain `SCORES`; reduced
precisions leave them in single precision, since rounding would change the choice. The value
`<name>/indices` (batch, kept) holds the chosen patches: int64, increasing, counted among the tokens
behind the prefix that the stream carries there. Of equal scores ONNX's TopK takes the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ...compress.network.architecture import Architecture, AttentionSpec, SelectSpec
from ...compress.network.modules.model import CompactModel
from ...compress.network.modules.select import Select, first_places
from ...compress.network.select_specs import folds_keys
from ...core.errors import UnsupportedModel
from ..graphs.model_proto import INDICES, SCORES
from .attention import AttentionMaps
from .attention_inputs import AttentionRows, AttentionWriter
from .attention_weights import fold, ungroup
from .ffn import activation
from .form import Form
from .graph import Array, Graph, State, entries_below
from .positions import Positions
from .rows import Linear, Norm, first_tokens, gather_channels, linear, norm, slice_tokens
from .stream import Stream


@dataclass(frozen=True)
class ScoringAttention:
    """The attention of the step before a selection.

    Attributes:
        spec: The attention.
        state: Its weights.
        x: The rows that it reads: `tokens` of them, then padding.
        tokens: Number of tokens among them.
        padding: Number of further rows.
        maps: What it has computed, where a selection may read that.
        positions: Which tokens of the stem the rows are; None: the first ones.
    """

    spec: AttentionSpec
    state: State
    x: str
    tokens: int
    padding: int
    maps: AttentionMaps | None = None
    positions: Positions | None = None


@dataclass(frozen=True)
class SelectionWriter:
    """Writes the selections of a network.

    Attributes:
        graph: Gets the nodes.
        form: Decides the layout of the rows.
        architecture: The network.
        state: Its weights.
        places: For each selection of scorer `random` the patches that it keeps.
        one_image: Whether a batch holds one image.
    """

    graph: Graph
    form: Form
    architecture: Architecture
    state: State
    places: dict[str, tuple[int, ...]]
    one_image: bool

    @property
    def matrix(self) -> bool:
        """Whether rows have no batch dimension."""
        return self.form.rows == "matrix"

    def write(
        self,
        stream: Stream,
        number: int,
        tokens: int,
        padding: int,
        scored: ScoringAttention | None,
    ) -> Positions:
        """Let the stream carry the chosen tokens only.

        Args:
            stream: The residual stream.
            number: The selection's number.
            tokens: Number of tokens that the stream carries; further rows pad it.
            padding: Number of rows without meaning to append to the chosen ones.
            scored: The attention that scores patches, where the selection needs one.

        Returns:
            The rows of the stream that it gathers, prefix tokens and padding among them.

        Raises:
            UnsupportedModel: The form's operators have no TopK.
        """
        graph, spec, prefix = (
            self.graph,
            self.architecture.selects[number],
            self.architecture.prefix,
        )
        name = spec.name
        if graph.operators == "pnnx":
            raise UnsupportedModel(
                f"{name}: pnnx converts no TopK; use another form, or export for onnxruntime"
            )
        # Padding is appended behind a fused token.
        behind = 0 if spec.fused else padding
        if spec.scorer == "random":
            kept = [*range(prefix), *(prefix + place for place in self.places[name]), *[0] * behind]
            index = graph.constant(f"{name}.rows", np.array(kept, np.int64))
            x = stream.read(name)
            stream.value = graph.node("Gather", [x, index], f"{name}.kept", axis=self._token_axis)
            return Positions(index, len(kept), by_image=False)
        if spec.scorer == "predictor":
            scores = self._predictor_scores(stream, number, tokens)
        else:
            assert scored is not None, "the architecture has validated the step before"
            scores = self._attention_scores(spec, scored, tokens)
        indices = self._best(spec, scores)
        x = stream.read(name)
        rows = self._rows(indices, spec, behind)
        y = self._gathered(x, rows, f"{name}.kept")
        stream.value = self._fused(spec, x, y, scores, tokens, padding) if spec.fused else y
        return rows

    @property
    def _token_axis(self) -> int:
        return 0 if self.matrix else 1

    def _best(self, spec: SelectSpec, scores: str) -> str:
        """The patches of the largest scores: (batch, patches) -> `<name>/indices` (batch, kept)."""
        graph, name = self.graph, spec.name
        count = graph.sizes([spec.patches])
        label = f"{name}.{SCORES}.best"
        best = graph.node_outputs("TopK", [scores, count], label, 2, axis=-1)
        inputs = [best[1], count]
        increasing = graph.node_outputs("TopK", inputs, f"{name}.sorted", 2, axis=-1, largest=0)
        indices = f"{name}{INDICES}"
        graph.rename(increasing[0], indices)
        return indices

    def _rows(self, indices: str, spec: SelectSpec, padding: int) -> Positions:
        """The rows to gather, prefix tokens first: of the patches `indices`, (batch, kept)."""
        graph, name, prefix = self.graph, spec.name, self.architecture.prefix
        offsets = np.array([*range(prefix), *[prefix] * spec.patches, *[0] * padding], np.int64)
        if prefix or padding:
            pads = graph.sizes([0, prefix, 0, padding])
            indices = graph.node("Pad", [indices, pads], f"{name}.places")
            constant = graph.constant(f"{name}.offsets", offsets)
            indices = graph.node("Add", [indices, constant], f"{name}.rows")
        by_image = not (self.matrix or self.one_image)
        rows = indices if by_image else graph.reshape(indices, [-1], f"{name}.kept.flat")
        return Positions(rows, len(offsets), by_image)

    def _gathered(self, x: str, rows: Positions, name: str) -> str:
        """Gather rows of each image."""
        graph = self.graph
        if not rows.by_image:
            return graph.node("Gather", [x, rows.value], name, axis=self._token_axis)
        each = graph.node("Unsqueeze", [rows.value, graph.sizes([-1])], f"{name}.each")
        return graph.node("GatherND", [x, each], name, batch_dims=1)

    def _fused(
        self, spec: SelectSpec, x: str, y: str, scores: str, tokens: int, padding: int
    ) -> str:
        """Append the sum of the dropped patches, each times its class attention, and padding."""
        graph, form, name = self.graph, self.form, f"{spec.name}.fused"
        prefix, indices = self.architecture.prefix, f"{spec.name}{INDICES}"
        patches = slice_tokens(graph, form, x, prefix, tokens, f"{name}.patches")
        kept = slice_tokens(graph, form, y, prefix, prefix + spec.patches, f"{name}.kept")
        if self.matrix or self.one_image:
            flat = graph.reshape(indices, [-1], f"{name}.places")
            weights = graph.node("Gather", [scores, flat], f"{name}.weights", axis=1)
        else:
            each = graph.node("Unsqueeze", [indices, graph.sizes([-1])], f"{name}.places")
            weights = graph.node("GatherND", [scores, each], f"{name}.weights", batch_dims=1)
        if not self.matrix:
            axis = graph.sizes([1])
            scores = graph.node("Unsqueeze", [scores, axis], f"{name}.all_rows")
            weights = graph.node("Unsqueeze", [weights, axis], f"{name}.kept_rows")
        whole = graph.node("MatMul", [scores, patches], f"{name}.whole")
        chosen = graph.node("MatMul", [weights, kept], f"{name}.chosen")
        rows = [y, graph.node("Sub", [whole, chosen], f"{name}.token")]
        if padding:
            rows.append(first_tokens(graph, form, x, padding, f"{name}.padding"))
        return graph.node("Concat", rows, name, axis=self._token_axis)

    def _predictor_scores(self, stream: Stream, number: int, tokens: int) -> str:
        """Scores by the predictor: (batch, patches)."""
        graph, form, spec = self.graph, self.form, self.architecture.selects[number]
        name = f"{spec.name}.{SCORES}"
        state = entries_below(self.state, f"selects.{number}")
        layer = None if spec.norm is None else Norm.of(spec.norm, state, "norm")
        if spec.reads is None and layer is not None:
            x = stream.read_normed(layer, f"{name}.norm")
        else:
            x = stream.read(f"{name}.stream")
        x = slice_tokens(graph, form, x, self.architecture.prefix, tokens, f"{name}.patches")
        if spec.reads is not None:
            x = gather_channels(graph, x, spec.reads, self.architecture.embed, f"{name}.reads")
            x = x if layer is None else norm(graph, x, layer, f"{name}.norm")
        assert spec.predictor is not None
        act, local = spec.predictor.act, spec.predictor.local
        state = entries_below(state, "predictor")

        def written(value: str, part: Linear, label: str) -> str:
            return linear(graph, form, value, part, f"{name}.{label}")

        first = Linear.of(state, "fc")
        # Two products instead of one whose columns would be sliced.
        own, shared = (_columns(first, part) for part in (slice(None, local), slice(local, None)))
        units = activation(graph, act, written(x, own, "local.units"), f"{name}.local.act")
        y = written(units, Linear.of(state, "local"), "local")
        if spec.predictor.pooled:
            units = activation(graph, act, written(x, shared, "pooled.units"), f"{name}.pooled.act")
            axes = graph.sizes([self._token_axis])
            mean = graph.node("ReduceMean", [units, axes], f"{name}.pooled.mean", keepdims=1)
            part = written(mean, Linear.of(state, "pooled"), "pooled")
            y = graph.node("Add", [y, part], f"{name}.joined")
        for place in range(len(spec.predictor.hidden)):
            y = activation(graph, act, y, f"{name}.{place}.act")
            y = written(y, Linear.of(state, f"rest.{place}"), f"rest.{place}")
        return graph.reshape(y, [1, -1] if self.matrix else [0, -1], name)

    def _attention_scores(self, spec: SelectSpec, scored: ScoringAttention, tokens: int) -> str:
        """Scores by the attention of the step before: (batch, patches)."""
        graph, name = self.graph, f"{spec.name}.{SCORES}"
        x = scored.x
        if scored.padding and scored.maps is None:
            x = first_tokens(graph, self.form, x, scored.tokens, f"{name}.real")
        rows = AttentionRows(x, x, scored.tokens, 0, None, scored.positions)
        core, state = ungroup(scored.spec, scored.state)
        form = replace(self.form, attention="split")
        writer = AttentionWriter(graph, form, core, fold(core, state), rows, name)
        if spec.scorer == "class-attention":
            row = first_tokens(graph, self.form, x, 1, f"{name}.class")
            writer = replace(writer, rows=replace(rows, queries=row, query_count=1))
            found = _class_weights(writer)
        else:
            found = _column_weights(writer, state, scored)
        # (…, 1, tokens before) -> (batch, patches that the stream still carries)
        prefix = self.architecture.prefix
        bounds = [graph.sizes([prefix]), graph.sizes([tokens]), graph.sizes([-1])]
        found = graph.node("Slice", [found, *bounds], f"{name}.patches")
        return found if self.matrix else graph.reshape(found, [0, -1], f"{name}.rows")


def random_places(model: CompactModel) -> dict[str, tuple[int, ...]]:
    """The patches that each selection of scorer `random` keeps, by its name."""
    found = {}
    for module in model.selects:
        assert isinstance(module, Select)
        if module.places is not None:
            order = module.places.detach().to("cpu", torch.float32)
            kept = first_places(order.unsqueeze(0), module.spec.patches)[0]
            found[module.spec.name] = tuple(kept.tolist())
    return found


def _columns(layer: Linear, columns: slice) -> Linear:
    bias = None if layer.bias is None else layer.bias[columns]
    return Linear(np.ascontiguousarray(layer.weight[:, columns]), bias)


def _head_factors(writer: AttentionWriter) -> Array:
    """What the maps of all heads are multiplied by in their mean, with λ where differential."""
    spec, lambda_ = writer.spec, writer.weights.lambda_
    first = np.full(spec.heads, 1.0 / spec.heads)
    factors = first if lambda_ is None else np.concatenate([first, -lambda_ * first])
    return factors.astype(np.float32)


def _class_weights(writer: AttentionWriter) -> str:
    """How much the first token attends to each, the mean of the heads: (…, 1, tokens)."""
    spec, graph = writer.spec, writer.graph
    if folds_keys(spec):
        scores = _folded_scores(writer)
    else:
        q, k, _ = writer.projections()
        scores = _scores(writer, q, k)
        scores = writer.reshape(scores, [spec.heads * spec.parts, -1], "maps.rows")
    maps = writer.node("Softmax", [scores], "softmax", axis=-1)
    factors = graph.constant(f"{writer.name}.heads", _head_factors(writer)[None])
    return writer.node("MatMul", [factors, maps], "mean")


def _folded_scores(writer: AttentionWriter) -> str:
    """q·(x Wk) of one query as (Wk q)·x, so that no key is computed: (…, heads, tokens)."""
    spec, weights, graph, x = writer.spec, writer.weights, writer.graph, writer.rows.x
    heads = spec.heads * spec.parts
    keys = weights.k.weight.reshape(-1, spec.kv_heads * spec.parts, spec.qk).transpose(1, 2, 0)
    if spec.kv_of is not None:
        keys = keys[list(spec.kv_of)]
    keys = np.ascontiguousarray(keys)
    q = writer.linear(writer.rows.queries, weights.q, "q")
    if weights.q_norm is not None:
        q = writer.reshape(q, [1, heads, spec.qk], "q.split")
        q = writer.head_norm(weights.q_norm, q, "q_norm")
    # Of one row, heads come first without a Transpose.
    q = writer.reshape(q, [heads, 1, spec.qk], "q.heads")
    folded = graph.product(q, keys, f"{writer.name}.k.weight", f"{writer.name}.q.folded")
    folded = writer.reshape(folded, [heads, -1], "q.rows")
    if writer.matrix:
        return writer.node("Gemm", [folded, x], "products", transB=1)
    transposed = writer.node("Transpose", [x], "x.transposed", perm=[0, 2, 1])
    return writer.node("MatMul", [folded, transposed], "products")


def _column_weights(writer: AttentionWriter, state: State, scored: ScoringAttention) -> str:
    """How much all tokens attend to each, times the length of its value: (…, 1, tokens)."""
    spec, graph, tokens, shared = writer.spec, writer.graph, scored.tokens, scored.maps
    factors = _head_factors(writer)
    if shared is None:
        q, k, _ = writer.projections()
        maps = writer.node("Softmax", [_scores(writer, q, k)], "softmax", axis=-1)
        v = writer.linear(writer.rows.x, Linear.of(state, "v"), "v")
        queries = np.ones(tokens, np.float32)
    else:
        maps, v = shared.weights, _shared_values(writer, shared)
        factors = factors / np.float32(shared.gain)
        # Rows that pad the tokens attend, too, and count nothing.
        queries = np.pad(np.ones(tokens, np.float32), (0, scored.padding))
    # All queries of all heads in one product.
    maps = writer.reshape(maps, [len(factors) * len(queries), tokens], "maps.rows")
    weights = np.outer(factors, queries).reshape(1, -1)
    attended = writer.node(
        "MatMul", [graph.constant(f"{writer.name}.queries", weights), maps], "attended"
    )
    readers = np.bincount(spec.kv_of or range(spec.heads), minlength=spec.kv_heads)
    counts = np.repeat(readers.astype(np.float32), spec.v)[:, None]
    square = writer.node("Mul", [v, v], "v.square")
    total = graph.product(square, counts, f"{writer.name}.readers", f"{writer.name}.v.total")
    length = writer.reshape(writer.node("Sqrt", [total], "v.length"), [1, -1], "v.row")
    return writer.node("Mul", [attended, length], "columns")


def _shared_values(writer: AttentionWriter, shared: AttentionMaps) -> str:
    """The attention's own values, with the bias that it folds away: (…, tokens, values)."""
    spec = writer.spec
    v = writer.reshape(shared.values, [-1, spec.kv_heads * spec.v], "v.rows")
    if shared.bias is None:
        return v
    bias = (shared.bias * shared.gain).astype(np.float32)
    return writer.node("Add", [v, writer.graph.constant(f"{writer.name}.v.bias", bias)], "v")


def _scores(writer: AttentionWriter, q: str, k: str) -> str:
    """Products of queries and keys, with the relative bias: (…, heads, queries, tokens)."""
    spec = writer.spec
    q = writer.transpose_heads(q, "q.heads")
    k = writer.node("Transpose", [k], "k.last", perm=[1, 2, 0] if writer.matrix else [0, 2, 3, 1])
    if spec.kv_of is not None:
        axis, heads = (0 if writer.matrix else 1), writer.graph.sizes(spec.kv_of)
        k = writer.node("Gather", [k, heads], "k.each", axis=axis)
    scores = writer.node("MatMul", [q, k], "products")
    bias = writer.relative_bias()
    return scores if bias is None else writer.node("Add", [scores, bias], "biased")
