"""Selections of tokens by content as calls of kernels: scores, the choice, and the rows that stay.

Scores are computed in fp32 in any precision, so that eight bits change a choice only through the
stream. In fp32 the scores of an attention use the queries and keys of the sub-layer itself; in
eight bits that of the class token needs no keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...compress.network.architecture import AttentionSpec, BranchSpec, SelectSpec
from ...compress.network.modules.select import Select, first_places
from ...compress.network.select_specs import folds_keys
from ...runtimes.tvm_engine import CHOICE_KERNEL
from .attention import LOG2_E
from .emitter import Emitter, Epilogue
from .head_norm import HeadNorm
from .key_packing import HeadColumns
from .matrices import Matrix, ProductInput, State, Stream, affine, linear, sub_state
from .positions import chosen_positions, score_bias
from .program import Value
from .sublayers import Columns, Projected, differential_lambda, project, read_stream
from .token_choice import Choose, Gather, choose_patches, gather_rows
from .token_scores import (
    FoldedQueries,
    JoinMaps,
    RowWeights,
    add_shared,
    column_sums,
    fold_queries,
    join_maps,
    row_lengths,
    row_weights,
)


@dataclass(frozen=True)
class ScoringAttention:
    """The sub-layer whose attention scores patches.

    Attributes:
        branch: The sub-layer.
        state: Its parameters.
        stream: The residual stream before it.
        columns: The sums of its columns, where it has computed them.
    """

    branch: BranchSpec
    state: State
    stream: Stream
    columns: Columns | None = None


def patch_scores(
    emitter: Emitter,
    x: Stream,
    select: Select,
    state: State,
    scored: ScoringAttention | None,
) -> Stream | None:
    """Emit the scores of a selection: rows of which the first number is the score.

    Args:
        emitter: Receives the calls.
        x: The residual stream.
        select: The selection.
        state: Its parameters.
        scored: The attention that scores patches, for the scorers that need one.

    Returns:
        The scores; None where the places do not depend on the image.
    """
    spec = select.spec
    if select.places is not None:
        return None
    if spec.predictor is not None:
        return _predict(emitter, x, select, state)
    assert scored is not None
    return _attention_scores(emitter, spec, scored, select.prefix, x.rows - select.prefix)


def keep_rows(
    emitter: Emitter,
    x: Stream,
    select: Select,
    scores: Stream | None,
    count: int,
    *,
    positioned: bool,
) -> tuple[Stream, Value]:
    """Emit the choice of `count` patches by their scores, and the rows that stay.

    Args:
        emitter: Receives the calls.
        x: The residual stream.
        select: The selection.
        scores: Its scores; None where the places do not depend on the image.
        count: How many patches stay.
        positioned: Whether something behind it reads which tokens these are.

    Returns:
        The stream behind it, and the chosen places among the patches, (batch, kept) int32, flat.
    """
    spec, prefix, batch = select.spec, select.prefix, emitter.batch
    patches = x.rows - prefix
    if scores is None:
        assert select.places is not None
        kept = first_places(select.places[None], count).numpy().astype(np.int32)
        chosen = emitter.constant(np.repeat(kept, batch, axis=0).ravel())
    else:
        choice = Choose(batch, patches, count, scores.layout)
        chosen = emitter.program.call(
            CHOICE_KERNEL,
            choice,
            lambda: choose_patches(choice, emitter.lanes, emitter.schedule.threads),
            [scores.value],
            (batch * count,),
            "int32",
        )
    gather = Gather(batch, prefix, patches, count, x.layout, spec.fused)
    operands = [x.value, chosen]
    if spec.fused:
        assert scores is not None
        operands.append(scores.value)
    value = emitter.program.call(
        "gather_rows",
        gather,
        lambda: gather_rows(gather, emitter.lanes, emitter.schedule.threads),
        operands,
        (batch * gather.rows * x.width,),
    )
    positions = None
    if positioned:
        positions = chosen_positions(emitter, chosen, prefix, count, x.positions)
    return Stream(value, gather.rows, x.width, x.used, positions=positions), chosen


def _predict(emitter: Emitter, x: Stream, select: Select, state: State) -> Stream:
    """The scores of a predictor: rows of which the first number is the score."""
    spec, prefix = select.spec.predictor, select.prefix
    assert spec is not None
    source = read_stream(emitter, x, select.spec, state, only_products=False)
    state, patches = sub_state(state, "predictor"), x.rows - prefix
    count, act = len(spec.hidden), spec.act
    units = emitter.dense(
        source.stream,
        patches,
        source.transform.fold_into(linear(state, "fc")),
        Epilogue(act),
        skipped=prefix,
        force_fp32=True,
    )
    after = act if count else "identity"
    local = linear(state, "local")
    if not spec.pooled:
        y = emitter.dense(units, patches, local, Epilogue(after), force_fp32=True)
    else:
        pooled = linear(state, "pooled").weight
        zeros = np.zeros((spec.local, pooled.shape[1]), np.float32)
        # The units of both kinds side by side: a product with one of them skips the other.
        shared = emitter.dense(
            emitter.mean(units, 0),
            1,
            Matrix(np.concatenate([zeros, pooled]), None),
            force_fp32=True,
        )
        y = emitter.dense(units, patches, local, force_fp32=True)
        y = _add_shared(emitter, y, shared, after)
    for number in range(count):
        last = number == count - 1
        layer = linear(state, f"rest.{number}")
        epilogue = Epilogue("identity" if last else act)
        y = emitter.dense(y, patches, layer, epilogue, force_fp32=True)
    return y


def _add_shared(emitter: Emitter, x: Stream, shared: Stream, act: str) -> Stream:
    """The activation of the rows plus one row that those of an image share."""
    value = emitter.program.call(
        "add_shared",
        ("add-shared", x.rows, x.layout, act),
        lambda: add_shared(emitter.batch, x.rows, x.layout, act, emitter.lanes),
        [x.value, shared.value],
        (emitter.batch * x.rows * x.width,),
    )
    return Stream(value, x.rows, x.width, x.used)


def _attention_scores(
    emitter: Emitter, spec: SelectSpec, scored: ScoringAttention, prefix: int, patches: int
) -> Stream:
    """The scores by an attention: the mean over its heads, one number a row."""
    core, tokens = scored.branch.core, scored.stream.rows
    assert isinstance(core, AttentionSpec)
    source = read_stream(emitter, scored.stream, scored.branch, scored.state, only_products=False)
    state = sub_state(scored.state, "core")
    lengths: Value | None = None
    factors = np.full(core.heads * core.parts, 1 / core.heads, np.float32)
    if spec.scorer == "column-attention":
        if scored.columns is not None:
            projected, maps = scored.columns.projected, scored.columns.sums
        else:
            projected = project(emitter, source, core, state, tokens, force_fp32=True)
            maps = _attention_columns(emitter, projected, core, state, tokens)
        lengths = _value_lengths(emitter, projected, core)
        # Values are repeated for each part of a head.
        factors /= np.float32(math.sqrt(core.parts))
    elif folds_keys(core) and not emitter.computes_fp32:
        maps = _folded_class_weights(emitter, source, core, state)
    else:
        # In fp32 these are the queries, keys and values of the sub-layer itself.
        fp32 = emitter.computes_fp32
        queries = prefix + patches if fp32 else 1
        projected = project(emitter, source, core, state, queries, values=fp32, force_fp32=True)
        maps = _attention_columns(emitter, projected, core, state, 1)
    if core.differential is not None:
        factors[1::2] *= -np.float32(differential_lambda(core.differential, state))
    join = JoinMaps(
        emitter.batch, len(factors), tokens, prefix, patches, lengths=lengths is not None
    )
    value = emitter.program.call(
        "join_maps",
        join,
        lambda: join_maps(join, emitter.lanes),
        [maps, emitter.constant(factors), *([] if lengths is None else [lengths])],
        (emitter.batch * patches,),
    )
    return Stream(value, patches, 1, 1)


def _folded_class_weights(
    emitter: Emitter, source: ProductInput, core: AttentionSpec, state: State
) -> Value:
    """How much the first token attends to each, by head, without computing keys."""
    x, heads, batch = source.stream, core.heads * core.parts, emitter.batch
    threads = emitter.schedule.threads
    q, k = linear(state, "q"), linear(state, "k")
    if core.kv_of is not None:
        k = k.select_heads(core.kv_of, core.qk)
    if core.q_norm is None:
        q = q.scaled(np.float32(core.scale * LOG2_E))
    queries = emitter.dense(x, 1, source.transform.fold_into(q), force_fp32=True)
    if core.q_norm is not None:
        spec = HeadNorm(batch, queries.width, 0, heads, core.q_norm, core.qk_norm_per_head)
        scale = core.scale * LOG2_E
        queries = emitter.head_norm(queries, spec, affine(state, "q_norm"), scale)
    # What a bias adds to the keys adds the same to every score of a head.
    transform = replace(source.transform, bias=None)
    weight = transform.fold_into(Matrix(k.weight, None)).weight
    weight = np.pad(weight, ((0, x.width - len(weight)), (0, 0)))
    folded = FoldedQueries(batch, heads, core.qk, x.width, queries.width)
    by_head = emitter.program.call(
        "fold_queries",
        folded,
        lambda: fold_queries(folded, emitter.lanes, threads),
        [queries.value, emitter.constant(np.ascontiguousarray(weight.T).ravel())],
        (batch * heads * x.width,),
    )
    weights = RowWeights(batch, heads, x.rows, x.layout)
    return emitter.program.call(
        "row_weights",
        weights,
        lambda: row_weights(weights, emitter.lanes, threads),
        [x.value, by_head],
        (batch * heads * emitter.lanes.up(x.rows),),
    )


def _attention_columns(
    emitter: Emitter, projected: Projected, core: AttentionSpec, state: State, rows: int
) -> Value:
    """How much the first `rows` tokens together attend to each, by head."""
    lanes, keys = emitter.lanes, projected.keys_values
    spec = projected.attend(emitter, core, rows)
    operands = [projected.queries.value, emitter.packed_keys(spec, keys)]
    bias = score_bias(emitter, core, state, (rows, keys.rows), projected.positions)
    operands += [] if bias is None else [bias]
    return emitter.program.call(
        "column_sums",
        ("column-sums", spec),
        lambda: column_sums(spec, lanes, emitter.schedule),
        operands,
        (spec.images * spec.heads * lanes.up(keys.rows),),
    )


def _value_lengths(emitter: Emitter, projected: Projected, core: AttentionSpec) -> Value:
    """The length of each token's values, over all heads."""
    x, batch, lanes = projected.keys_values, emitter.batch, emitter.lanes
    width = core.heads * core.parts * lanes.up(core.v)
    columns = HeadColumns(x.width, projected.first[2], width)
    return emitter.program.call(
        "row_lengths",
        ("row-lengths", x.layout, columns),
        lambda: row_lengths(batch, x.rows, x.layout, columns, lanes),
        [x.value],
        (batch * x.rows,),
    )
