"""One sub-layer on the residual stream: read, normalize, compute, scale, write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import AttentionSpec, BranchSpec, FfnSpec
from .attention import Attention
from .layers import Ffn, Norm


class Constant(nn.Module):
    """The same vector for every token: the remaining bias of a removed sub-layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, any) -> (1, 1, width)."""
        return self.value.view(1, 1, -1)


class Branch(nn.Module):
    """The update of one sub-layer: (batch, tokens, embed) -> (batch, queries, written channels)."""

    reads: Tensor | None
    writes: Tensor | None

    def __init__(self, spec: BranchSpec, embed: int) -> None:
        super().__init__()
        self.spec = spec
        width_in = embed if spec.reads is None else len(spec.reads)
        width_out = embed if spec.writes is None else len(spec.writes)
        for name, indices in (("reads", spec.reads), ("writes", spec.writes)):
            # Rebuilt from the architecture, hence not part of the saved state.
            buffer = None if indices is None else torch.tensor(indices, device="cpu")
            self.register_buffer(name, buffer, persistent=False)
        self.norm = Norm(spec.norm) if spec.norm else None
        self.core = _core(spec, width_in, width_out)
        self.post_norm = Norm(spec.post_norm) if spec.post_norm else None
        self.layer_scale = nn.Parameter(torch.ones(width_out)) if spec.layer_scale else None

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """With `queries`, compute that many leading tokens only; attention still reads all."""
        attention = isinstance(self.core, Attention)
        if queries is not None and not attention:
            x = x[:, :queries]
        if self.reads is not None:
            x = x.index_select(-1, self.reads)
        if self.norm is not None:
            x = self.norm(x)
        y: Tensor = self.core(x, queries) if attention else self.core(x)
        if self.post_norm is not None:
            y = self.post_norm(y)
        return y if self.layer_scale is None else y * self.layer_scale

    def add(self, stream: Tensor, y: Tensor) -> Tensor:
        """Return stream[..., writes] + y; `stream` itself is not modified."""
        if self.writes is None:
            return stream + y
        return stream.index_add(-1, self.writes, y.expand(*stream.shape[:-1], -1))


def _core(spec: BranchSpec, width_in: int, width_out: int) -> nn.Module:
    core = spec.core
    if isinstance(core, AttentionSpec):
        return Attention(core, width_in, width_out)
    if isinstance(core, FfnSpec):
        return Ffn(core, width_in, width_out)
    return Constant(width_out)
