"""From the residual stream to logits, or to features: the last norm, pooling and the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...compress.network.architecture import Architecture
from ...compress.network.named_outputs import OutputSpec
from .attention import LOG2_E, Attend
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
from .outputs import write_output
from .packing import padded_heads
from .program import Value
from .row_kernels import first_columns, largest_of_rows
from .sublayers import ffn, norm_keys


def head(
    emitter: Emitter,
    architecture: Architecture,
    state: State,
    stream: Stream,
    outputs: Sequence[OutputSpec] = (),
) -> dict[str, Value]:
    """Emit what follows the last sub-layer.

    Args:
        emitter: Receives the calls.
        architecture: The network.
        state: The parameters of the network.
        stream: The residual stream.
        outputs: The named outputs; empty for the logits alone.

    Returns:
        Logits (batch, classes), or features without a classifier, and the other outputs that
        follow the final norm, by name.
    """
    kind, rows = architecture.pool.kind, architecture.pooled_prefix
    kinds = {output.kind for output in outputs}
    tokens = bool(kinds & {"tokens", "patches"})
    if rows and stream.rows != rows and not tokens:
        stream = stream.first_rows(rows)
    # An output is what a norm computes, weight and bias included.
    whole = tokens or "features" in kinds
    source = _normed(emitter, architecture, state, stream, whole=whole)
    found = _token_outputs(emitter, source.stream, outputs)
    if kinds and not kinds & {"logits", "features"}:
        return found
    if rows and source.stream.rows != rows:
        source = replace(source, stream=source.stream.first_rows(rows))
    if kind == "attention":
        pooled = _attention_pool(emitter, architecture, sub_state(state, "pool"), source)
        source = ProductInput(pooled)
    elif kind in ("mean", "mean_all"):
        skipped = architecture.prefix if kind == "mean" else 0
        source = ProductInput(emitter.mean(source.stream, skipped), source.transform)
    if architecture.pool_norm is not None:
        parameters = affine(state, "pool_norm")
        # The first norm chooses the columns; before attention its product has chosen them.
        chooses = architecture.norm is None and kind != "attention" and not whole
        last = architecture.head is None or whole
        normed = emitter.norm(
            source.stream,
            architecture.pool_norm,
            columns=architecture.head_reads if chooses else None,
            affine=parameters if last else None,
        )
        transform = InputTransform() if last else InputTransform(*parameters)
        source = ProductInput(normed, transform)
    if "features" in kinds:
        headless = architecture.model_copy(update={"head": None})
        found["features"] = _classify(emitter, headless, state, source)
    if not outputs or "logits" in kinds:
        classify = _classify_densely if kind == "dense" else _classify
        found["logits"] = classify(emitter, architecture, state, source)
    return found


def _token_outputs(
    emitter: Emitter, normed: Stream, outputs: Sequence[OutputSpec]
) -> dict[str, Value]:
    """The outputs that are normed tokens."""
    return {
        output.name: write_output(emitter, normed, output)
        for output in outputs
        if output.kind in ("tokens", "patches")
    }


def _normed(
    emitter: Emitter, architecture: Architecture, state: State, stream: Stream, *, whole: bool
) -> ProductInput:
    """The rows that pooling reads.

    A product after a mean absorbs the norm's weight and bias; a second norm does not, nor does an
    output.

    Args:
        emitter: Receives the calls.
        architecture: The network.
        state: The parameters of the network.
        stream: The residual stream.
        whole: Whether the rows are an output, so that nothing is absorbed.
    """
    attends = architecture.pool.kind == "attention"
    absorbed = attends or (architecture.pool_norm is None and architecture.head is not None)
    absorbed = absorbed and not whole
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
    if whole and reads is not None:
        selected = InputTransform.select(reads, architecture.embed)
        columns = selected.fold_into(Matrix(np.eye(len(reads), dtype=np.float32), None))
        return ProductInput(emitter.dense(stream, stream.rows, columns, force_fp32=True))
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
    mixed, _ = emitter.attend(spec, queries, keys_values, only_products=True)
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
    if not distilled:
        if spec is None and transform.identity and architecture.feature_writes is None:
            return _first_columns(emitter, stream.first_rows(1), classes)
        return _first_columns(emitter, _logits(emitter, architecture, state, source, 1), classes)
    if spec is None:
        matrix = other = transform.fold_into(_feature_positions(architecture))
    else:
        if "pre_head.weight" in state:
            before = transform.fold_into(linear(state, "pre_head"))
            stream = emitter.dense(stream, stream.rows, before, Epilogue(spec.hidden_act))
            transform = InputTransform()
        matrix = transform.fold_into(linear(state, "head"))
        other = transform.fold_into(linear(state, "head_dist"))
    matrix = _mean_of_classifiers(matrix, other, stream.width)
    width = 2 * stream.width
    stream = Stream(emitter.contiguous(stream).value, 1, width, width)
    epilogue = Epilogue("identity" if spec is None else spec.act)
    logits = emitter.dense(stream, 1, matrix, epilogue, force_fp32=spec is None)
    return _first_columns(emitter, logits, classes)


def _logits(
    emitter: Emitter,
    architecture: Architecture,
    state: State,
    source: ProductInput,
    rows: int,
    *,
    classifier: str = "head",
    skipped: int = 0,
    residual: Stream | None = None,
) -> Stream:
    """One classifier's logits of some rows of each image, or the rows in the features' places.

    Args:
        emitter: Receives the calls.
        architecture: The network.
        state: The parameters of the network.
        source: The normed rows.
        rows: How many rows of each image are classified.
        classifier: Name of the classifier.
        skipped: The first rows of each image that are skipped.
        residual: Added to the logits.
    """
    spec, stream, transform = architecture.head, source.stream, source.transform
    if spec is None:
        matrix = _feature_positions(architecture)
    else:
        if "pre_head.weight" in state:
            before, act = transform.fold_into(linear(state, "pre_head")), Epilogue(spec.hidden_act)
            stream = emitter.dense(stream, rows, before, act, skipped=skipped)
            transform, skipped = InputTransform(), 0
        matrix = linear(state, classifier)
    return emitter.dense(
        stream,
        rows,
        transform.fold_into(matrix),
        Epilogue("identity" if spec is None else spec.act, residual=residual),
        skipped=skipped,
        force_fp32=spec is None,
    )


def _classify_densely(
    emitter: Emitter, architecture: Architecture, state: State, source: ProductInput
) -> Value:
    """The logits of the class token plus half of the largest logits of the patches."""
    prefix, batch, lanes = architecture.prefix, emitter.batch, emitter.lanes
    count = source.stream.rows - prefix
    each = _logits(
        emitter, architecture, state, source, count, classifier="head_dist", skipped=prefix
    )
    best = emitter.program.call(
        "largest",
        ("largest", count, each.layout),
        lambda: largest_of_rows(batch, count, each.layout, 0.5, lanes),
        [each.value],
        (batch * each.width,),
    )
    half = Stream(best, 1, each.width, each.used)
    logits = _logits(emitter, architecture, state, source, 1, residual=half)
    return _first_columns(emitter, logits, architecture.classes)


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
    stream = emitter.contiguous(stream)
    return emitter.program.call(
        "logits",
        ("columns", stream.width, kept),
        lambda: first_columns(emitter.batch, stream.width, kept),
        [stream.value],
        (emitter.batch, kept),
    )
