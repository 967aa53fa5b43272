"""Attention and FFN as calls of kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...compress.network.architecture import (
    AttentionSpec,
    BranchSpec,
    DifferentialSpec,
    FfnSpec,
    SelectSpec,
)
from .attention import LOG2_E, Attend
from .emitter import Emitter, Epilogue
from .head_norm import HeadNorm
from .key_packing import HeadColumns
from .matrices import (
    Affine,
    InputTransform,
    Matrix,
    Positions,
    ProductInput,
    State,
    Stream,
    SublayerOutput,
    affine,
    concatenate,
    linear,
)
from .packing import padded_heads
from .positions import rotate, score_bias
from .program import Value


@dataclass(frozen=True)
class Projected:
    """Rows of projected queries, and rows of keys and values; often the same rows.

    Attributes:
        queries: Rows that contain the queries.
        keys_values: Rows that contain keys and values.
        first: The first columns of queries, keys and values.
        positions: Which tokens of the stem the rows are; None: the first ones.
    """

    queries: Stream
    keys_values: Stream
    first: tuple[int, int, int]
    positions: Positions | None = None

    def with_queries(self, stream: Stream) -> Projected:
        """The same with other queries."""
        if self.keys_values is self.queries:
            return replace(self, queries=stream, keys_values=stream)
        return replace(self, queries=stream)

    def with_keys(self, stream: Stream) -> Projected:
        """The same with other keys."""
        if self.keys_values is self.queries:
            return replace(self, queries=stream, keys_values=stream)
        return replace(self, keys_values=stream)

    def attend(self, emitter: Emitter, core: AttentionSpec, rows: int) -> Attend:
        """The attention of the first `rows` queries of each image."""
        at_queries, at_keys, at_values = self.first
        values = emitter.lanes.up(core.v) if at_values < self.keys_values.used else 0
        return Attend(
            images=emitter.batch,
            heads=core.heads * core.parts,
            tokens=self.keys_values.rows,
            query_rows=rows,
            source=self.queries.layout,
            queries=HeadColumns(self.queries.width, at_queries, core.qk),
            keys=HeadColumns(self.keys_values.width, at_keys, core.qk),
            values=HeadColumns(self.keys_values.width, at_values, values),
            biased=core.bias is not None,
            bias_by_image=core.bias is not None and self.positions is not None,
        )


@dataclass(frozen=True)
class Columns:
    """What an attention has computed, for a selection that scores patches by it.

    Attributes:
        sums: How much all tokens attend to each, by head.
        projected: The queries, keys and values.
    """

    sums: Value
    projected: Projected


def attention(
    emitter: Emitter,
    source: ProductInput,
    core: AttentionSpec,
    state: State,
    output: SublayerOutput,
    *,
    keep_columns: bool = False,
) -> tuple[Stream, Columns | None]:
    """Emit an attention sub-layer, from the projections to the output projection.

    Args:
        emitter: Receives the calls.
        source: What the projections read.
        core: The attention.
        state: Its parameters.
        output: The output projection, for how many rows, and the residual stream.
        keep_columns: Return how much all tokens attend to each, too.
    """
    projected = project(emitter, source, core, state, output.rows)
    found, sums = _attend(emitter, projected, core, state, output.rows, columns=keep_columns)
    columns = None if sums is None else Columns(sums, projected)
    gain = 1.0
    if core.differential is not None:
        gain = 1.0 - core.differential.start
        before = gain if core.head_norm is None else 1.0
        subtracted = before * differential_lambda(core.differential, state)
        found = emitter.combine_pairs(found, core.heads, (before, -subtracted))
    if core.head_norm is not None:
        spec = HeadNorm(
            rows=emitter.batch * output.rows,
            width=found.width,
            first=0,
            heads=core.heads,
            norm=core.head_norm,
            per_head=core.head_norm_per_head,
            stride=emitter.lanes.up(core.v),
        )
        found = emitter.head_norm(found, spec, affine(state, "head_norm"), gain)
    return _project_output(emitter, source, core, state, found, output), columns


def project(
    emitter: Emitter,
    source: ProductInput,
    core: AttentionSpec,
    state: State,
    rows: int,
    *,
    values: bool = True,
    force_fp32: bool = False,
) -> Projected:
    """Emit queries, keys and values: one product, or two if there are fewer queries than tokens.

    Args:
        emitter: Receives the calls.
        source: What the projections read.
        core: The attention.
        state: Its parameters.
        rows: Queries of each image, those of the first rows.
        values: Whether values are computed; otherwise there are only queries and keys.
        force_fp32: Compute in fp32 in any precision.
    """
    x, transform, heads = source.stream, source.transform, core.heads
    # Differential attention has two maps a head, each with its own queries and keys, over the same
    # values.
    maps, width = heads * core.parts, emitter.lanes.up(core.v)
    q, k, v = (linear(state, name) for name in "qkv")
    if core.kv_of is not None:
        # Grouped keys and values: copied weights cost less than a kernel that looks up the group.
        k, v = k.select_heads(core.kv_of, core.qk), v.select_heads(core.kv_of, core.v)
    if core.q_norm is None:
        q = q.scaled(np.float32(core.scale * LOG2_E))
    v = v.with_padded_heads(heads, width)
    if maps > heads:
        v = v.select_heads(tuple(number // core.parts for number in range(maps)), width)
    others = [k, v] if values else [k]
    if rows == x.rows:
        matrix = transform.fold_into(concatenate([q, *others]))
        joined = emitter.dense(x, rows, matrix, force_fp32=force_fp32)
        projected = Projected(joined, joined, (0, maps * core.qk, 2 * maps * core.qk))
    else:
        queries = emitter.dense(x, rows, transform.fold_into(q), force_fp32=force_fp32)
        matrix = transform.fold_into(concatenate(others))
        keys_values = emitter.dense(x, x.rows, matrix, force_fp32=force_fp32)
        projected = Projected(queries, keys_values, (0, 0, maps * core.qk))
    projected = replace(projected, positions=source.positions)
    return _prepare_scores(emitter, projected, core, state)


def _prepare_scores(
    emitter: Emitter, projected: Projected, core: AttentionSpec, state: State
) -> Projected:
    """Norms and rotary positions of queries and keys."""
    at_queries, at_keys, _ = projected.first
    maps = core.heads * core.parts
    if core.q_norm is not None:
        queries = projected.queries
        spec = HeadNorm(
            emitter.batch * queries.rows,
            queries.width,
            at_queries,
            maps,
            core.q_norm,
            core.qk_norm_per_head,
        )
        scale = core.scale * LOG2_E
        normed = emitter.head_norm(queries, spec, affine(state, "q_norm"), scale)
        projected = projected.with_queries(normed)
    if core.k_norm is not None:
        keys = projected.keys_values
        normed = norm_keys(emitter, keys, at_keys, core, _key_affine(core, state))
        projected = projected.with_keys(normed)
    if core.rope is not None:
        positions = projected.positions
        rotated = rotate(emitter, projected.queries, at_queries, core, state, positions)
        projected = projected.with_queries(rotated)
        rotated = rotate(emitter, projected.keys_values, at_keys, core, state, positions)
        projected = projected.with_keys(rotated)
    return projected


def _key_affine(core: AttentionSpec, state: State) -> Affine:
    """Weight and bias of the keys' norm, of each head's own keys where these are shared."""
    weight, bias = affine(state, "k_norm")
    if not core.qk_norm_per_head or core.kv_of is None:
        return weight, bias
    heads = list(core.kv_of)
    weight, bias = (
        part[heads] if part is not None and part.ndim == 2 else part for part in (weight, bias)
    )
    return weight, bias


def norm_keys(
    emitter: Emitter, x: Stream, first: int, core: AttentionSpec, parameters: Affine
) -> Stream:
    """Emit the norm of keys.

    Args:
        emitter: Receives the call.
        x: Rows that contain the keys.
        first: The first column of the keys.
        core: The attention.
        parameters: Weight and bias of the norm.
    """
    assert core.k_norm is not None
    maps = core.heads * core.parts
    spec = HeadNorm(
        emitter.batch * x.rows, x.width, first, maps, core.k_norm, core.qk_norm_per_head
    )
    return emitter.head_norm(x, spec, parameters)


def _attend(
    emitter: Emitter,
    projected: Projected,
    core: AttentionSpec,
    state: State,
    rows: int,
    *,
    columns: bool,
) -> tuple[Stream, Value | None]:
    """The heads' sums of values, side by side; and the sums of columns, if any."""
    queries, keys_values = projected.queries, projected.keys_values
    spec = replace(projected.attend(emitter, core, rows), columns=columns)
    bias = score_bias(emitter, core, state, (rows, keys_values.rows), projected.positions)
    only_products = (
        not core.gated
        and core.out_norm is None
        and core.head_norm is None
        and core.differential is None
    )
    return emitter.attend(spec, queries, keys_values, bias, only_products=only_products)


def _project_output(
    emitter: Emitter,
    source: ProductInput,
    core: AttentionSpec,
    state: State,
    found: Stream,
    output: SublayerOutput,
) -> Stream:
    """The norm over all heads, the gate, and the output projection."""
    heads, width, matrix = core.heads, emitter.lanes.up(core.v), output.matrix
    padded = width != core.v
    projection = Matrix(padded_heads(matrix.weight.T, heads, width).T, matrix.bias)
    gate = linear(state, "gate") if core.gated else None
    if gate is not None and not (core.out_norm is not None and padded):
        gate = gate.with_padded_heads(heads, width)
    if core.out_norm is not None:
        columns = None
        if padded:
            own = range(core.v)
            columns = tuple(head * width + column for head in range(heads) for column in own)
            projection = matrix
        parameters = affine(state, "out_norm")
        # A gate is between the norm and the projection, which then cannot absorb weight and bias.
        found = emitter.norm(
            found,
            core.out_norm,
            columns=columns,
            affine=parameters if gate is not None else None,
            only_products=gate is None,
        )
        if gate is None:
            projection = InputTransform(*parameters).fold_into(projection)
    if gate is not None:
        found = emitter.dense(
            source.stream,
            output.rows,
            source.transform.fold_into(gate),
            Epilogue("sigmoid", factor=found),
        )
    return emitter.dense(found, output.rows, projection, Epilogue(residual=output.residual))


def differential_lambda(spec: DifferentialSpec, state: State) -> float:
    """λ, the factor of the second attention map, which is subtracted from the first.

    References:
        Ye et al. 2024, "Differential Transformer", eq. 2.
    """
    vectors = state["differential.vectors"].astype(np.float64)
    first, second = np.exp(vectors if spec.dual else (vectors[0::2] * vectors[1::2]).sum(axis=-1))
    return float(first - second + spec.start)


def read_stream(
    emitter: Emitter,
    stream: Stream,
    spec: BranchSpec | SelectSpec,
    state: State,
    *,
    only_products: bool,
) -> ProductInput:
    """Emit the norm of what a sub-layer or a predictor reads.

    Args:
        emitter: Receives the call.
        stream: The residual stream.
        spec: The norm, and the channels that are read.
        state: The parameters of the sub-layer, with those of the norm.
        only_products: Only products read the result, so that it may be quantized.

    Returns:
        What the products read; they absorb the norm's weight and bias.
    """
    if spec.norm is not None:
        x = emitter.norm(stream, spec.norm, columns=spec.reads, only_products=only_products)
        return ProductInput(x, InputTransform(*affine(state, "norm")), stream.positions)
    if spec.reads is None:
        return ProductInput(stream, positions=stream.positions)
    selected = InputTransform.select(spec.reads, stream.used)
    return ProductInput(stream, selected, stream.positions)


def ffn(
    emitter: Emitter,
    source: ProductInput,
    core: FfnSpec,
    state: State,
    output: SublayerOutput,
) -> Stream:
    """Emit an FFN sub-layer: the hidden layer, gated or not, its norm, and the last linear layer.

    Args:
        emitter: Receives the calls.
        source: What the hidden layer reads.
        core: The FFN.
        state: Its parameters.
        output: The last linear layer, for how many rows, and the residual stream.
    """
    x, rows, transform = source.stream, output.rows, source.transform
    matrix, only_products = output.matrix, core.norm is None
    first = transform.fold_into(linear(state, "fc1"))
    if core.gated:
        plain = emitter.dense(x, rows, first)
        gate = transform.fold_into(linear(state, "gate"))
        epilogue = Epilogue(core.act, factor=plain, only_products=only_products)
        hidden = emitter.dense(x, rows, gate, epilogue)
    else:
        hidden = emitter.dense(x, rows, first, Epilogue(core.act, only_products=only_products))
    if core.norm is not None:
        hidden = emitter.norm(hidden, core.norm, only_products=True)
        matrix = InputTransform(*affine(state, "norm")).fold_into(matrix)
    return emitter.dense(hidden, rows, matrix, Epilogue(residual=output.residual))
