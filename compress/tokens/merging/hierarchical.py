"""HVT: neighbors in the sequence of patches are pooled between blocks, which needs training.

References:
    Pan et al. 2021, "Scalable Vision Transformers with Hierarchical Pooling", section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InputError, UnsupportedModel
from ...lift import lift
from ...network.architecture import Architecture, AttentionSpec, PoolSpec
from ...network.count import branch_macs, count_macs
from ...network.modules.branch import Branch
from ...network.modules.model import CompactModel, build

# Of the source: windows of three tokens, every second one.
KERNEL, STRIDE = 3, 2
# Standard deviation of new positions, as timm's models have it.
_POSITION_STD = 0.02
# Pools whose classifier reads as many features as the mean of the patches.
_POOLS = ("token", "mean", "mean_all", "max", "max_all", "avgmax", "avgmax_all", "distilled")


def hierarchical(model: nn.Module, every: int | None = None, *, seed: int = 0) -> HierarchicalModel:
    """Return an HVT with the layers of a Vision Transformer, to be trained.

    After the first block and each `every`-th block behind it, the maximum of three neighboring
    tokens is taken at every second one, and a new learned position is added. Neighbors are those of
    the sequence, rows of the image one after the other. There is no class token; the head reads the
    mean of the tokens. The source trains from random weights for 300 epochs on ImageNet.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`. Its weights are copied, but for
            prefix tokens and, of a distilled model, the second classifier.
        every: Blocks between two pools. None: the depth, one pool after the first block, as in
            HVT-S-1.
        seed: Of the new positions.

    Returns:
        A module in the mode of `model`. Shapes: (batch, channels, height, width) -> (batch,
        classes), or features without a classifier.

    Raises:
        InputError: `every` is not positive, or a pool finds fewer than three tokens.
        UnsupportedModel: A part has no rule here; the message names its path and the reason.

    References:
        Pan et al. 2021, "Scalable Vision Transformers with Hierarchical Pooling".
    """
    source = lift(model)
    architecture = source.architecture
    _require_plain(architecture)
    depth = len(architecture.block_ends)
    every = depth if every is None else every
    if every < 1:
        raise InputError(f"every = {every}: the number of blocks between pools must be positive")
    # A first block that pruning emptied ends before the first step.
    ends = [max(1, end) for end in architecture.block_ends[::every]]
    count = architecture.patches
    for place, _ in enumerate(ends):
        if count < KERNEL:
            raise InputError(
                f"every = {every}: pool {place + 1} of {len(ends)} finds {count} tokens and needs "
                f"{KERNEL}; pool less often"
            )
        count = _pooled(count)
    network = _without_prefix(source)
    found = HierarchicalModel(network, ends, torch.Generator().manual_seed(seed))
    return found.train(source.training)


class HierarchicalModel(nn.Module):
    """A network that pools its tokens after some steps.

    Images (batch, channels, height, width) -> logits (batch, classes), or features without a head.

    Attributes:
        model: The network without pools; its head reads the mean of all tokens.
        positions: For each pool the new positions, (tokens, embed).
        ends: For each pool the number of steps that run before it.
    """

    def __init__(
        self, model: CompactModel, ends: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.model, self.ends = model, tuple(ends)
        count, width = model.architecture.patches, model.architecture.embed
        self.positions = nn.ParameterList()
        for _ in self.ends:
            count = _pooled(count)
            noise = torch.randn(count, width, generator=generator)
            self.positions.append(nn.Parameter(_POSITION_STD * noise))

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The number of tokens that the stream carries after each step and the pools behind it."""
        count, found = self.model.architecture.tokens, []
        for number in range(len(self.model.steps)):
            for _ in range(self.ends.count(number + 1)):
                count = _pooled(count)
            found.append(count)
        return tuple(found)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image; a maximum is none."""
        architecture = self.model.architecture
        before = (architecture.tokens, *self.token_counts)
        found = count_macs(architecture)
        for tokens, step in zip(before, architecture.steps, strict=False):
            for branch in step:
                dense = branch_macs(
                    branch, architecture.embed, architecture.tokens, architecture.tokens
                )
                found += branch_macs(branch, architecture.embed, tokens, tokens) - dense
        return found

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers exclude from weight decay."""
        return {"model.position", *(f"positions.{place}" for place in range(len(self.ends)))}

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        *_, x = self.trace(images)
        return self.model.classify(x)

    def trace(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the stream after the stem, and after each step and the pools behind it."""
        model, pool = self.model, 0
        x = model.embed(images)
        yield x
        for number, step in enumerate(model.steps):
            x = model.run_step(cast("Sequence[Branch]", step), x)
            for _ in range(self.ends.count(number + 1)):
                x = F.max_pool1d(x.transpose(1, 2), KERNEL, STRIDE).transpose(1, 2)
                x, pool = x + self.positions[pool], pool + 1
            yield x


def _pooled(count: int) -> int:
    return (count - KERNEL) // STRIDE + 1


def _without_prefix(source: CompactModel) -> CompactModel:
    """A copy of the network without prefix tokens, whose head reads the mean of all tokens."""
    update = {"prefix": 0, "pool": PoolSpec(kind="mean"), "last_queries": False}
    # Copies are not validated; a pool that reads a missing class token would pass.
    architecture = Architecture.model_validate(
        source.architecture.model_copy(update=update).model_dump(by_alias=True)
    )
    state = {
        name: tensor.detach().clone()
        for name, tensor in source.state_dict().items()
        if name != "prefix" and not name.startswith("head_dist.")
    }
    return build(architecture, state)


def _require_plain(architecture: Architecture) -> None:
    """Raise UnsupportedModel if a part of the network needs the places of single patches."""
    reasons = [
        (branch.name, reason)
        for branch in architecture.branches
        if isinstance(branch.core, AttentionSpec)
        for present, reason in (
            (branch.core.rope, "a pooled token has no single position for the rotary embedding"),
            (branch.core.bias, "a pooled token has no single place in the relative position bias"),
        )
        if present is not None
    ]
    if architecture.drops_tokens or architecture.selects:
        reasons.append(("model", "a token mask or a selection already drops patches"))
    pool = architecture.pool
    if pool.kind not in _POOLS or pool.refine is not None:
        kind = "refinement" if pool.refine is not None else f"'{pool.kind}'"
        reasons.append(("pool", f"{kind} reads other features than the mean of the tokens"))
    if reasons:
        path, reason = reasons[0]
        raise UnsupportedModel(
            f"{path}: {reason}, so HVT cannot be built from it; give a network with learned "
            "positions and a class token or a mean"
        )
