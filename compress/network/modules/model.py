"""The network that an `Architecture` describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import Architecture
from ..select_specs import ATTENTION_SCORERS, scoring_attention, select_inputs
from ..token_order import stem_runs
from .backbone import Backbone
from .branch import Branch
from .layers import ACTIVATIONS, Norm, spread
from .pool import AttentionPool, Refine
from .relative_bias import RelativeBias
from .select import Choices, Scored, Select
from .soft_split import stem_layers

# In training: which tokens are kept from a selection on, all of which stay in the stream. Gets the
# selection, the stream, what scores it, and the factors (batch, tokens) so far; returns new ones.
Policy = Callable[[Select, Tensor, Scored | None, Tensor | None], Tensor]


class StepsRun(NamedTuple):
    """The stream behind some steps.

    Attributes:
        x: (batch, tokens, embed).
        keep: In training with a policy the factors (batch, tokens) of tokens that stay in it.
        scored: What scores the patches for the next selection.
        positions: Which tokens of the stem these are, (batch, tokens). None: the first ones.
    """

    x: Tensor
    keep: Tensor | None = None
    scored: Scored | None = None
    positions: Tensor | None = None

    def of(self, images: Tensor) -> StepsRun:
        """The stream of some images, by their numbers, without what scores patches."""
        keep, positions = (
            None if value is None else value[images] for value in (self.keep, self.positions)
        )
        return StepsRun(self.x[images], keep, positions=positions)


class CompactModel(Backbone):
    """A Vision Transformer built from plain data, with the weights at their initial values.

    Images (batch, channels, height, width) -> logits (batch, classes), or features without a head.
    A lifted dense model, a model in training and a pruned model are all of this type and differ
    only in their architecture. Its other methods are those of timm's Vision Transformers.
    """

    stem_writes: Tensor | None
    order: Tensor | None
    # Factors of the tokens that are pooled, 0 or 1, in a network that computes with a token mask.
    token_keep: Tensor | None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        embed, channels, stem = architecture.embed, architecture.image[0], architecture.stem
        filled = architecture.read_width(architecture.stem_writes)
        # Set by trainings, and without effect in evaluation mode. `observer` gets the tokens that
        # the head reads, (batch, tokens, channels), and their factors.
        self.patch_drop: nn.Module | None = None
        self.policy: Policy | None = None
        self.observer: Callable[[Tensor, Tensor | None], None] | None = None
        self.register_index("stem_writes", architecture.stem_writes)
        self.register_index("order", architecture.order)
        self.register_buffer("token_keep", None, persistent=False)
        self.before = stem_layers(stem, channels)
        self.stem = nn.Conv2d(
            stem.inputs(channels)[-1],
            filled,
            stem.patch,
            stride=stem.stride or stem.patch,
            padding=stem.padding,
            bias=stem.bias,
        )
        # All learned tokens, those between the patches last.
        learned = architecture.learned_tokens
        self.prefix = nn.Parameter(torch.zeros(learned, filled)) if learned else None
        self.position = (
            nn.Parameter(torch.zeros(architecture.patches, filled))
            if architecture.position
            else None
        )
        self.patch_norm = Norm(architecture.patch_norm) if architecture.patch_norm else None
        self.stem_norm = Norm(architecture.stem_norm) if architecture.stem_norm else None
        self.steps = nn.ModuleList(
            nn.ModuleList(Branch(branch, embed) for branch in step) for step in architecture.steps
        )
        tokens = (architecture.tokens, *architecture.step_tokens(last_queries=False))
        self.selects = nn.ModuleList(
            Select(spec, embed, architecture.prefix, count - architecture.prefix)
            for spec, _, count in select_inputs(architecture, tokens)
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

    def forward(self, images: Tensor, choices: Choices | None = None) -> Tensor:
        """Classify images.

        Args:
            images: (batch, channels, height, width).
            choices: Records which patches the selections choose, or prescribes them.

        Returns:
            (batch, classes).
        """
        found = self.run_steps(self.embed(images), choices)
        if self.observer is not None and self.training:
            self.observer(self.normed(found.x), found.keep)
        return self.classify(found.x, found.keep)

    def features(self, images: Tensor) -> Tensor:
        """Return the residual stream after the last step, (batch, tokens, embed).

        These are the tokens that `Architecture.final_tokens` counts.
        """
        return self.run_steps(self.embed(images)).x

    def run_steps(
        self, x: Tensor, choices: Choices | None = None, until: Select | None = None
    ) -> StepsRun:
        """Run the steps and selections.

        Args:
            x: What the stem returns, (batch, tokens, embed).
            choices: Records which patches the selections choose, or prescribes them.
            until: The selection to stop before, whose patches `scored` of the result scores.
                None: run all.

        Returns:
            The stream behind them.
        """
        architecture = self.architecture
        policy = self.policy if self.training else None
        if policy is not None:
            architecture = architecture.model_copy(update={"selects": ()})
        counts = architecture.step_tokens()
        selects = cast("Sequence[Select]", self.selects)
        steps = cast("Sequence[Sequence[Branch]]", self.steps)
        before = found = StepsRun(x)
        for number, count in enumerate((*counts, 0)):
            for select in selects:
                if select.spec.at != number:
                    continue
                scored = self._scored_by(select, before)
                if select is until:
                    return found._replace(scored=scored)
                if policy is None:
                    x, positions = select(found.x, scored, choices, found.positions)
                    found = StepsRun(x, positions=positions)
                else:
                    found = found._replace(keep=policy(select, found.x, scored, found.keep))
            if number < len(steps):
                x = self.run_step(steps[number], found.x, count, found.keep, found.positions)
                before, found = found, found._replace(x=x)
        return found

    def _scored_by(self, select: Select, before: StepsRun) -> Scored | None:
        """The sub-layer whose attention scores the patches of a selection, and what it read."""
        if select.spec.scorer not in ATTENTION_SCORERS:
            return None
        name = scoring_attention(self.architecture, select.spec).name
        step = cast("Sequence[Branch]", self.steps[select.spec.at - 1])
        branch = next(branch for branch in step if branch.spec.name == name)
        return Scored(branch, before.x, before.positions)

    def embed(self, images: Tensor) -> Tensor:
        """Run the stem: (batch, channels, height, width) -> (batch, tokens, embed).

        Images of another floating-point type are converted to that of the weights.
        """
        if images.dtype != self.stem.weight.dtype and images.is_floating_point():
            images = images.to(self.stem.weight.dtype)
        if self.before is not None:
            images = self.before(images)
        x = self._patches(images)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if self.position is not None:
            x = x + self.position
        if self.prefix is not None:
            learned = self.prefix.expand(x.shape[0], -1, -1)
            if self.architecture.inner is None:
                x = torch.cat([learned, x], dim=1)
            else:
                x = torch.cat(
                    [
                        (learned if is_learned else x)[:, start:stop]
                        for is_learned, start, stop in stem_runs(self.architecture)
                    ],
                    dim=1,
                )
        if self.stem_norm is not None:
            x = self.stem_norm(x)
        x = spread(x, self.stem_writes, self.architecture.embed)
        return x if self.patch_drop is None else self.patch_drop(x)

    def _patches(self, images: Tensor) -> Tensor:
        """The patch projection: (batch, channels, height, width) -> (batch, patches, channels)."""
        stem, order = self.stem, self.order
        if order is None:
            x: Tensor = stem(images).flatten(2).transpose(1, 2)
            return x
        if len(order) == self.architecture.grid[0] * self.architecture.grid[1]:
            x = stem(images).flatten(2).transpose(1, 2)
            return x.index_select(1, order)
        # Patches that leave before the first sub-layer are not computed.
        pixels = self._patch_pixels(images).index_select(1, order)
        return F.linear(pixels, stem.weight.flatten(1), stem.bias)

    def _patch_pixels(self, images: Tensor) -> Tensor:
        """The pixels that each patch reads, (batch, patches of the grid, channels * patch area)."""
        spec, (down, across) = self.architecture.stem, self.architecture.grid
        height, width = spec.patch
        if spec.tiles(images.shape[-2], images.shape[-1]):
            # Reshapes instead of im2col, which some converters of other runtimes do not have.
            cells: Tensor = images.unflatten(3, (across, width)).unflatten(2, (down, height))
            return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        stride = spec.stride or spec.patch
        return F.unfold(images, spec.patch, padding=spec.padding, stride=stride).transpose(1, 2)

    def classify(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, tokens, embed) -> (batch, classes), or features where there is no head.

        `keep`: factors (batch, tokens), 0 for tokens that are not pooled. None: all are.
        """
        pooled_prefix = self.architecture.pooled_prefix
        if pooled_prefix:
            # A norm works token by token, so the other tokens need none.
            x = x[:, :pooled_prefix]
        return self.logits(self.normed(x), keep)

    def logits(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalized tokens (batch, tokens, width) -> (batch, classes), or features."""
        kind = self.architecture.pool.kind
        if kind in ("distilled", "dense") and self.refine is not None:
            x = self.refine(x)
        if kind == "distilled":
            return (self._logits(x[:, 0]) + self._logits(x[:, 1], self.head_dist)) / 2
        if kind == "dense":
            patches = self._logits(x[:, self.architecture.prefix :], self.head_dist)
            keep = self.token_keep if keep is None else keep
            keep = None if keep is None else keep[..., self.architecture.prefix :]
            return self._logits(x[:, 0]) + 0.5 * _maximum(patches, keep)
        return self._logits(self.pooled(x, keep))

    def pooled(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalized tokens (batch, tokens, width) -> pooled features (batch, width).

        With two classifiers, the mean of their tokens (`distilled`), or the class token (`dense`).
        Without pooling, the tokens.
        """
        if self.refine is not None:
            x = self.refine(x)
        x = self._pool(x, keep)
        return x if self.pool_norm is None else self.pool_norm(x)

    def _pool(self, x: Tensor, token_keep: Tensor | None = None) -> Tensor:
        kind, prefix = self.architecture.pool.kind, self.architecture.prefix
        token_keep = self.token_keep if token_keep is None else token_keep
        if self.pool is not None:
            seen = token_keep
            if not self.architecture.pool.prefix:
                x, seen = x[:, prefix:], None if seen is None else seen[..., prefix:]
            pooled: Tensor = self.pool(x, seen if self.training and self.policy else None)
            return pooled
        if kind == "none":
            return x
        if kind in ("token", "dense"):
            return x[:, 0]
        if kind == "distilled":
            return (x[:, 0] + x[:, 1]) / 2
        keep = None if token_keep is None else token_keep[..., prefix:]
        if kind == "token_mean":
            return torch.cat([x[:, 0], _mean(x[:, prefix:], keep)], dim=-1)
        if kind.endswith("_all"):
            keep = token_keep
        else:
            x = x[:, prefix:]
        if kind.startswith("mean"):
            return _mean(x, keep)
        largest = _maximum(x, keep)
        return largest if kind.startswith("max") else 0.5 * (largest + _mean(x, keep))

    def _logits(self, x: Tensor, classifier: nn.Linear | None = None) -> Tensor:
        head, classifier = self.architecture.head, classifier or self.head
        if head is None or classifier is None:
            return self.features_of(x)
        if self.pre_head is not None:
            x = ACTIVATIONS[head.hidden_act](self.pre_head(x))
        return ACTIVATIONS[head.act](classifier(x))


def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the kept tokens: (batch, tokens, width) -> (batch, width).

    `keep`: (tokens,) or (batch, tokens).
    """
    if keep is None:
        return x.mean(dim=1)
    return (x * keep.unsqueeze(-1)).sum(dim=1) / keep.sum(dim=-1, keepdim=True)


def _maximum(x: Tensor, keep: Tensor | None) -> Tensor:
    """Maximum over the kept tokens: (batch, tokens, width) -> (batch, width)."""
    return (x if keep is None else x.masked_fill(keep.unsqueeze(-1) == 0, -torch.inf)).amax(dim=1)


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


def with_all_queries(model: CompactModel) -> CompactModel:
    """The same network, whose last attention computes every token; it shares the weights."""
    architecture = model.architecture.model_copy(update={"last_queries": False})
    return build(architecture, model.state_dict()).eval()
