"""Parameters and multiply-adds of a network of which only some units are live.

The functions are polynomials of the live counts. They accept plain numbers (for a budget) and sums
of gates (for gradients). `live(dimension, site, indices)` returns how many units are live at a
site; with `indices`, how many of those channels or heads. `live("block", branch, None)` is 0 for a
sub-layer that is removed as a whole. `live("token", site, None)` is the number of tokens that the
stream carries after the stem (site `stem.out`) or after a step (site: its first branch); with
`indices`, how many of these. Input widths are live widths: a later layer does not pay for what an
earlier mask removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, Literal

from .architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    FfnSpec,
    Indices,
    NormSpec,
    PoolSpec,
    SelectSpec,
)
from .axes import HEAD_IN, POOL_ATTENTION, POOL_FFN, POOL_OUT, STEM_OUT, site_in, site_out
from .select_specs import (
    SelectWidths,
    scoring_attention,
    select_inputs,
    select_macs,
    selected_tokens,
    static_steps,
)

Live = Callable[[str, str, Indices | None], Any]
CostKind = Literal["params", "macs"]


def live_cost(architecture: Architecture, live: Live, kind: CostKind) -> Any:
    """Parameters, or multiply-adds per image, of the network that `compact` would build."""
    return live_params(architecture, live) if kind == "params" else live_macs(architecture, live)


def live_params(architecture: Architecture, live: Live) -> Any:
    """Number of parameters of the live network; equals `count_params` of the pruned one."""
    stem, read = _stem_and_head_widths(architecture, live)
    removed = _removed(architecture, live)
    spec, channels = architecture.stem, architecture.stem.inputs(architecture.image[0])[-1]
    total: Any = spec.before_params(architecture.image[0])
    learned, patches = embedded(architecture, live, removed)
    per_channel = channels * spec.patch[0] * spec.patch[1] + spec.bias + learned
    total = total + stem * (per_channel + (patches if architecture.position else 0))
    total = total + _norm(architecture.patch_norm, stem) + _norm(architecture.stem_norm, stem)
    total = total + _norm(architecture.norm, read)
    pooled = _pooled_width(architecture, live, read)
    total = total + _pool_params(architecture.pool, live, read, pooled)
    total = total + _norm(architecture.pool_norm, pooled)
    head = architecture.head
    if head is not None:
        if head.hidden:
            total, pooled = total + (pooled + 1) * head.hidden, head.hidden
        total = total + architecture.classifiers * (pooled + head.bias) * head.classes
    for branch in architecture.branches:
        if branch.name not in removed:
            total = total + _branch_params(branch, live)
    for select in architecture.selects:
        total = total + _select_params(architecture, select, live)
    return total


def live_macs(architecture: Architecture, live: Live) -> Any:
    """Number of multiply-adds of the live network for one image, attention products included.

    Equals `count_macs` of the pruned network.
    """
    stem, read = _stem_and_head_widths(architecture, live)
    spec, channels = architecture.stem, architecture.stem.inputs(architecture.image[0])[-1]
    removed = _removed(architecture, live)
    tokens, learned = _live_tokens(architecture, live, removed)
    inputs = _after_selects(architecture, tokens)
    final = inputs[-1]
    total: Any = spec.before_macs(*architecture.image)
    patches = tokens[0] - learned
    total = total + stem * patches * (channels * spec.patch[0] * spec.patch[1])
    pooled, pool = _pooled_width(architecture, live, read), architecture.pool
    sites = [STEM_OUT, *(step[0].name for step in architecture.steps)]
    last = final - _live_learned(architecture, live, static_steps(architecture), sites)
    if pool.attention is not None:
        seen = final if pool.prefix else last
        heads, qk, v = attention_counts(POOL_ATTENTION, live)
        total = total + (read + 1) * (heads * qk + heads * v) * seen + heads * v * pooled
        if pool.ffn is not None:
            total = total + live("ffn", POOL_FFN, None) * pooled * (3 if pool.ffn.gated else 2)
    head = architecture.head
    if head is not None:
        each = pooled * head.classes
        if head.hidden:
            each = pooled * head.hidden + head.hidden * head.classes
        total = total + each * {"distilled": 2, "dense": 1 + last}.get(pool.kind, 1)
    for number, step in enumerate(architecture.steps):
        for branch in step:
            if branch.name not in removed:
                total = total + _branch_macs(branch, live, inputs[number], tokens[number + 1])
    for select, before, count in select_inputs(architecture, tokens):
        widths = live_select_widths(architecture, select, live)
        total = total + select_macs(architecture, select, widths, before, count)
    return total


def _after_selects(architecture: Architecture, tokens: list[Any]) -> list[Any]:
    """The numbers of tokens after the stem and each step, and the selections behind them."""
    return [
        selected_tokens(architecture, number, count) if architecture.selects else count
        for number, count in enumerate(tokens)
    ]


def live_tokens(
    architecture: Architecture, live: Live, removed: Collection[str] | None = None
) -> list[Any]:
    """Number of tokens that the live network carries after the stem and after each step.

    A token that only sub-layers without attention would compute leaves before them, and
    `last_queries` leaves to the last attention what the head reads, as in the cut network.

    Args:
        architecture: The network.
        live: Returns the number of live units, as described at the top of this module.
        removed: The names of the sub-layers that are removed as a whole. None: those that `live`
            has none of.

    Returns:
        One number (or scalar tensor) for the stem and one for each step, non-increasing, before a
        selection behind it.
    """
    removed = _removed(architecture, live) if removed is None else removed
    return _live_tokens(architecture, live, removed)[0]


def embedded(
    architecture: Architecture, live: Live, removed: Collection[str] | None = None
) -> tuple[Any, Any]:
    """Number of learned tokens and of patches that the stem returns; arguments of `live_tokens`."""
    removed = _removed(architecture, live) if removed is None else removed
    counts, learned = _live_tokens(architecture, live, removed)
    return learned, counts[0] - learned


def _live_tokens(
    architecture: Architecture, live: Live, removed: Collection[str]
) -> tuple[list[Any], Any]:
    """What `live_tokens` returns, and the number of learned tokens behind the stem."""
    steps = architecture.steps
    static = static_steps(architecture)
    sites = [STEM_OUT, *(step[0].name for step in steps[:static])]
    counts = [live("token", site, None) for site in sites]
    counts += architecture.step_tokens(last_queries=False)[static:]
    mixing = [any(_mixes(branch, live, removed) for branch in step) for step in steps]
    for number in reversed(range(static)):
        # A selection reads every token before it.
        if not mixing[number]:
            counts[number] = counts[number + 1]
    # The stem returns what the first reader reads.
    first = next((number for number, mixes in enumerate(mixing[:static]) if mixes), static)
    learned = _live_learned(architecture, live, first, sites)
    # A convolution needs an output, even if nothing reads a patch.
    if counts[0] <= learned:
        counts[0] = learned + 1
    read = architecture.pooled_prefix
    if architecture.last_queries and read:
        last = max((number for number, mixes in enumerate(mixing) if mixes), default=0)
        counts[last + 1 :] = [read] * (len(steps) - last)
    return counts, learned


def _live_learned(architecture: Architecture, live: Live, number: int, sites: Sequence[str]) -> Any:
    """Number of learned tokens of the set at a site of token sets."""
    places = tuple(range(architecture.prefix))
    if architecture.inner:
        carried = (architecture.tokens, *architecture.step_tokens(last_queries=False))[number]
        places = (*places, *(place for place in architecture.inner if place < carried))
    return live("token", sites[number], places) if places else 0


def _mixes(branch: BranchSpec, live: Live, removed: Collection[str]) -> bool:
    """Whether a sub-layer reads other tokens: an attention with a head and a value column."""
    if not isinstance(branch.core, AttentionSpec) or branch.name in removed:
        return False
    heads, _, v = attention_counts(branch.name, live)
    return bool(heads) and bool(v)


def movement_cost(architecture: Architecture, live: Live) -> Any:
    """Cost in parameters as the source of structured movement pruning defines it.

    This is the term that lambda multiplies in the loss. Linear: (n_in + 1) ΣS; convolution: (n_in
    k² + 1) ΣS; LayerNorm: 2 ΣS; attention: n_in ΣS_H (2 ΣS_QK + ΣS_V) + (ΣS_H ΣS_V + 1) ΣS_O.
    Grouped queries are not in the source: their keys and values are counted once per group.

    Args:
        architecture: The network.
        live: Returns the number of live units, as described at the top of this module.

    Returns:
        A number, or a scalar tensor if `live` returns tensors.

    References:
        Tredese 2023, "Structured Pruning of Vision Transformers at Training Time".
    """
    stem, read = _stem_and_head_widths(architecture, live)
    patch = architecture.stem.patch
    total = (architecture.image[0] * patch[0] * patch[1] + 1) * stem
    for norm, width in (
        (architecture.stem_norm, stem),
        (architecture.norm, read),
        (architecture.pool_norm, read),
    ):
        if norm is not None:
            total = total + 2 * width
    total = total + architecture.classifiers * (read + 1) * architecture.classes
    for branch in architecture.branches:
        n_in, n_out = _branch_widths(branch, live)
        if branch.norm is not None:
            total = total + 2 * n_in
        if branch.post_norm is not None:
            total = total + 2 * n_out
        core = branch.core
        if isinstance(core, AttentionSpec):
            heads, qk, v = attention_counts(branch.name, live)
            kv_heads = _live_kv_heads(branch.name, core, live)
            total = total + n_in * (heads * qk + kv_heads * (qk + v)) + (heads * v + 1) * n_out
        elif isinstance(core, FfnSpec):
            hidden = live("ffn", branch.name, None)
            total = total + (n_in + 1) * hidden * (2 if core.gated else 1) + (hidden + 1) * n_out
    return total


def _stem_and_head_widths(architecture: Architecture, live: Live) -> tuple[Any, Any]:
    """Live channels that the stem fills, and that the head reads."""
    return (
        live("embed", STEM_OUT, architecture.stem_writes),
        live("embed", HEAD_IN, architecture.head_reads),
    )


def _branch_widths(branch: BranchSpec, live: Live) -> tuple[Any, Any]:
    """Live channels that a branch reads, and that it writes."""
    return (
        live("embed", site_in(branch), branch.reads),
        live("embed", site_out(branch), branch.writes),
    )


def attention_counts(site: str, live: Live) -> tuple[Any, Any, Any]:
    """Live heads, and live query/key and value columns per head."""
    return live("head", site, None), live("qk", site, None), live("v", site, None)


def _pooled_width(architecture: Architecture, live: Live, read: Any) -> Any:
    if architecture.pool.attention is not None:
        return live("embed", POOL_OUT, None)
    return read * (2 if architecture.pool.kind == "token_mean" else 1)


def _removed(architecture: Architecture, live: Live) -> set[str]:
    return {branch.name for branch in architecture.branches if not live("block", branch.name, None)}


def _pool_params(pool: PoolSpec, live: Live, read: Any, pooled: Any) -> Any:
    attention = pool.attention
    if attention is None:
        return 0
    heads, qk, v = attention_counts(POOL_ATTENTION, live)
    total = heads * qk * (1 + read + attention.k_bias) + heads * v * (read + attention.v_bias)
    k_rows = heads if attention.qk_norm_per_head else 1
    total = total + k_rows * _norm(attention.k_norm, qk)
    total = total + (heads * v + attention.out_bias) * pooled + _norm(pool.norm, pooled)
    if pool.ffn is not None:
        total = total + _ffn_params(pool.ffn, pooled, live("ffn", POOL_FFN, None), pooled)
    return total


def _branch_params(branch: BranchSpec, live: Live) -> Any:
    width_in, width_out = _branch_widths(branch, live)
    total = _norm(branch.norm, width_in) + _norm(branch.post_norm, width_out)
    total = total + width_out * branch.layer_scale
    core = branch.core
    if isinstance(core, AttentionSpec):
        return total + _attention_params(core, branch.name, live, width_in, width_out)
    if isinstance(core, FfnSpec):
        return total + _ffn_params(core, width_in, live("ffn", branch.name, None), width_out)
    return total + width_out


def live_select_widths(architecture: Architecture, select: SelectSpec, live: Live) -> SelectWidths:
    """The live numbers of a selection."""
    spec = select.predictor
    if spec is not None:
        first, *others = select.hidden_sites
        units = range(spec.local + spec.pooled)
        return SelectWidths(
            reads=live("embed", select.site_in, select.reads),
            local=live("ffn", first, tuple(units[: spec.local])),
            pooled=live("ffn", first, tuple(units[spec.local :])) if spec.pooled else 0,
            hidden=[live("ffn", site, None) for site in others],
        )
    if select.scorer == "random":
        return SelectWidths()
    branch = scoring_attention(architecture, select)
    assert isinstance(branch.core, AttentionSpec)
    heads, qk, v = attention_counts(branch.name, live)
    reads, stream = _branch_widths(branch, live)
    kv_heads = _live_kv_heads(branch.name, branch.core, live)
    return SelectWidths(reads, stream, heads=heads, kv_heads=kv_heads, qk=qk, v=v)


def _select_params(architecture: Architecture, select: SelectSpec, live: Live) -> Any:
    if select.predictor is None:
        return 0
    return predictor_params(select, live_select_widths(architecture, select, live))


def predictor_params(select: SelectSpec, widths: SelectWidths) -> Any:
    """The parameters of a selection's predictor and its norm, at these widths."""
    units, layers = widths.local + widths.pooled, (*widths.hidden, 1)
    total = _norm(select.norm, widths.reads) + units * (widths.reads + 1)
    total = total + (units + 1) * layers[0]
    for before, after in pairwise(layers):
        total = total + (before + 1) * after
    return total


def _attention_params(
    core: AttentionSpec, site: str, live: Live, width_in: Any, width_out: Any
) -> Any:
    heads, qk, v = attention_counts(site, live)
    kv_heads, parts = _live_kv_heads(site, core, live), core.parts
    total = heads * parts * qk * (width_in + core.q_bias)
    total = total + kv_heads * (
        parts * qk * (width_in + core.k_bias) + v * (width_in + core.v_bias)
    )
    q_rows, k_rows = (heads * parts, kv_heads * parts) if core.qk_norm_per_head else (1, 1)
    total = total + q_rows * _norm(core.q_norm, qk) + k_rows * _norm(core.k_norm, qk)
    total = total + _norm(core.out_norm, heads * v)
    total = total + (heads if core.head_norm_per_head else 1) * _norm(core.head_norm, v)
    if core.gated:
        total = total + heads * v * (width_in + core.gate_bias)
    if core.bias is not None:
        total = total + heads * core.bias.rows
    if core.differential is not None:
        total = total + (2 if core.differential.dual else 4 * core.differential.width)
    return total + (heads * v + core.out_bias) * width_out


def _branch_macs(branch: BranchSpec, live: Live, tokens: Any, queries: Any) -> Any:
    width_in, width_out = _branch_widths(branch, live)
    core = branch.core
    if isinstance(core, AttentionSpec):
        heads, each_qk, each_v = attention_counts(branch.name, live)
        kv_heads = _live_kv_heads(branch.name, core, live)
        each_qk = each_qk * core.parts
        qk, v = heads * each_qk, heads * each_v
        total = width_in * (qk * queries + kv_heads * (each_qk + each_v) * tokens)
        total = total + v * width_out * queries + (qk + v) * (queries * tokens)
        return total + width_in * v * queries if core.gated else total
    if isinstance(core, FfnSpec):
        hidden = live("ffn", branch.name, None)
        return hidden * queries * (width_in * (2 if core.gated else 1) + width_out)
    return 0


def _live_kv_heads(site: str, core: AttentionSpec, live: Live) -> Any:
    """Key/value heads that some live query head reads.

    With grouped queries, 1 - Π (1 - live) over a group is 1 if one of its heads is live. Its slope
    at a head is what that head alone decides: 0 while another head of the group is live.
    """
    if core.kv_of is None:
        return live("head", site, None)
    total: Any = 0
    for group in range(core.kv_heads):
        none_live: Any = 1
        for head, kv_head in enumerate(core.kv_of):
            if kv_head == group:
                none_live = none_live * (1 - live("head", site, (head,)))
        total = total + (1 - none_live)
    return total


def _ffn_params(core: FfnSpec, width_in: Any, hidden: Any, width_out: Any) -> Any:
    rows = (width_in + core.in_bias) + ((width_in + core.gate_bias) if core.gated else 0)
    return hidden * rows + _norm(core.norm, hidden) + (hidden + core.out_bias) * width_out


def _norm(norm: NormSpec | None, width: Any) -> Any:
    return 0 if norm is None else width * (norm.weight + norm.bias)
