"""One sub-layer on the residual stream: read, normalize, compute, scale, write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import AttentionSpec, BranchSpec, FfnSpec
from ..select_specs import Scorer
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

    def forward(
        self,
        x: Tensor,
        queries: int | None = None,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Compute the update.

        Args:
            x: The stream, (batch, tokens, embed).
            queries: Compute that many leading tokens only; attention still reads all.
            keep: Factors (batch, tokens) of the keys of an attention. None: all are read.
            positions: Which tokens of the stem these are, (batch, tokens). None: the first ones.

        Returns:
            (batch, queries, written channels).
        """
        attention = isinstance(self.core, Attention)
        if queries is not None and not attention:
            x = x[:, :queries]
        x = self.read(x)
        y: Tensor = self.core(x, queries, keep, positions) if attention else self.core(x)
        if self.post_norm is not None:
            y = self.post_norm(y)
        return y if self.layer_scale is None else y * self.layer_scale

    def read(self, x: Tensor) -> Tensor:
        """What the core reads: (batch, tokens, embed) -> (batch, tokens, read channels)."""
        if self.reads is not None:
            x = x.index_select(-1, self.reads)
        return x if self.norm is None else self.norm(x)

    def attention_scores(
        self,
        x: Tensor,
        scorer: Scorer,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The scores of the tokens by this attention, for each head.

        Args:
            x: The stream before the sub-layer, (batch, tokens, embed).
            scorer: "class-attention" or "column-attention".
            rows: Factors of the tokens that attend, for "column-attention".
            columns: Factors (heads, v) of the value columns, for "column-attention".
            positions: As for `forward`.

        Returns:
            (batch, heads, tokens).
        """
        attention = self.core
        assert isinstance(attention, Attention)
        if scorer == "class-attention":
            return attention.class_weights(self.read(x), positions)
        return attention.column_weights(self.read(x), rows, columns, positions)

    def add(self, stream: Tensor, y: Tensor) -> Tensor:
        """Return stream[..., writes] + y; `stream` itself is not modified."""
        if self.writes is None:
            return stream + y
        # Products by autocast are of another type than the stream, which a sum allows and this not.
        added = y.to(stream.dtype).expand(*stream.shape[:-1], -1)
        return stream.index_add(-1, self.writes, added)


def _core(spec: BranchSpec, width_in: int, width_out: int) -> nn.Module:
    core = spec.core
    if isinstance(core, AttentionSpec):
        return Attention(core, width_in, width_out)
    if isinstance(core, FfnSpec):
        return Ffn(core, width_in, width_out)
    return Constant(width_out)
