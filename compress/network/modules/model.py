"""The network that an `Architecture` describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..architecture import Architecture, AttentionSpec
from .backbone import Backbone
from .branch import Branch
from .layers import ACTIVATIONS, ConvAct, Norm, spread
from .pool import AttentionPool, Refine
from .relative_bias import RelativeBias


class CompactModel(Backbone):
    """A Vision Transformer built from plain data, with the weights at their initial values.

    Images (batch, channels, height, width) -> logits (batch, classes), or features without a head.
    A lifted dense model, a model in training and a pruned model are all of this type and differ
    only in their architecture. Its other methods are those of timm's Vision Transformers.
    """

    stem_writes: Tensor | None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        embed, channels, stem = architecture.embed, architecture.image[0], architecture.stem
        filled = architecture.read_width(architecture.stem_writes)
        self.register_index("stem_writes", architecture.stem_writes)
        inputs = [channels, *(conv.channels for conv in stem.before)]
        convs = [ConvAct(conv, width) for conv, width in zip(stem.before, inputs, strict=False)]
        self.before = nn.Sequential(*convs) if convs else None
        self.stem = nn.Conv2d(
            inputs[-1],
            filled,
            stem.patch,
            stride=stem.stride or stem.patch,
            padding=stem.padding,
            bias=stem.bias,
        )
        self.prefix = (
            nn.Parameter(torch.zeros(architecture.prefix, filled)) if architecture.prefix else None
        )
        patches = architecture.tokens - architecture.prefix
        self.position = (
            nn.Parameter(torch.zeros(patches, filled)) if architecture.position else None
        )
        self.patch_norm = Norm(architecture.patch_norm) if architecture.patch_norm else None
        self.stem_norm = Norm(architecture.stem_norm) if architecture.stem_norm else None
        self.steps = nn.ModuleList(
            nn.ModuleList(Branch(branch, embed) for branch in step) for step in architecture.steps
        )
        self.register_index("head_reads", architecture.head_reads)
        self.norm = Norm(architecture.norm) if architecture.norm else None
        pool = architecture.pool
        self.refine = Refine(pool.refine) if pool.refine else None
        self.pool = (
            AttentionPool(pool, architecture.read_width(architecture.head_reads))
            if pool.kind == "attention"
            else None
        )
        self.pool_norm = Norm(architecture.pool_norm) if architecture.pool_norm else None
        self.index_features()
        head, width = architecture.head, architecture.head_width
        self.pre_head = nn.Linear(width, head.hidden) if head is not None and head.hidden else None
        width = head.hidden if head is not None and head.hidden else width
        self.head = nn.Linear(width, head.classes, bias=head.bias) if head is not None else None
        self.head_dist = (
            nn.Linear(width, head.classes, bias=head.bias)
            if head is not None and architecture.classifiers == 2
            else None
        )

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the residual stream after the last step, (batch, tokens, embed).

        With `last_queries`, only the tokens that the head reads.
        """
        x = self.embed(images)
        last = self._last_attention() if self.architecture.last_queries else None
        for number, step in enumerate(cast("Iterable[Sequence[Branch]]", self.steps)):
            queries = None
            if last is not None and number >= last:
                queries = self.architecture.pooled_prefix
            x = self.run_step(step, x, queries)
        return x

    def embed(self, images: Tensor) -> Tensor:
        """Run the stem: (batch, channels, height, width) -> (batch, tokens, embed).

        Images of another floating-point type are converted to that of the weights.
        """
        if images.dtype != self.stem.weight.dtype and images.is_floating_point():
            images = images.to(self.stem.weight.dtype)
        if self.before is not None:
            images = self.before(images)
        x: Tensor = self.stem(images).flatten(2).transpose(1, 2)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if self.position is not None:
            x = x + self.position
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if self.stem_norm is not None:
            x = self.stem_norm(x)
        return spread(x, self.stem_writes, self.architecture.embed)

    def classify(self, x: Tensor) -> Tensor:
        """(batch, tokens, embed) -> (batch, classes), or features where there is no head."""
        pooled_prefix = self.architecture.pooled_prefix
        if pooled_prefix:
            # A norm works token by token, so the other tokens need none.
            x = x[:, :pooled_prefix]
        return self.logits(self.normed(x))

    def logits(self, x: Tensor) -> Tensor:
        """Normalized tokens (batch, tokens, width) -> (batch, classes), or features."""
        kind = self.architecture.pool.kind
        if kind in ("distilled", "dense") and self.refine is not None:
            x = self.refine(x)
        if kind == "distilled":
            return (self._logits(x[:, 0]) + self._logits(x[:, 1], self.head_dist)) / 2
        if kind == "dense":
            patches = self._logits(x[:, self.architecture.prefix :], self.head_dist)
            return self._logits(x[:, 0]) + 0.5 * patches.amax(dim=1)
        return self._logits(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Normalized tokens (batch, tokens, width) -> pooled features (batch, width).

        With two classifiers, the mean of their tokens (`distilled`), or the class token (`dense`).
        Without pooling, the tokens.
        """
        if self.refine is not None:
            x = self.refine(x)
        x = self._pool(x)
        return x if self.pool_norm is None else self.pool_norm(x)

    def _pool(self, x: Tensor) -> Tensor:
        kind, prefix = self.architecture.pool.kind, self.architecture.prefix
        if self.pool is not None:
            pooled: Tensor = self.pool(x if self.architecture.pool.prefix else x[:, prefix:])
            return pooled
        if kind == "none":
            return x
        if kind in ("token", "dense"):
            return x[:, 0]
        if kind == "distilled":
            return (x[:, 0] + x[:, 1]) / 2
        if kind == "token_mean":
            return torch.cat([x[:, 0], x[:, prefix:].mean(dim=1)], dim=-1)
        if not kind.endswith("_all"):
            x = x[:, prefix:]
        if kind.startswith("mean"):
            return x.mean(dim=1)
        return x.amax(dim=1) if kind.startswith("max") else 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def _logits(self, x: Tensor, classifier: nn.Linear | None = None) -> Tensor:
        head, classifier = self.architecture.head, classifier or self.head
        if head is None or classifier is None:
            return self.features_of(x)
        if self.pre_head is not None:
            x = ACTIVATIONS[head.hidden_act](self.pre_head(x))
        return ACTIVATIONS[head.act](classifier(x))

    def _last_attention(self) -> int | None:
        """The last step with attention if the head reads prefix tokens only, else None."""
        if not self.architecture.pooled_prefix:
            return None
        with_attention = [
            number
            for number, step in enumerate(self.architecture.steps)
            if any(isinstance(branch.core, AttentionSpec) for branch in step)
        ]
        return with_attention[-1] if with_attention else 0


def build(architecture: Architecture, state: Mapping[str, Tensor]) -> CompactModel:
    """Return the module of `architecture` that holds the tensors of `state`, without copying them.

    No weight is initialized first. The module is in training mode, on the device of the tensors.
    """
    with torch.device("meta"):
        model = CompactModel(architecture)
    for module in model.modules():
        if isinstance(module, RelativeBias):
            module.materialize()
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    device = next(iter(state.values())).device
    return model if device.type == "cpu" else model.to(device)
