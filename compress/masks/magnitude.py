"""Sums over the weights that each unit owns: their magnitude, or their number.

A unit owns the slices of parameters that go with it. An FFN unit owns its row of fc1 and its column
of fc2; a channel of a shared residual stream owns a slice of everything that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..network.architecture import Architecture, AttentionSpec, Indices
from ..network.axes import POOL_ATTENTION, Axis, has_own_mask, parameter_axes, stream_channels
from .groups import SHARED, Sharing, groups, sites

Scores = dict[str, dict[str, Tensor]]


def magnitude(
    architecture: Architecture, parameters: Mapping[str, Tensor], power: int, sharing: Sharing
) -> Scores:
    """Sum of |weight| ** power over the matrices and convolutions that each unit owns.

    Norms, biases and position tables are left out. With power 2 this is the squared L2 norm, which
    ranks as the norm does and adds up over units.

    Args:
        architecture: The network.
        parameters: Its parameters by name.
        power: 1 for L1, 2 for L2.
        sharing: Which sites share a mask.

    Returns:
        `scores[dimension][site]`, (size,) each.

    References:
        Kolev et al., "Evaluating Neural Network Pruning Techniques on Vision Transformers"
        (structured magnitude).
    """
    matrices = {
        name: tensor
        for name, tensor in parameters.items()
        if name.endswith(".weight") and tensor.ndim >= 2 and "norm." not in name
    }
    return owned(
        architecture, matrices, lambda tensor: tensor.detach().float().abs().pow(power), sharing
    )


def unit_costs(
    architecture: Architecture, parameters: Mapping[str, Tensor], sharing: Sharing
) -> Scores:
    """The number of parameters that each unit of the whole network owns, (size,) per group."""
    return owned(architecture, parameters, torch.ones_like, sharing)


def owned(
    architecture: Architecture,
    parameters: Mapping[str, Tensor],
    value: Callable[[Tensor], Tensor],
    sharing: Sharing,
) -> Scores:
    """Sum of `value(parameter)` over the slices that each unit owns.

    Args:
        architecture: The network.
        parameters: The parameters to sum over, by name.
        value: Elementwise function of a parameter.
        sharing: Which sites share a mask.

    Returns:
        `scores[dimension][site]`, (size,) each; `qk` and `v` are summed over heads.
    """
    each = per_head(architecture, parameters, value, sharing)
    return {
        dimension: {
            site: scores if dimension == "block" or scores.ndim == 1 else scores.sum(dim=0)
            for site, scores in entries.items()
        }
        for dimension, entries in each.items()
    }


def per_head(
    architecture: Architecture,
    parameters: Mapping[str, Tensor],
    value: Callable[[Tensor], Tensor],
    sharing: Sharing,
) -> Scores:
    """Sum of `value(parameter)` over the slices that each unit owns, for each head.

    Args:
        architecture: The network.
        parameters: The parameters to sum over, by name.
        value: Elementwise function of a parameter.
        sharing: Which sites share a mask.

    Returns:
        As `owned`, but `qk` and `v` have shape (heads, size).
    """
    wanted = groups(architecture, sharing)
    attentions = _attentions(architecture)
    totals: Scores = {}
    for dimension in wanted:
        for site, size in sites(architecture, dimension).items():
            rows = (attentions[site].heads, size) if dimension in ("qk", "v") else (size,)
            totals.setdefault(dimension, {})[site] = torch.zeros(rows)
    axes, channels = parameter_axes(architecture), stream_channels(architecture)
    for name, tensor in parameters.items():
        if name not in axes:
            continue
        values = value(tensor)
        # A norm with one weight for all heads lacks the heads axis, the first one of the table.
        for number, axis in enumerate(axes[name][-values.ndim :]):
            others = [other for other in range(values.ndim) if other != number]
            sums = values.sum(dim=others) if others else values
            _add(totals, axis, sums, attentions, channels.get(axis.site))
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}."
            inner = [
                value(tensor).sum()
                for name, tensor in parameters.items()
                if name.startswith(prefix)
            ]
            totals["block"][branch.name] = (
                torch.stack(inner).sum()[None] if inner else torch.zeros(1)
            )
    return {dimension: _shared(totals[dimension], entries) for dimension, entries in wanted.items()}


def _add(
    totals: Scores,
    axis: Axis,
    values: Tensor,
    attentions: Mapping[str, AttentionSpec],
    channels: Indices | None,
) -> None:
    """Add the sums along one axis; `channels` are those of the stream that it runs over."""
    dimension, site = axis.dimension, axis.site
    values = values.detach().cpu()
    if dimension in ("embed", "embed*2"):
        each = values.view(2, -1).sum(dim=0) if dimension == "embed*2" else values
        total = totals["embed"][site]
        places = torch.arange(len(total)) if channels is None else torch.tensor(channels)
        total.index_add_(0, places, each.to(total))
    elif dimension in ("ffn", "head"):
        totals[dimension][site] += values
    elif dimension in ("local", "pooled"):
        # The two parts of the first layer of a predictor, one behind the other.
        part = slice(len(values)) if dimension == "local" else slice(-len(values), None)
        totals["ffn"][site][part] += values
    elif "*" in dimension and dimension.split("*")[-1] in ("qk", "v"):
        core = attentions[site]
        owners, column = dimension.split("*")[0], dimension.split("*")[-1]
        heads = core.kv_heads if owners == "kv" else core.heads
        # (heads, parts, columns); differential attention has two parts.
        table = values.view(heads, -1, core.qk if column == "qk" else core.v).sum(dim=1)
        if owners == "kv":
            # Heads that share keys and values own equal parts of them.
            kv_of = torch.tensor(core.kv_of if core.kv_of is not None else range(core.heads))
            table = (table / torch.bincount(kv_of)[:, None])[kv_of]
        totals["head"][site] += table.sum(dim=1)
        totals[column][site] += table
    elif dimension in ("qk", "v"):
        # A norm's weight, the same for all heads.
        totals[dimension][site] += values / len(totals[dimension][site])


def _shared(found: Mapping[str, Tensor], wanted: Mapping[str, int]) -> dict[str, Tensor]:
    blocks = [scores for name, scores in found.items() if not has_own_mask(name)]
    return {
        site: torch.stack(blocks).sum(dim=0) if site == SHARED else found[site] for site in wanted
    }


def _attentions(architecture: Architecture) -> dict[str, AttentionSpec]:
    found = {
        branch.name: branch.core
        for branch in architecture.branches
        if isinstance(branch.core, AttentionSpec)
    }
    if architecture.pool.attention is not None:
        found[POOL_ATTENTION] = architecture.pool.attention
    return found
