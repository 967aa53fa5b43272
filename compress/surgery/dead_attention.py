"""Heads and columns of an attention that are zero, or the same for every token.

Rules for a head with queries q, keys k and values v (columns j), y = softmax(scale * q kᵀ) v:

1. v row zero: y_j is the bias of v_j at every token, since rows of a softmax sum to one. It is
   folded into the output bias.
2. Output column zero: y_j is not read.
3. A head is removed if all of its value columns are like this. Zero queries do not make a head
   dead: its softmax is uniform and averages the values.
4. q row and bias zero: the column adds nothing to the scores.
5. k row zero: the column adds q_j(t) b_j to all scores of query t, which a softmax ignores.
6. q row zero but not its bias: the column adds b_j k_j(s), which differs between keys. It stays.

A norm over the columns forbids their removal. Rope rotates columns in pairs, so that a bias is no
constant. Every head keeps equally many columns. A head whose attention chooses tokens
has a voice in the scores, and stays although it adds nothing to the stream.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..network.architecture import AttentionSpec
from ..network.modules.rope import pairs
from ..network.select_specs import Scorer
from .dead_ffn import DeadUnits

# Dead units that stay, as (count, reason).
Remaining = list[tuple[int, str]]


def dead_attention(
    core: AttentionSpec,
    tensors: Mapping[str, Tensor],
    gain: Tensor | None,
    scorers: Collection[Scorer] = (),
) -> DeadUnits:
    """Find the heads and columns that can be removed.

    Args:
        core: The attention.
        tensors: Its tensors by leaf (`q.weight`).
        gain: (width_out,), the layer scale behind the output, or None.
        scorers: How selections choose tokens by this attention.
    """
    remaining: Remaining = []
    keep: dict[str, Tensor] = {}
    dead, emitted, alive = _values(core, tensors, gain, remaining)
    if scorers:
        _add(remaining, int((~alive).sum()), "its attention chooses tokens")
        if "column-attention" in scorers:
            silent = _zero_values(core, tensors)
            count = int((dead & ~silent & alive[:, None]).sum())
            _add(remaining, count, "the lengths of its values choose tokens")
            dead = dead & silent
        alive = torch.ones_like(alive)
    if not bool(alive.all()):
        keep["head"] = alive
    removed = dead & ~alive[:, None]
    if bool(alive.any()):
        if core.head_norm is None and core.out_norm is None:
            members = torch.arange(core.v)[:, None]
            columns = _equal_columns(core, dead, alive, members, "value", remaining)
            if columns is not None:
                keep["v"] = columns
                removed |= ~columns & alive[:, None]
        members = torch.arange(core.qk)[:, None]
        if core.rope is not None:
            members = pairs(core.rope.layout, core.qk)
        unused = _query_key(core, tensors, members, alive, remaining)
        columns = _equal_columns(core, unused, alive, members, "query/key", remaining)
        if columns is not None:
            keep["qk"] = columns
    out = tensors["out.weight"]
    fold = out.double() @ (emitted.double() * removed).flatten()
    return DeadUnits(keep, fold.to(out), tuple(remaining))


def _groups(core: AttentionSpec) -> Tensor:
    """(heads,) the key/value head of each head."""
    return torch.tensor(core.kv_of) if core.kv_of is not None else torch.arange(core.heads)


def _values(
    core: AttentionSpec, tensors: Mapping[str, Tensor], gain: Tensor | None, remaining: Remaining
) -> tuple[Tensor, Tensor, Tensor]:
    """Dead value columns (heads, v), what they emit (heads, v), and live heads (heads,)."""
    weight, out, group = tensors["v.weight"], tensors["out.weight"], _groups(core)
    zero = (weight == 0).all(dim=1).view(-1, core.v)[group]
    emitted = tensors.get("v.bias", weight.new_zeros(len(weight))).view(-1, core.v)[group]
    constant = zero
    if core.differential is not None:
        # Rows of a difference of two softmaxes do not sum to one.
        constant = zero & (emitted == 0)
    if core.gated:
        gate = tensors["gate.weight"]
        closed = tensors.get("gate.bias", gate.new_zeros(len(gate))).view(core.heads, core.v)
        constant = constant & ((gate == 0).all(dim=1).view(core.heads, core.v) | (emitted == 0))
        emitted = emitted * closed.sigmoid()
    scaled = out if gain is None else out * gain[:, None]
    unread = (scaled == 0).all(dim=0).view(core.heads, core.v)
    dead = constant | unread
    emitted = torch.where(constant, emitted, torch.zeros_like(emitted))
    if core.out_norm is not None:
        why = "the statistics of the norm before the output projection run over every column"
        _add(remaining, int(dead.sum()), why)
        return torch.zeros_like(dead), emitted, torch.ones(core.heads, dtype=torch.bool)
    if core.head_norm is not None:
        # The norm acts within a head, so an unread head is removable, and one that stays zero.
        zeros = (zero & (emitted == 0)).all(dim=1) & (not core.head_norm.bias)
        whole = unread.all(dim=1) | zeros
        why = "the statistics of the norm behind each head run over every column of the head"
        _add(remaining, int((dead & ~whole[:, None]).sum()), why)
        return dead & whole[:, None], torch.zeros_like(emitted), ~whole
    return dead, emitted, ~dead.all(dim=1)


def _zero_values(core: AttentionSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """(heads, v) value columns that are zero, bias included."""
    weight = tensors["v.weight"]
    zero = (weight == 0).all(dim=1)
    if "v.bias" in tensors:
        zero = zero & (tensors["v.bias"] == 0)
    return zero.view(-1, core.v)[_groups(core)]


def _query_key(
    core: AttentionSpec,
    tensors: Mapping[str, Tensor],
    members: Tensor,
    alive: Tensor,
    remaining: Remaining,
) -> Tensor:
    """(heads, units) query/key columns, or rope pairs of them, that no score depends on."""
    group = _groups(core)

    def rows(leaf: str, *, biased: bool) -> Tensor:
        weight = tensors[f"{leaf}.weight"]
        zero = (weight == 0).all(dim=1)
        if biased and f"{leaf}.bias" in tensors:
            zero = zero & (tensors[f"{leaf}.bias"] == 0)
        found = zero.view(-1, core.parts, core.qk)
        return found if leaf == "q" else found[group]

    if core.q_norm is not None or core.k_norm is not None:
        zero = (rows("q", biased=True) | rows("k", biased=True)).all(dim=1) & alive[:, None]
        why = "the statistics of the norm of queries or keys run over every column"
        _add(remaining, int(zero.sum()), why)
        return torch.zeros(core.heads, len(members), dtype=torch.bool)
    constant = (
        rows("q", biased=False)
        & ~rows("q", biased=True)
        & ~rows("k", biased=False)
        & alive[:, None, None]
    )
    _add(remaining, int(constant.sum()), "constant queries still weigh keys against each other")
    # Differential attention has two maps per head, and a column is removed from both.
    if core.rope is None:
        return (rows("q", biased=True) | rows("k", biased=False)).all(dim=1)
    # The product of a pair, q R(t - s) k, is zero only if both columns of q, or both of k, are.
    q, k = (rows(leaf, biased=True).all(dim=1)[:, members].all(dim=-1) for leaf in ("q", "k"))
    return q | k


def _equal_columns(
    core: AttentionSpec,
    dead: Tensor,
    alive: Tensor,
    members: Tensor,
    kind: str,
    remaining: Remaining,
) -> Tensor | None:
    """(heads, columns) to keep, equally many in each head; None if all stay.

    Heads with the same keys and values keep the same columns. `dead`: (heads, units). One unit
    stays in any case.
    """
    group, units = _groups(core), members.shape[0]
    # A shared key or value column is removed only if no live head needs it.
    needed = torch.zeros(int(group.max()) + 1, units, dtype=torch.bool)
    for head in torch.nonzero(alive).flatten().tolist():
        needed[group[head]] |= ~dead[head]
    used = torch.unique(group[alive])
    count = min(int((~needed[used]).sum(dim=1).min()), units - 1)
    # A head that has no other value columns stays as a whole, which is another reason.
    partly = alive & ~dead.all(dim=1) if kind == "value" else alive
    rest = int((dead & partly[:, None]).sum()) - count * int(partly.sum())
    why = f"{kind} columns: every head keeps equally many, and one at least"
    _add(remaining, rest * members.shape[1], why)
    if count == 0:
        return None
    # Dead units come first.
    order = needed.int().argsort(dim=1, stable=True)
    kept = torch.ones(needed.shape[0], members.numel(), dtype=torch.bool)
    for row, chosen in zip(kept, order[:, :count], strict=True):
        row[members[chosen].flatten()] = False
    return kept[group]


def _add(remaining: Remaining, count: int, why: str) -> None:
    if count > 0:
        remaining.append((count, why))
