"""Channels of the residual stream that may go: zero for every writer, where the norms that read
them allow it, or read by nobody.

A LayerNorm's mean and variance run over all its channels, so a channel that is always zero still
shapes the others' values and stays. An RMSNorm over d channels of which k are zero is the RMSNorm
over the other d - k with eps d / (d - k) and γ √(d / (d - k)), exactly. A channel that carries
something and that nobody reads goes only where no norm looks at it at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.architecture import Architecture, ConstantSpec, Indices, NormSpec


@dataclass(frozen=True)
class DeadChannels:
    """`keep` (embed,), or None when all stay; `left` channels are zero throughout and stay, for the
    reason `why`.
    """

    keep: Tensor | None
    left: int = 0
    why: str = ""


@dataclass(frozen=True)
class _Reader:
    """Who looks at the stream: its channels, its norms and its matrices (by their columns), all by
    state name.
    """

    channels: Tensor
    norms: tuple[tuple[str, NormSpec], ...]
    matrices: tuple[str, ...]
    # Something that is no matrix looks at all of them.
    everything: bool = False


def dead_channels(architecture: Architecture, state: Mapping[str, Tensor]) -> DeadChannels:
    """Which channels may go from a network with these tensors."""
    readers = list(_readers(architecture, state))
    zero = _zero(architecture, state)
    unread = torch.ones(architecture.embed, dtype=torch.bool)
    layered = torch.zeros(architecture.embed, dtype=torch.bool)
    for reader in readers:
        read = torch.zeros(len(reader.channels), dtype=torch.bool)
        for name in reader.matrices:
            read |= (
                (state[name] != 0)
                .flatten(0, -2)
                .any(dim=0)
                .view(-1, len(reader.channels))
                .any(dim=0)
            )
        unread[reader.channels[read]] = False
        if reader.norms or reader.everything:
            unread[reader.channels] = False
        # A bias behind an RMSNorm makes something of a channel that is zero.
        if any(norm.kind == "layer" or norm.bias for _, norm in reader.norms):
            layered[reader.channels] = True
    why = "LayerNorm's mean and variance run over them"
    if (
        architecture.stem_norm is not None
        or architecture.patch_norm is not None
        or any(branch.post_norm for branch in architecture.branches)
    ):
        layered[:] = True
        why = "a norm runs over them where they are written"
    dead = (zero & ~layered) | (unread & ~layered)
    if bool(dead.all()):
        dead[0] = False
    left = int((zero & ~dead).sum())
    return DeadChannels(~dead if bool(dead.any()) else None, left, why if left else "")


def rescale_norms(
    architecture: Architecture, state: Mapping[str, Tensor], keep: Tensor
) -> tuple[Architecture, dict[str, Tensor]]:
    """The network whose RMSNorms, run over the kept channels alone, give what they give now that
    the others are zero.
    """
    changed = dict(state)
    specs: dict[str, NormSpec] = {}
    for reader in _readers(architecture, state):
        before, after = len(reader.channels), int(keep[reader.channels].sum())
        for name, norm in reader.norms:
            grown = before / after
            specs[name] = norm.model_copy(update={"eps": norm.eps * grown, "weight": True})
            weight = changed.get(f"{name}.weight", torch.ones(norm.width))
            changed[f"{name}.weight"] = weight * math.sqrt(grown)
    steps = []
    for number, step in enumerate(architecture.steps):
        row = []
        for position, branch in enumerate(step):
            found = specs.get(f"steps.{number}.{position}.norm")
            row.append(branch if found is None else branch.model_copy(update={"norm": found}))
        steps.append(tuple(row))
    update: dict[str, object] = {"steps": tuple(steps)}
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
    pool = architecture.pool
    # Behind attention pooling the stream is another.
    last = (
        ("norm", architecture.norm),
        ("pool_norm", None if pool.width is not None else architecture.pool_norm),
    )
    if pool.width is not None:
        leaves = ["pool.k.weight", "pool.v.weight"]
    else:
        leaves = (
            ["pre_head.weight"]
            if "pre_head.weight" in state
            else ["head.weight", "head_dist.weight"]
        )
    yield _Reader(
        _channels(architecture.head_reads, architecture.embed),
        tuple((name, norm) for name, norm in last if norm is not None),
        tuple(name for name in leaves if name in state),
        # Without a head the features themselves are what is asked for.
        everything=pool.refine is not None or (architecture.head is None and pool.width is None),
    )


def _zero(architecture: Architecture, state: Mapping[str, Tensor]) -> Tensor:
    """(embed,) channels to which every writer adds nothing but zeros."""
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
            for leaf in (
                "core.out.weight",
                "core.out.bias",
                "core.fc2.weight",
                "core.fc2.bias",
                "core.value",
            ):
                if prefix + leaf in state:
                    tensor = state[prefix + leaf]
                    rows = tensor if tensor.ndim > 1 else tensor[:, None]
                    rows = rows if gain is None else rows * gain[:, None]
                    zero[_channels(branch.writes, architecture.embed)] &= rows.eq(0).all(dim=1)
    return zero


def _channels(indices: Indices | None, embed: int) -> Tensor:
    return torch.arange(embed) if indices is None else torch.tensor(indices)
