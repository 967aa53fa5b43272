"""From the residual stream to logits, or to features where there is no classifier: norm, pooling,
classifier.
"""

from __future__ import annotations

import math

import numpy as np

from ...compress.network.architecture import Architecture
from .attention import Attend
from .emitter import Emitter
from .keys import Heads
from .matrices import Entering, Matrix, State, Stream, beside, from_torch, under
from .packing import padded_heads
from .program import Value
from .rows import first_columns
from .sublayers import attended, ffn

NOTHING = Entering(None, None)


def head(emitter: Emitter, architecture: Architecture, state: State, stream: Stream) -> Value:
    """Logits (batch, classes), or features."""
    kind, asked = architecture.pool.kind, architecture.pooled_prefix
    if asked and stream.rows != asked:
        stream = emitter.kept(stream, asked)
    stream, entering = _normed(emitter, architecture, state, stream)
    if kind == "attention":
        stream, entering = (
            _attention_pooled(emitter, architecture, under(state, "pool"), stream, entering),
            NOTHING,
        )
    elif kind in ("mean", "mean_all"):
        stream = emitter.mean(stream, architecture.prefix if kind == "mean" else 0)
    if architecture.pool_norm is not None:
        affine = (state.get("pool_norm.weight"), state.get("pool_norm.bias"))
        # The first norm that there is picks the columns; before attention its product has done so.
        picks = architecture.norm is None and kind != "attention"
        columns = architecture.head_reads if picks else None
        last = architecture.head is None
        stream = emitter.normed(
            stream, architecture.pool_norm, columns=columns, affine=affine if last else None
        )
        entering = NOTHING if last else Entering(*affine)
    return _answered(emitter, architecture, state, stream, entering)


def _normed(
    emitter: Emitter, architecture: Architecture, state: State, stream: Stream
) -> tuple[Stream, Entering]:
    """The rows that pooling reads, and what the product behind it still has to do: its weights go
    through a mean, but not through another norm.
    """
    foldable = architecture.pool.kind == "attention" or (
        architecture.pool_norm is None and architecture.head is not None
    )
    affine = (state.get("norm.weight"), state.get("norm.bias"))
    reads = architecture.head_reads
    if architecture.norm is not None:
        rows = emitter.normed(
            stream, architecture.norm, columns=reads, affine=None if foldable else affine
        )
        return rows, Entering(*affine) if foldable else NOTHING
    if reads is None or (
        architecture.pool_norm is not None and architecture.pool.kind != "attention"
    ):
        return stream, NOTHING
    selection = np.zeros((architecture.embed, len(reads)), np.float32)
    selection[list(reads), range(len(reads))] = 1
    return stream, Entering(None, None, selection)


def _attention_pooled(
    emitter: Emitter, architecture: Architecture, state: State, stream: Stream, entering: Entering
) -> Stream:
    """One learned query asks all tokens, or all patches; then perhaps an FFN."""
    pool, lanes = architecture.pool, emitter.lanes
    core = pool.attention
    assert core is not None
    heads, wide = core.heads, lanes.up(core.v)
    skipped = 0 if pool.prefix else architecture.prefix
    tokens = stream.rows - skipped
    k, v = (from_torch(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in "kv")
    v = Matrix(
        padded_heads(v.weight, heads, wide),
        None if v.bias is None else padded_heads(v.bias[None], heads, wide)[0],
    )
    answering = emitter.dense(stream, tokens, entering.into(beside([k, v])), skipped=skipped)
    if core.k_norm is not None:
        answering = emitter.keys_normed(answering, core, state)
    # Softmax by powers of two, as in every attention here; the query is the same for all images.
    query = state["query"].ravel() * np.float32(core.scale * math.log2(math.e))
    asking = Stream(emitter.program.constant(query), 0, query.size, query.size)
    at = heads * core.qk
    spec = Attend(
        emitter.batch,
        heads,
        tokens,
        1,
        asking.place,
        Heads(asking.width, 0, core.qk),
        Heads(answering.width, 0, core.qk),
        Heads(answering.width, at, wide),
    )
    mixed = attended(emitter, spec, asking, answering, for_products=True)
    out = from_torch(state["out.weight"], state.get("out.bias"))
    pooled = emitter.dense(mixed, 1, Matrix(padded_heads(out.weight.T, heads, wide).T, out.bias))
    if pool.ffn is None:
        return pooled
    x, inner = pooled, NOTHING
    if pool.norm is not None:
        x, inner = (
            emitter.normed(pooled, pool.norm, for_products=True),
            Entering(state.get("norm.weight"), state.get("norm.bias")),
        )
    parts = under(state, "ffn")
    return ffn(
        emitter,
        x,
        inner,
        pool.ffn,
        parts,
        from_torch(parts["fc2.weight"], parts.get("fc2.bias")),
        1,
        pooled,
    )


def _answered(
    emitter: Emitter, architecture: Architecture, state: State, stream: Stream, entering: Entering
) -> Value:
    """What the classifier makes of pooled rows, or they themselves where there is none."""
    spec, distilled = architecture.head, architecture.pool.kind == "distilled"
    classes, exact = architecture.classes, spec is None
    if spec is None:
        if entering.empty and architecture.feature_writes is None and not distilled:
            return _columns(emitter, stream, classes)
        # Each feature where it belongs: a matrix of ones and zeros.
        writes = architecture.feature_writes or range(classes)
        numbers = np.zeros((len(writes), classes), np.float32)
        numbers[range(len(writes)), list(writes)] = 1
        answer = other = entering.into(Matrix(numbers, None))
    else:
        if "pre_head.weight" in state:
            before = entering.into(from_torch(state["pre_head.weight"], state.get("pre_head.bias")))
            stream = emitter.dense(stream, stream.rows, before, act=spec.hidden_act)
            entering = NOTHING
        answer = other = entering.into(from_torch(state["head.weight"], state.get("head.bias")))
        if distilled:
            other = entering.into(
                from_torch(state["head_dist.weight"], state.get("head_dist.bias"))
            )
    if distilled:
        # The mean of two classifiers on two rows is one classifier on the rows side by side.
        gap = np.zeros((stream.width - len(answer.weight), classes), np.float32)
        weight = np.concatenate([answer.weight, gap, other.weight, gap]) * np.float32(0.5)
        bias = (
            None
            if answer.bias is None or other.bias is None
            else (answer.bias + other.bias) * np.float32(0.5)
        )
        stream, answer = (
            Stream(stream.value, 1, 2 * stream.width, 2 * stream.width),
            Matrix(weight, bias),
        )
    return _columns(
        emitter,
        emitter.dense(stream, 1, answer, act="identity" if spec is None else spec.act, exact=exact),
        classes,
    )


def _columns(emitter: Emitter, stream: Stream, wanted: int) -> Value:
    key = ("columns", stream.width, wanted)
    kernel = lambda: first_columns(emitter.batch, stream.width, wanted)
    return emitter.program.call("logits", key, kernel, [stream.value], (emitter.batch, wanted))
