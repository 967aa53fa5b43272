"""From the residual stream to logits, or to features: the last norm, pooling and the classifier."""

from __future__ import annotations

import numpy as np

from ...compress.network.architecture import Architecture
from .attention import Attend
from .emitter import Emitter, Epilogue
from .key_packing import HeadColumns
from .matrices import (
    InputTransform,
    Matrix,
    ProductInput,
    State,
    Stream,
    SublayerOutput,
    affine,
    concatenate,
    linear,
    sub_state,
)
from .packing import padded_heads
from .program import Value
from .row_kernels import first_columns
from .sublayers import LOG2_E, ffn, norm_keys


def head(emitter: Emitter, architecture: Architecture, state: State, stream: Stream) -> Value:
    """Emit what follows the last sub-layer.

    Args:
        emitter: Receives the calls.
        architecture: The network.
        state: The parameters of the network.
        stream: The residual stream.

    Returns:
        Logits (batch, classes), or features without a classifier.
    """
    kind, rows = architecture.pool.kind, architecture.pooled_prefix
    if rows and stream.rows != rows:
        stream = emitter.first_rows(stream, rows)
    source = _normed(emitter, architecture, state, stream)
    if kind == "attention":
        pooled = _attention_pool(emitter, architecture, sub_state(state, "pool"), source)
        source = ProductInput(pooled)
    elif kind in ("mean", "mean_all"):
        skipped = architecture.prefix if kind == "mean" else 0
        source = ProductInput(emitter.mean(source.stream, skipped), source.transform)
    if architecture.pool_norm is not None:
        parameters = affine(state, "pool_norm")
        # The first norm chooses the columns; before attention its product has chosen them.
        chooses = architecture.norm is None and kind != "attention"
        last = architecture.head is None
        normed = emitter.norm(
            source.stream,
            architecture.pool_norm,
            columns=architecture.head_reads if chooses else None,
            affine=parameters if last else None,
        )
        transform = InputTransform() if last else InputTransform(*parameters)
        source = ProductInput(normed, transform)
    return _classify(emitter, architecture, state, source)


def _normed(
    emitter: Emitter, architecture: Architecture, state: State, stream: Stream
) -> ProductInput:
    """The rows that pooling reads.

    A product after a mean absorbs the norm's weight and bias; a second norm does not.
    """
    attends = architecture.pool.kind == "attention"
    absorbed = attends or (architecture.pool_norm is None and architecture.head is not None)
    reads = architecture.head_reads
    if architecture.norm is not None:
        parameters = affine(state, "norm")
        rows = emitter.norm(
            stream,
            architecture.norm,
            columns=reads,
            affine=None if absorbed else parameters,
        )
        return ProductInput(rows, InputTransform(*parameters) if absorbed else InputTransform())
    if reads is None or (architecture.pool_norm is not None and not attends):
        return ProductInput(stream)
    return ProductInput(stream, InputTransform.select(reads, architecture.embed))


def _attention_pool(
    emitter: Emitter, architecture: Architecture, state: State, source: ProductInput
) -> Stream:
    """Attention of one learned query to all tokens, or to the patches; then perhaps an FFN."""
    pool = architecture.pool
    core = pool.attention
    assert core is not None
    heads, width = core.heads, emitter.lanes.up(core.v)
    skipped = 0 if pool.prefix else architecture.prefix
    tokens = source.stream.rows - skipped
    k, v = linear(state, "k"), linear(state, "v").with_padded_heads(core.heads, width)
    matrix = source.transform.fold_into(concatenate([k, v]))
    keys_values = emitter.dense(source.stream, tokens, matrix, skipped=skipped)
    if core.k_norm is not None:
        keys_values = norm_keys(emitter, keys_values, 0, core, affine(state, "k_norm"))
    # All images share the query.
    query = state["query"].ravel() * np.float32(core.scale * LOG2_E)
    queries = Stream(emitter.constant(query), 0, query.size, query.size)
    spec = Attend(
        images=emitter.batch,
        heads=heads,
        tokens=tokens,
        query_rows=1,
        source=queries.layout,
        queries=HeadColumns(queries.width, 0, core.qk),
        keys=HeadColumns(keys_values.width, 0, core.qk),
        values=HeadColumns(keys_values.width, heads * core.qk, width),
    )
    mixed = emitter.attend(spec, queries, keys_values, only_products=True)
    out = linear(state, "out")
    pooled = emitter.dense(mixed, 1, Matrix(padded_heads(out.weight.T, heads, width).T, out.bias))
    if pool.ffn is None:
        return pooled
    inner = ProductInput(pooled)
    if pool.norm is not None:
        normed = emitter.norm(pooled, pool.norm, only_products=True)
        inner = ProductInput(normed, InputTransform(*affine(state, "norm")))
    parameters = sub_state(state, "ffn")
    output = SublayerOutput(linear(parameters, "fc2"), 1, pooled)
    return ffn(emitter, inner, pool.ffn, parameters, output)


def _classify(
    emitter: Emitter, architecture: Architecture, state: State, source: ProductInput
) -> Value:
    """The classifier's logits of pooled rows, or the rows themselves without a classifier."""
    spec, classes = architecture.head, architecture.classes
    distilled = architecture.pool.kind == "distilled"
    stream, transform = source.stream, source.transform
    if spec is None:
        if transform.identity and architecture.feature_writes is None and not distilled:
            return _first_columns(emitter, stream, classes)
        matrix = other = transform.fold_into(_feature_positions(architecture))
    else:
        if "pre_head.weight" in state:
            before = transform.fold_into(linear(state, "pre_head"))
            stream = emitter.dense(stream, stream.rows, before, Epilogue(spec.hidden_act))
            transform = InputTransform()
        matrix = other = transform.fold_into(linear(state, "head"))
        if distilled:
            other = transform.fold_into(linear(state, "head_dist"))
    if distilled:
        matrix = _mean_of_classifiers(matrix, other, stream.width)
        stream = Stream(stream.value, 1, 2 * stream.width, 2 * stream.width)
    epilogue = Epilogue("identity" if spec is None else spec.act)
    logits = emitter.dense(stream, 1, matrix, epilogue, force_fp32=spec is None)
    return _first_columns(emitter, logits, classes)


def _feature_positions(architecture: Architecture) -> Matrix:
    """A matrix of zeros and ones that moves each feature to its column."""
    writes = architecture.feature_writes or range(architecture.classes)
    positions = np.zeros((len(writes), architecture.classes), np.float32)
    positions[range(len(writes)), list(writes)] = 1
    return Matrix(positions, None)


def _mean_of_classifiers(first: Matrix, second: Matrix, width: int) -> Matrix:
    """One classifier of two rows side by side: the mean of two classifiers of one row each.

    Args:
        first: The classifier of the first row.
        second: The classifier of the second row.
        width: Elements of a row, at least as many as the classifiers have inputs.
    """
    half = np.float32(0.5)
    gap = np.zeros((width - len(first.weight), first.weight.shape[1]), np.float32)
    weight = np.concatenate([first.weight, gap, second.weight, gap]) * half
    if first.bias is None or second.bias is None:
        return Matrix(weight, None)
    return Matrix(weight, (first.bias + second.bias) * half)


def _first_columns(emitter: Emitter, stream: Stream, kept: int) -> Value:
    return emitter.program.call(
        "logits",
        ("columns", stream.width, kept),
        lambda: first_columns(emitter.batch, stream.width, kept),
        [stream.value],
        (emitter.batch, kept),
    )
