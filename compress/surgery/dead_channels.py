"""Channels of the residual stream that can be removed: always zero, or not read.

1. The mean and variance of a LayerNorm run over all its channels, so a channel that is always zero
   affects the other ones and stays.
2. An RMSNorm over d channels of which k are zero equals the RMSNorm over the other d - k with
   eps d / (d - k) and γ √(d / (d - k)).
3. A channel that is written but not read is removed only where no norm reads it either.
4. The stem, every reader, and an attention that scores tokens, which must not be removed, keep one
   of their channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.architecture import Architecture, ConstantSpec, Indices, NormSpec
from ..network.select_specs import scoring_branches


@dataclass(frozen=True)
class DeadChannels:
    """The removable channels of a network.

    Attributes:
        keep: (embed,), the channels to keep, or None if all stay.
        remaining: Channels that are always zero and stay, as (count, reason).
    """

    keep: Tensor | None
    remaining: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class _Reader:
    """A reader of the stream.

    Attributes:
        channels: The channels that it reads.
        norms: Names and specs of the norms that read them.
        matrices: The names of the matrices that read them, by their columns.
        everything: Whether something else reads all of them.
    """

    channels: Tensor
    norms: tuple[tuple[str, NormSpec], ...]
    matrices: tuple[str, ...]
    everything: bool = False


def dead_channels(architecture: Architecture, state: Mapping[str, Tensor]) -> DeadChannels:
    """Find the channels that can be removed from a network with these tensors."""
    readers = list(_readers(architecture, state))
    zero = _zero(architecture, state)
    unread = torch.ones(architecture.embed, dtype=torch.bool)
    layered = torch.zeros(architecture.embed, dtype=torch.bool)
    for reader in readers:
        read = torch.zeros(len(reader.channels), dtype=torch.bool)
        for name in reader.matrices:
            columns = (state[name] != 0).flatten(0, -2).any(dim=0)
            read |= columns.view(-1, len(reader.channels)).any(dim=0)
        unread[reader.channels[read]] = False
        if reader.norms or reader.everything:
            unread[reader.channels] = False
        # A bias makes a zero channel nonzero behind an RMSNorm.
        if any(norm.kind == "layer" or norm.bias for _, norm in reader.norms):
            layered[reader.channels] = True
    why = "LayerNorm's mean and variance run over them"
    stem_norm = architecture.stem_norm is not None or architecture.patch_norm is not None
    if stem_norm or any(branch.post_norm for branch in architecture.branches):
        layered[:] = True
        why = "a norm runs over them where they are written"
    dead = (zero & ~layered) | (unread & ~layered)
    for channels in (
        _channels(architecture.stem_writes, architecture.embed),
        *(reader.channels for reader in readers),
        *_scored_writes(architecture),
    ):
        if bool(dead[channels].all()):
            dead[channels[0]] = False
    counts = (
        (int((zero & layered).sum()), why),
        (int((zero & ~layered & ~dead).sum()), "what reads or writes them needs one channel"),
    )
    remaining = tuple((count, reason) for count, reason in counts if count)
    return DeadChannels(~dead if bool(dead.any()) else None, remaining)


def rescale_norms(
    architecture: Architecture, state: Mapping[str, Tensor], keep: Tensor
) -> tuple[Architecture, dict[str, Tensor]]:
    """Rescale RMSNorms, so that their outputs over the kept channels stay the same."""
    changed = dict(state)
    dtype = state["stem.weight"].dtype
    specs: dict[str, NormSpec] = {}
    for reader in _readers(architecture, state):
        before, after = len(reader.channels), int(keep[reader.channels].sum())
        for name, norm in reader.norms:
            grown = before / after
            specs[name] = norm.model_copy(update={"eps": norm.eps * grown, "weight": True})
            weight = changed.get(f"{name}.weight", torch.ones(norm.width, dtype=dtype))
            changed[f"{name}.weight"] = weight * math.sqrt(grown)
    steps = []
    for number, step in enumerate(architecture.steps):
        row = []
        for position, branch in enumerate(step):
            found = specs.get(f"steps.{number}.{position}.norm")
            row.append(branch if found is None else branch.model_copy(update={"norm": found}))
        steps.append(tuple(row))
    selects = [
        select.model_copy(update={"norm": specs.get(f"selects.{number}.norm", select.norm)})
        for number, select in enumerate(architecture.selects)
    ]
    update: dict[str, object] = {"steps": tuple(steps), "selects": tuple(selects)}
    update |= {name: specs[name] for name in ("norm", "pool_norm") if name in specs}
    return architecture.model_copy(update=update), changed


def _readers(architecture: Architecture, state: Mapping[str, Tensor]) -> Iterator[_Reader]:
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}."
            if isinstance(branch.core, ConstantSpec):
                continue
            norms = ((f"{prefix}norm", branch.norm),) if branch.norm is not None else ()
            leaves = [f"{prefix}core.{leaf}.weight" for leaf in ("q", "k", "v", "gate", "fc1")]
            yield _Reader(
                _channels(branch.reads, architecture.embed),
                norms,
                tuple(name for name in leaves if name in state),
            )
    for number, select in enumerate(architecture.selects):
        if select.predictor is not None:
            prefix = f"selects.{number}."
            yield _Reader(
                _channels(select.reads, architecture.embed),
                ((f"{prefix}norm", select.norm),) if select.norm is not None else (),
                (f"{prefix}predictor.fc.weight",),
            )
    pool = architecture.pool
    # Attention pooling writes channels of its own, which are not those of the stream.
    last = (
        ("norm", architecture.norm),
        ("pool_norm", None if pool.width is not None else architecture.pool_norm),
    )
    if pool.width is not None:
        leaves = ["pool.k.weight", "pool.v.weight"]
    elif "pre_head.weight" in state:
        leaves = ["pre_head.weight"]
    else:
        leaves = ["head.weight", "head_dist.weight"]
    yield _Reader(
        _channels(architecture.head_reads, architecture.embed),
        tuple((name, norm) for name, norm in last if norm is not None),
        tuple(name for name in leaves if name in state),
        # Without a head the features are the output.
        everything=pool.refine is not None or (architecture.head is None and pool.width is None),
    )


def _scored_writes(architecture: Architecture) -> Iterator[Tensor]:
    """The channels that each attention writes by which a selection chooses tokens."""
    scoring = scoring_branches(architecture)
    for branch in architecture.branches:
        if branch.name in scoring:
            yield _channels(branch.writes, architecture.embed)


def _zero(architecture: Architecture, state: Mapping[str, Tensor]) -> Tensor:
    """(embed,) booleans, True for channels to which every writer adds zero."""
    zero = torch.ones(architecture.embed, dtype=torch.bool)
    written = _channels(architecture.stem_writes, architecture.embed)
    for name in ("stem.weight", "stem.bias", "prefix", "position"):
        if name in state:
            tensor = state[name] if name.startswith("stem") else state[name].T
            zero[written] &= (
                (tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]).eq(0).all(dim=1)
            )
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}."
            gain = state.get(f"{prefix}layer_scale")
            written = _channels(branch.writes, architecture.embed)
            for leaf in ("out.weight", "out.bias", "fc2.weight", "fc2.bias", "value"):
                found = state.get(f"{prefix}core.{leaf}")
                if found is not None:
                    rows = found if found.ndim > 1 else found[:, None]
                    rows = rows if gain is None else rows * gain[:, None]
                    zero[written] &= rows.eq(0).all(dim=1)
    return zero


def _channels(indices: Indices | None, embed: int) -> Tensor:
    return torch.arange(embed) if indices is None else torch.tensor(indices)
