"""ToMe and PPT on a network of any widths: tokens merge, or leave, between attention and FFN.

Which ones is decided for each image; how many is not, so that shapes are static.

References:
    Bolya et al. 2023, "Token Merging: Your ViT But Faster".
    Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InputError, UnsupportedModel
from ...lift import lift
from ...network.architecture import Architecture, AttentionSpec, BranchSpec
from ...network.count import branch_macs, branch_tokens, count_macs
from ...network.modules.attention import Attention
from ...network.modules.branch import Branch
from ...network.modules.model import CompactModel
from .matching import (
    Removals,
    merge_matrix,
    merge_places,
    merged_sizes,
    most_removable,
    prune_places,
    removal_schedule,
)

MergingMethod = Literal["tome", "ppt"]
MERGING_METHODS: tuple[MergingMethod, ...] = get_args(MergingMethod)
# Tokens per attention in the papers' main rows for DeiT-S.
_USUAL_REMOVALS = {"tome": 13, "ppt": 50}
# Pools of the head, and whether their mean must be weighted by the sizes.
_WEIGHTED = {
    "token": False,
    "distilled": False,
    "max": False,
    "max_all": False,
    "mean": True,
    "mean_all": True,
    "token_mean": True,
}


@dataclass(frozen=True)
class MergingOptions:
    """How tokens merge.

    Attributes:
        proportional: Whether log(size) is added to the attention scores of a merged token, which a
            network that was trained without merging needs.
        threshold: Of "ppt": an image whose scores have a smaller variance merges tokens, another
            one drops them. None: the paper's 7e-5 at its 196 patches, times (196 / patches)² for
            other numbers, since the scores of an image have the sum 1.
    """

    proportional: bool = True
    threshold: float | None = None


class _Attended(NamedTuple):
    """The output of an attention, and what the choice of tokens needs of it."""

    y: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def merged_tokens(
    model: nn.Module,
    method: MergingMethod = "tome",
    r: Removals | None = None,
    *,
    blocks: Sequence[int] | None = None,
    options: MergingOptions | None = None,
) -> MergedModel:
    """Return a network whose tokens merge per image, without training, to compare with masks.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`, whose weights are then shared.
            Its sub-layers are serial, its positions are learned, and its head reads the class
            token, both tokens of a distilled model, a mean or a maximum.
        method: "tome" (default): pairs of similar keys merge into their size-weighted mean. "ppt":
            tokens are scored by the attention of the class token times the norm of the value; an
            image whose scores vary little merges like "tome", another one drops the lowest.
        r: How many tokens to remove after an attention: a number; a pair (number, trend), where the
            trend from -1 to 1 is the change over the depth; or a list. None: 13 for "tome", 50 for
            "ppt". At most half of the patches are removed at once.
        blocks: Numbers of the attentions that remove tokens, from 0. None: all for "tome"; for
            "ppt" those at a quarter, a half and three quarters of the depth.
        options: Proportional attention and the threshold of "ppt". None: those of the papers.

    Returns:
        A module in evaluation or training mode like `model`. Shapes: (batch, channels, height,
        width) -> (batch, classes), or features if the model has no classifier. With r = 0 it is
        equal to the network.

    Raises:
        InputError: The method is unknown, `r` or `blocks` do not fit the network.
        UnsupportedModel: A part has no rule here; the message names its path and the reason.

    References:
        Bolya et al. 2023, "Token Merging: Your ViT But Faster".
        Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers".
    """
    if method not in MERGING_METHODS:
        raise InputError(
            f"method {method!r} is unknown; choose one of {', '.join(MERGING_METHODS)}"
        )
    compact = lift(model)
    architecture = compact.architecture
    _require_mergeable(architecture, method)
    attentions = architecture.attention_steps()
    count = len(attentions)
    if blocks is None:
        blocks = range(count) if method == "tome" else [count * part // 4 for part in (1, 2, 3)]
    if wrong := [number for number in blocks if not 0 <= number < count]:
        raise InputError(f"blocks = {list(blocks)}: there is no attention {wrong[0]} of {count}")
    chosen = sorted(set(blocks))
    usual = _USUAL_REMOVALS[method] if r is None else r
    by_attention = dict(zip(chosen, removal_schedule(usual, len(chosen)), strict=True))
    removed = {step: by_attention.get(number, 0) for number, step in enumerate(attentions)}
    merged = MergedModel(compact, method, removed, options or MergingOptions())
    return merged.train(compact.training)


class MergedModel(nn.Module):
    """A network whose tokens merge or leave per image, as many for every image.

    Images (batch, channels, height, width) -> logits (batch, classes), or features without a head.
    It shares the weights of `model`.

    Attributes:
        model: The network.
        method: "tome" or "ppt".
        removed: The number of tokens that leave after each step.
        options: Proportional attention and threshold.
    """

    def __init__(
        self,
        model: CompactModel,
        method: MergingMethod,
        removed: dict[int, int],
        options: MergingOptions,
    ) -> None:
        super().__init__()
        self.model, self.method, self.options = model, method, options
        architecture = model.architecture
        counts = architecture.step_tokens()
        current, found = architecture.tokens, []
        for step, count in enumerate(counts):
            # After the last attention of a network with `last_queries` no patch is left.
            most = most_removable(current, architecture.prefix) if current <= count else 0
            found.append(min(removed.get(step, 0), most))
            current = min(current, count) - found[-1]
        self.removed = tuple(found)

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The number of tokens that the stream carries after each step, prefix tokens included."""
        architecture = self.model.architecture
        current, found = architecture.tokens, []
        for count, removed in zip(architecture.step_tokens(), self.removed, strict=True):
            current = min(current, count) - removed
            found.append(current)
        return tuple(found)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image, with the products of the matching and of the merge."""
        architecture = self.model.architecture
        dense = sum(
            branch_macs(branch, architecture.embed, tokens, queries)
            for branch, tokens, queries in branch_tokens(architecture)
        )
        return (
            count_macs(architecture) - dense + sum(map(self._step_macs, range(len(self.removed))))
        )

    def _step_macs(self, number: int) -> int:
        architecture, removed = self.model.architecture, self.removed[number]
        branch = architecture.steps[number][0]
        before = (architecture.tokens, *self.token_counts)[number]
        total = branch_macs(
            branch, architecture.embed, before, min(before, architecture.step_tokens()[number])
        )
        if removed:
            core, odd = cast("AttentionSpec", branch.core), before // 2
            total += (before - odd) * (odd - architecture.prefix // 2) * core.qk
            total += (before - removed) * before * architecture.embed
            if self.method == "ppt":
                total += core.heads * before * core.qk
        return total

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        return self.classify(*self.features(images))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the stream after the last step, (batch, tokens, embed), and the tokens' sizes.

        Sizes are (batch, tokens); None while every token is an original one.
        """
        *_, (x, sizes, _) = self.trace(images)
        return x, sizes

    def trace(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Run the network and yield stream, sizes and places after the stem and after each step.

        Places are those of the incoming tokens in the shorter stream, (batch, tokens); None where
        no token was removed.
        """
        model = self.model
        x, sizes = model.embed(images), cast("Tensor | None", None)
        yield x, sizes, None
        counts = model.architecture.step_tokens()
        for number, (step, count) in enumerate(zip(model.steps, counts, strict=True)):
            branch, places = cast("Sequence[Branch]", step)[0], None
            if not isinstance(branch.core, Attention):
                x = model.run_step([branch], x, count)
            else:
                queries = count if count < x.shape[1] else None
                attended = _attended(
                    branch, x, sizes if self.options.proportional else None, queries
                )
                x = branch.add(x if queries is None else x[:, :queries], attended.y)
                if queries is not None:
                    sizes = None if sizes is None else sizes[:, :queries]
                elif removed := self.removed[number]:
                    sizes = x.new_ones(x.shape[:2]) if sizes is None else sizes
                    places = self._places(branch.core, attended, sizes, removed)
                    kept = x.shape[1] - removed
                    x = merge_matrix(places, sizes, kept) @ x
                    sizes = merged_sizes(places, sizes, kept)
            yield x, sizes, places

    @property
    def _threshold(self) -> float:
        given = self.options.threshold
        return 7e-5 * (196 / self.model.architecture.patches) ** 2 if given is None else given

    def _places(self, core: Attention, attended: _Attended, sizes: Tensor, removed: int) -> Tensor:
        """The place of each token in the shorter stream, (batch, tokens)."""
        prefix = self.model.architecture.prefix
        merging = merge_places(attended.k.mean(dim=1), removed, prefix)
        if self.method == "tome":
            return merging
        with torch.no_grad():
            scores = _class_scores(core, attended, sizes if self.options.proportional else None)
        # The class token stays, whatever its attention.
        whole = F.pad(scores, (1, 0), value=2.0)
        merges = scores.var(dim=-1, keepdim=True) < self._threshold
        return torch.where(merges, merging, prune_places(whole))

    def classify(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Pool and classify the stream after the last step.

        Args:
            x: (batch, tokens, embed).
            sizes: The number of original tokens in each, (batch, tokens). None: 1.

        Returns:
            (batch, classes), or features without a classifier.
        """
        model, kind = self.model, self.model.architecture.pool.kind
        if sizes is None or not _WEIGHTED[kind]:
            return model.classify(x)
        # The pool takes a plain mean; factors of mean 1 make it the weighted one.
        prefix = 0 if kind == "mean_all" else model.architecture.prefix
        pooled = sizes[:, prefix:]
        factors = F.pad(pooled / pooled.mean(dim=1, keepdim=True), (prefix, 0), value=1.0)
        return model.logits(model.normed(x) * factors[:, :, None])

    def extra_repr(self) -> str:
        """The method and the number of tokens after each step."""
        return f"method={self.method}, tokens={self.token_counts}"


def _attended(branch: Branch, x: Tensor, sizes: Tensor | None, queries: int | None) -> _Attended:
    """Run an attention sub-layer with keys that count as often as they have merged."""
    core = cast("Attention", branch.core)
    if branch.reads is not None:
        x = x.index_select(-1, branch.reads)
    if branch.norm is not None:
        x = branch.norm(x)
    computed = x if queries is None else x[:, :queries]
    (q, k), v = core.queries_and_keys(computed, x), core.values(x)
    if sizes is None:
        y = core.attend(q, k, v)
    else:
        bias = sizes.log()[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=core.spec.scale)
    y = y.transpose(1, 2).flatten(2)
    if core.out_norm is not None:
        y = core.out_norm(y)
    if core.gate is not None:
        y = y * core.gate(computed).sigmoid()
    y = core.out(y)
    if branch.post_norm is not None:
        y = branch.post_norm(y)
    return _Attended(y if branch.layer_scale is None else y * branch.layer_scale, q, k, v)


def _class_scores(core: Attention, attended: _Attended, sizes: Tensor | None) -> Tensor:
    """Attention of the class token times the norm of the value, with the sum 1 over other tokens.

    Fayyaz et al. 2022, "Adaptive Token Sampling for Efficient Vision Transformers", eq. 3.

    Returns:
        (batch, tokens - 1).
    """
    scores = (attended.q[:, :, :1] * core.spec.scale) @ attended.k.transpose(-2, -1)
    if sizes is not None:
        scores = scores + sizes.log()[:, None, None, :]
    received = scores.softmax(dim=-1).sum(dim=(1, 2))
    norms = attended.v.square().sum(dim=(1, 3)).sqrt()
    found = (received * norms)[:, 1:]
    return found / found.sum(dim=-1, keepdim=True)


def _require_mergeable(architecture: Architecture, method: str) -> None:
    """Raise UnsupportedModel if a part of the network has no rule with merged tokens."""
    if architecture.drops_tokens or architecture.selects:
        raise UnsupportedModel(
            f"model: a token mask or a selection already drops patches, so {method} cannot run it; "
            "give the network before that"
        )
    reasons = [
        *(
            (step[0].name, "parallel sub-layers leave no place between attention and FFN")
            for step in architecture.steps
            if len(step) > 1
        ),
        *((branch.name, reason) for branch in architecture.branches for reason in _reasons(branch)),
    ]
    pool = architecture.pool
    if pool.kind not in _WEIGHTED or pool.refine is not None:
        kind = "refinement" if pool.refine is not None else f"'{pool.kind}'"
        reasons.append(("pool", f"{kind} has no form for merged tokens"))
    if method == "ppt" and (architecture.prefix != 1 or pool.kind not in ("token", "token_mean")):
        reasons.append(
            (
                "model",
                f"ppt scores tokens by the attention of the class token and protects no other one; "
                f"this network has {architecture.prefix} prefix tokens and pools by '{pool.kind}'",
            )
        )
    if reasons:
        path, reason = reasons[0]
        raise UnsupportedModel(
            f"{path}: {reason}, so {method} cannot run it; use vitrim.choose_tokens"
        )


def _reasons(branch: BranchSpec) -> Iterator[str]:
    core = branch.core
    if not isinstance(core, AttentionSpec):
        return
    if core.rope is not None:
        yield "a merged token has no single position for the rotary embedding"
    if core.bias is not None:
        yield "a merged token has no single place in the relative position bias"
    if core.differential is not None:
        yield "differential attention has no rule for the sizes of merged tokens"
