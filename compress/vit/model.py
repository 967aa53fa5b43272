"""The network that an `Architecture` describes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import Architecture, AttentionSpec
from .branch import Branch
from .norm import Norm


class CompactModel(nn.Module):
    """A Vision Transformer rebuilt from plain data: images (batch, channels, height, width) -> logits (batch, classes).

    It is the one module of this project: a lifted dense model, a model in training and a cut model differ only in their architecture.
    """

    head_reads: Tensor | None
    stem_writes: Tensor | None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        embed, channels = architecture.embed, architecture.image[0]
        patch = architecture.stem.patch
        filled = architecture.read_width(architecture.stem_writes)
        self.register_buffer("stem_writes", None if architecture.stem_writes is None else torch.tensor(architecture.stem_writes), persistent=False)
        self.stem = nn.Conv2d(channels, filled, patch, stride=patch, bias=architecture.stem.bias)
        self.prefix = nn.Parameter(torch.zeros(architecture.prefix, filled)) if architecture.prefix else None
        patches = architecture.tokens - architecture.prefix
        self.position = nn.Parameter(torch.zeros(patches, filled)) if architecture.position else None
        self.stem_norm = Norm(architecture.stem_norm) if architecture.stem_norm else None
        self.steps = nn.ModuleList(nn.ModuleList(Branch(branch, embed) for branch in step) for step in architecture.steps)
        self.register_buffer("head_reads", None if architecture.head_reads is None else torch.tensor(architecture.head_reads), persistent=False)
        self.norm = Norm(architecture.norm) if architecture.norm else None
        self.pool_norm = Norm(architecture.pool_norm) if architecture.pool_norm else None
        width = architecture.read_width(architecture.head_reads)
        self.head = nn.Linear(width, architecture.classes, bias=architecture.head.bias)
        distilled = architecture.pool.kind == "distilled"
        self.head_dist = nn.Linear(width, architecture.classes, bias=architecture.head.bias) if distilled else None

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The residual stream after the last step: (batch, tokens, embed), or only the tokens that the head reads."""
        x = self.embed(images)
        last = self._last_attention() if self.architecture.last_queries else None
        for number, step in enumerate(self.steps):
            queries = self.architecture.pooled_prefix if last is not None and number >= last else None
            written = [branch(x, queries) for branch in step]  # type: ignore[union-attr]
            if queries is not None:
                x = x[:, :queries]
            for branch, y in zip(step, written, strict=True):  # type: ignore[arg-type]
                x = branch.add(x, y)
        return x

    def embed(self, images: Tensor) -> Tensor:
        """The stem: (batch, channels, height, width) -> (batch, tokens, embed)."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        if self.position is not None:
            x = x + self.position
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if self.stem_norm is not None:
            x = self.stem_norm(x)
        if self.stem_writes is not None:
            x = x.new_zeros(*x.shape[:-1], self.architecture.embed).index_copy(-1, self.stem_writes, x)
        return x

    def classify(self, x: Tensor) -> Tensor:
        """(batch, tokens, embed) -> (batch, classes)."""
        kind, prefix = self.architecture.pool.kind, self.architecture.prefix
        wanted = self.architecture.pooled_prefix
        if wanted:
            # Norm works token by token, so the others need none.
            x = x[:, :wanted]
        if self.head_reads is not None:
            x = x.index_select(-1, self.head_reads)
        if self.norm is not None:
            x = self.norm(x)
        if kind == "distilled":
            assert self.head_dist is not None
            heads: Tensor = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
            return heads
        if kind == "token":
            x = x[:, 0]
        else:
            x = (x if kind == "mean_all" else x[:, prefix:]).mean(dim=1)
        if self.pool_norm is not None:
            x = self.pool_norm(x)
        logits: Tensor = self.head(x)
        return logits

    def _last_attention(self) -> int | None:
        """The step after which tokens no longer meet, when the head reads prefix tokens only."""
        if not self.architecture.pooled_prefix:
            return None
        with_attention = [
            number for number, step in enumerate(self.architecture.steps) if any(isinstance(branch.core, AttentionSpec) for branch in step)
        ]
        return with_attention[-1] if with_attention else 0
