"""Heads and columns of an attention that do nothing, or the same for every token.

What may go, and why, for head h with queries q, keys k, values v (columns j), y = softmax(scale * q
kᵀ) v:

- v row zero: y_j is the bias of v_j at every token, because rows of the softmax sum to one; it
  folds into the output bias.
- Output column zero: nobody reads y_j.
- A head all of whose value columns are so goes whole. Queries that are zero make no head dead: its
  softmax is uniform, it averages.
- q row and bias zero: the column adds nothing to the scores.
- k row zero, whatever its bias: the column adds q_j(t) b_j to all scores of query t alike, and a
  softmax does not see that.
- q row zero but not its bias: the column adds b_j k_j(s), which tells keys apart; it stays.

Norms over what is cut forbid it, rope turns columns in pairs (and its bias is no constant any
more), and every head keeps equally many columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..network.architecture import AttentionSpec
from ..network.modules.rope import pairs
from .dead_ffn import DeadUnits


def dead_attention(
    core: AttentionSpec, tensors: Mapping[str, Tensor], gain: Tensor | None
) -> DeadUnits:
    """The heads and columns that may go. `tensors`: by leaf (`q.weight`); `gain` (width_out,): the
    layer scale behind the output, or None.
    """
    left: list[tuple[int, str]] = []
    keep: dict[str, Tensor] = {}
    dead, emitted, alive = _values(core, tensors, gain, left)
    group = torch.tensor(core.kv_of) if core.kv_of is not None else torch.arange(core.heads)
    if not bool(alive.all()):
        keep["head"] = alive
    gone = dead & ~alive[:, None]
    if bool(alive.any()):
        if core.head_norm is None and core.out_norm is None:
            columns = _equal(dead, alive, group, torch.arange(core.v)[:, None], 0, "value", left)
            if columns is not None:
                keep["v"] = columns
                gone |= ~columns & alive[:, None]
        members = (
            pairs(core.rope.layout, core.qk)
            if core.rope is not None
            else torch.arange(core.qk)[:, None]
        )
        columns = _equal(
            _scores(core, tensors, group, members, alive, left),
            alive,
            group,
            members,
            1,
            "query/key",
            left,
        )
        if columns is not None:
            keep["qk"] = columns
    out = tensors["out.weight"]
    fold = out.double() @ (emitted.double() * gone).flatten()
    return DeadUnits(keep, fold.to(out), tuple(left))


def _values(
    core: AttentionSpec,
    tensors: Mapping[str, Tensor],
    gain: Tensor | None,
    left: list[tuple[int, str]],
) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, v) columns that are constant or unread, (heads, v) what they emit, and (heads,) the
    heads that live.
    """
    weight, out = tensors["v.weight"], tensors["out.weight"]
    group = torch.tensor(core.kv_of) if core.kv_of is not None else torch.arange(core.heads)
    zero = (weight == 0).all(dim=1).view(-1, core.v)[group]
    emitted = tensors.get("v.bias", weight.new_zeros(len(weight))).view(-1, core.v)[group]
    constant = zero
    if core.differential is not None:
        # Rows of the difference of two maps do not sum to one.
        constant = zero & (emitted == 0)
    if core.gated:
        gate = tensors["gate.weight"]
        closed = tensors.get("gate.bias", gate.new_zeros(len(gate))).view(core.heads, core.v)
        constant = constant & ((gate == 0).all(dim=1).view(core.heads, core.v) | (emitted == 0))
        emitted = emitted * closed.sigmoid()
    unread = (
        ((out if gain is None else out * gain[:, None]) == 0).all(dim=0).view(core.heads, core.v)
    )
    dead = constant | unread
    emitted = torch.where(constant, emitted, torch.zeros_like(emitted))
    none = torch.ones(core.heads, dtype=torch.bool)
    if core.out_norm is not None:
        _note(
            left,
            int(dead.sum()),
            "the norm before the output projection takes its statistics over every column",
        )
        return torch.zeros_like(dead), emitted, none
    if core.head_norm is not None:
        # It works within a head, so a head that nobody reads may go, and one that is zero where
        # zero stays zero.
        silent = (zero & (emitted == 0)).all(dim=1) & (not core.head_norm.bias)
        whole = unread.all(dim=1) | silent
        _note(
            left,
            int((dead & ~whole[:, None]).sum()),
            "the norm behind each head takes its statistics over every column of the head",
        )
        return dead & whole[:, None], torch.zeros_like(emitted), ~whole
    return dead, emitted, ~dead.all(dim=1)


def _scores(
    core: AttentionSpec,
    tensors: Mapping[str, Tensor],
    group: Tensor,
    members: Tensor,
    alive: Tensor,
    left: list[tuple[int, str]],
) -> Tensor:
    """(heads, units) query/key columns, or rope pairs of them, that no score feels."""

    def rows(leaf: str, *, biased: bool) -> Tensor:
        weight = tensors[f"{leaf}.weight"]
        zero = (weight == 0).all(dim=1)
        if biased and f"{leaf}.bias" in tensors:
            zero = zero & (tensors[f"{leaf}.bias"] == 0)
        found = zero.view(-1, core.parts, core.qk)
        return found if leaf == "q" else found[group]

    if core.q_norm is not None or core.k_norm is not None:
        zero = (rows("q", biased=True) | rows("k", biased=True)).all(dim=1) & alive[:, None]
        _note(
            left,
            int(zero.sum()),
            "the norm of queries or keys takes its statistics over every column",
        )
        return torch.zeros(core.heads, len(members), dtype=torch.bool)
    constant = (
        rows("q", biased=False)
        & ~rows("q", biased=True)
        & ~rows("k", biased=False)
        & alive[:, None, None]
    )
    _note(left, int(constant.sum()), "constant queries still weigh keys against each other")
    # Differential attention has two maps a head, and a column goes from both.
    if core.rope is None:
        return (rows("q", biased=True) | rows("k", biased=False)).all(dim=1)
    # q R(t - s) k of a pair is nothing only if both columns of q, or both of k, are.
    return rows("q", biased=True).all(dim=1)[:, members].all(dim=-1) | rows("k", biased=True).all(
        dim=1
    )[:, members].all(dim=-1)


def _equal(
    dead: Tensor,
    alive: Tensor,
    group: Tensor,
    members: Tensor,
    least: int,
    what: str,
    left: list[tuple[int, str]],
) -> Tensor | None:
    """(heads, columns) to keep, equally many in every head and the same for heads that share keys
    and values; None when all stay.

    `dead` (heads, units); `least` units stay in any case.
    """
    units = members.shape[0]
    # A column of a shared key or value goes only if none of the living heads that share it needs
    # it.
    needed = torch.zeros(int(group.max()) + 1, units, dtype=torch.bool)
    for head in torch.nonzero(alive).flatten().tolist():
        needed[group[head]] |= ~dead[head]
    lively = torch.unique(group[alive])
    count = min(int((~needed[lively]).sum(dim=1).min()), units - least)
    over = int((dead & alive[:, None]).sum()) - count * int(alive.sum())
    _note(
        left,
        over * members.shape[1],
        f"{what} columns: every head keeps equally many, and one at least",
    )
    if count == 0:
        return None
    # The dead units first, in order.
    order = needed.int().argsort(dim=1, stable=True)
    kept = torch.ones(needed.shape[0], members.numel(), dtype=torch.bool)
    for row, chosen in zip(kept, order[:, :count], strict=True):
        row[members[chosen].flatten()] = False
    return kept[group]


def _note(left: list[tuple[int, str]], count: int, why: str) -> None:
    if count > 0:
        left.append((count, why))
