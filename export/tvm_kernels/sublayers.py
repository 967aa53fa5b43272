"""Attention and FFN as calls of kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ...compress.network.architecture import AttentionSpec, DifferentialSpec, FfnSpec
from ...compress.network.modules.relative_bias import offsets
from .attention import Attend, attend
from .emitter import Emitter, stored
from .head_norm import HeadNorm
from .keys import Heads, pack_keys, packed_size
from .lanes import Lanes
from .matrices import Entering, Matrix, State, Stream, beside, from_torch, heads_chosen
from .packing import Array, padded_heads


def attention(
    emitter: Emitter,
    x: Stream,
    entering: Entering,
    core: AttentionSpec,
    state: State,
    out: Matrix,
    asked: int,
    written: Stream | None,
) -> Stream:
    """Projections, keys and values turned into packed form, attention, output projection onto the
    stream, or alone where there is none.
    """
    lanes, heads, tokens = emitter.lanes, core.heads, x.rows
    # Differential attention: two maps a head, each with queries and keys of its own, over the same
    # values.
    maps = heads * core.parts
    wide = lanes.up(core.v)
    # Softmax by powers of two: the scale and the logarithm are in the queries, or in the norm
    # behind their projection.
    scale = core.scale * math.log2(math.e)
    q, k, v = (from_torch(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in "qkv")
    if core.kv_of is not None:
        # Each head gets keys and values of its own; a copy of weights costs less than a kernel that
        # looks up whose they are.
        k, v = heads_chosen(k, core.kv_of, core.qk), heads_chosen(v, core.kv_of, core.v)
    if core.q_norm is None:
        q = Matrix(
            q.weight * np.float32(scale), None if q.bias is None else q.bias * np.float32(scale)
        )
    v = Matrix(
        padded_heads(v.weight, heads, wide),
        None if v.bias is None else padded_heads(v.bias[None], heads, wide)[0],
    )
    if maps > heads:
        # A copy of weights costs less than a kernel that looks up whose values they are.
        v = heads_chosen(v, tuple(number // core.parts for number in range(maps)), wide)
    if asked == tokens:
        joined = emitter.dense(x, tokens, entering.into(beside([q, k, v])))
        at = (0, maps * core.qk, 2 * maps * core.qk)
        asking, answering = joined, joined
    else:
        asking = emitter.dense(x, asked, entering.into(q))
        answering = emitter.dense(x, tokens, entering.into(beside([k, v])))
        at = (0, 0, maps * core.qk)
    if core.q_norm is not None:
        spec = HeadNorm(
            emitter.batch * asking.rows,
            asking.width,
            at[0],
            maps,
            core.q_norm,
            core.qk_norm_per_head,
        )
        asking_new = emitter.heads_normed(asking, spec, state, "q_norm", scale)
        answering = asking_new if answering is asking else answering
        asking = asking_new
    if core.k_norm is not None:
        spec = HeadNorm(
            emitter.batch * answering.rows,
            answering.width,
            at[1],
            maps,
            core.k_norm,
            core.qk_norm_per_head,
        )
        answering_new = emitter.heads_normed(answering, spec, state, "k_norm", 1.0, core.kv_of)
        asking = answering_new if asking is answering else asking
        answering = answering_new
    if core.rope is not None:
        asking_new = emitter.turned(asking, at[0], core, state)
        answering = asking_new if answering is asking else answering
        asking = asking_new
        answering_new = emitter.turned(answering, at[1], core, state)
        asking = answering_new if asking is answering else asking
        answering = answering_new
    queries, keys, values = (
        Heads(asking.width, at[0], core.qk),
        Heads(answering.width, at[1], core.qk),
        Heads(answering.width, at[2], wide),
    )
    spec_attend = Attend(
        emitter.batch,
        maps,
        tokens,
        asked,
        asking.place,
        queries,
        keys,
        values,
        core.bias is not None,
    )
    table = None if core.bias is None else _relative(core, state, asked, lanes)
    plain = (
        not core.gated
        and core.out_norm is None
        and core.head_norm is None
        and core.differential is None
    )
    found = attended(emitter, spec_attend, asking, answering, table, for_products=plain)
    gain = 1.0
    if core.differential is not None:
        gain = 1.0 - core.differential.start
        before = gain if core.head_norm is None else 1.0
        found = emitter.combined(
            found, heads, (before, -before * _taken_off(core.differential, state))
        )
    if core.head_norm is not None:
        spec = HeadNorm(
            emitter.batch * asked,
            found.width,
            0,
            heads,
            core.head_norm,
            core.head_norm_per_head,
            wide,
        )
        found = emitter.heads_normed(found, spec, state, "head_norm", gain)
    weight = padded_heads(out.weight.T, heads, wide).T
    gate = None if not core.gated else from_torch(state["gate.weight"], state.get("gate.bias"))
    if gate is not None and (core.out_norm is None or wide == core.v):
        gate = Matrix(
            padded_heads(gate.weight, heads, wide),
            None if gate.bias is None else padded_heads(gate.bias[None], heads, wide)[0],
        )
    if core.out_norm is not None:
        chosen = None
        if wide != core.v:
            chosen, weight = (
                tuple(head * wide + column for head in range(heads) for column in range(core.v)),
                out.weight,
            )
        affine = (state.get("out_norm.weight"), state.get("out_norm.bias"))
        # Through a gate the norm's weights cannot be folded.
        found = emitter.normed(
            found,
            core.out_norm,
            columns=chosen,
            affine=affine if gate is not None else None,
            for_products=gate is None,
        )
        if gate is None:
            out = Entering(*affine).into(Matrix(weight, out.bias))
            weight = out.weight
    if gate is not None:
        found = emitter.dense(x, asked, entering.into(gate), act="sigmoid", factor=found)
    return emitter.dense(found, asked, Matrix(weight, out.bias), residual=written)


def attended(
    emitter: Emitter,
    spec: Attend,
    asking: Stream,
    answering: Stream,
    bias: Array | None = None,
    *,
    for_products: bool,
) -> Stream:
    """What the heads mix for each query, side by side. asking, answering: rows that hold queries,
    and keys and values. bias: `Attend.biased`.
    """
    lanes, schedule = emitter.lanes, emitter.schedule
    tile, keys, values = schedule.tile(spec.shape), spec.keys, spec.values
    key = ("keys", spec.heads, spec.tokens, keys, values, tile.vectors)
    size = spec.images * spec.heads * packed_size(spec.tokens, keys, values, lanes)
    packed = emitter.program.call(
        "keys",
        key,
        lambda: pack_keys(
            spec.images, spec.heads, spec.tokens, keys, values, lanes, tile, schedule.threads
        ),
        [answering.value],
        (size,),
    )
    writes, known = (
        emitter.precision.for_products(whole_rows=False) if for_products else (None, None)
    )
    spec = replace(spec, writes=writes)
    operands = [asking.value, packed]
    if bias is not None:
        operands.append(emitter.program.constant(bias.ravel()))
    operands += emitter.range_operand(writes, known)
    width = spec.heads * values.each
    shape = (spec.images * spec.asked * width,)
    value = emitter.program.call(
        "attend", spec, lambda: attend(spec, lanes, schedule), operands, shape, stored(writes)
    )
    return Stream(value, spec.asked, width, width, writes, known)


def ffn(
    emitter: Emitter,
    x: Stream,
    entering: Entering,
    core: FfnSpec,
    state: State,
    out: Matrix,
    rows: int,
    written: Stream | None,
) -> Stream:
    """Up, activation, perhaps times the other half, down onto the stream, or alone where there is
    none.
    """
    first = entering.into(from_torch(state["fc1.weight"], state.get("fc1.bias")))
    if core.gated:
        plain = emitter.dense(x, rows, first)
        gate = entering.into(from_torch(state["gate.weight"], state.get("gate.bias")))
        hidden = emitter.dense(
            x, rows, gate, act=core.act, factor=plain, for_products=core.norm is None
        )
    else:
        hidden = emitter.dense(x, rows, first, act=core.act, for_products=core.norm is None)
    if core.norm is not None:
        hidden = emitter.normed(hidden, core.norm, for_products=True)
        out = Entering(state.get("norm.weight"), state.get("norm.bias")).into(out)
    return emitter.dense(hidden, rows, out, residual=written)


def _relative(core: AttentionSpec, state: State, asked: int, lanes: Lanes) -> Array:
    """(heads, asked, whole vectors of tokens), in the units of scores: times log2 e."""
    spec = core.bias
    assert spec is not None
    bias = state["bias.table"][offsets(spec).numpy()].transpose(2, 0, 1) * np.float32(
        math.log2(math.e)
    )
    before = 0 if spec.prefix_rows else spec.prefix
    bias = np.pad(bias, ((0, 0), (before, 0), (before, 0)))[:, :asked]
    bias = np.repeat(bias, core.parts, axis=0)
    return np.pad(bias, ((0, 0), (0, 0), (0, lanes.up(bias.shape[2]) - bias.shape[2])))


def _taken_off(spec: DifferentialSpec, state: State) -> float:
    """How much of the second map is taken off the first (Ye et al. 2024, eq. 2)."""
    vectors = state["differential.vectors"].astype(np.float64)
    first, second = np.exp(vectors if spec.dual else (vectors[0::2] * vectors[1::2]).sum(axis=-1))
    return float(first - second + spec.start)
