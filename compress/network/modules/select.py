"""The selection of tokens by content: score the patches of each image, keep the first ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..architecture import PredictorSpec, SelectSpec
from .layers import ACTIVATIONS, Norm

if TYPE_CHECKING:
    from .branch import Branch


@dataclass
class Choices:
    """The patches that selections choose in a forward pass, or those that they are given.

    Attributes:
        found: Is filled with one tensor (batch, kept) for each selection, in order: increasing
            places among the tokens behind the prefix that the stream carries there.
        given: Tensors of that form to use instead of scores.
        scores: A list is filled with the scores (batch, patches) of each selection, also where its
            choice is given.
    """

    found: list[Tensor] = field(default_factory=list)
    given: Sequence[Tensor] = ()
    scores: list[Tensor] | None = None


class Scored(NamedTuple):
    """A sub-layer whose attention scores patches, and what it read.

    Attributes:
        branch: The sub-layer.
        x: The stream before it, (batch, tokens, embed).
        positions: Which tokens of the stem these are, (batch, tokens). None: the first ones.
    """

    branch: Branch
    x: Tensor
    positions: Tensor | None = None


class Predictor(nn.Module):
    """One score per patch, from the patch and the mean of all patches: (B, patches, C) -> (B, P).

    References:
        Rao et al. 2021, "DynamicViT", eq. 1 to 4.
    """

    def __init__(self, spec: PredictorSpec, width_in: int) -> None:
        super().__init__()
        self.spec = spec
        widths = (*spec.hidden, 1)
        self.fc = nn.Linear(width_in, spec.local + spec.pooled)
        # One layer on both parts; the product of the pooled part is equal for all patches.
        self.local = nn.Linear(spec.local, widths[0])
        self.pooled = nn.Linear(spec.pooled, widths[0], bias=False) if spec.pooled else None
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Score the patches; means run over those that `keep` (patches,) or (B, patches) keeps."""
        act = ACTIVATIONS[self.spec.act]
        units = act(self.fc(x))
        y = self.local(units[..., : self.spec.local])
        if self.pooled is not None:
            shared = units[..., self.spec.local :]
            y = y + self.pooled(_mean_of(shared, keep))
        for layer in self.rest:
            y = layer(act(y))
        scores: Tensor = y.squeeze(-1)
        return scores


class Select(nn.Module):
    """A selection: (batch, tokens, embed) -> (batch, prefix + kept, embed), and its positions."""

    reads: Tensor | None
    # Factors of a network that computes with a mask: of tokens, of heads and of value columns of
    # the scoring attention.
    token_keep: Tensor | None
    head_keep: Tensor | None
    value_keep: Tensor | None
    places: Tensor | None

    def __init__(self, spec: SelectSpec, embed: int, prefix: int, patches: int) -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        reads = None if spec.reads is None else torch.tensor(spec.reads, device="cpu")
        self.register_buffer("reads", reads, persistent=False)
        for name in ("token_keep", "head_keep", "value_keep"):
            self.register_buffer(name, None, persistent=False)
        self.norm = Norm(spec.norm) if spec.norm else None
        width_in = embed if spec.reads is None else len(spec.reads)
        self.predictor = Predictor(spec.predictor, width_in) if spec.predictor else None
        order = None
        if spec.scorer == "random":
            generator = torch.Generator(device="cpu").manual_seed(spec.seed)
            with torch.device("cpu"):
                order = torch.rand(patches, generator=generator)
        self.register_buffer("places", order, persistent=False)

    def forward(
        self,
        x: Tensor,
        scored: Scored | None = None,
        choices: Choices | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Drop the patches that are not chosen.

        Args:
            x: The stream, (batch, tokens, embed).
            scored: The sub-layer whose attention scores patches.
            choices: Records or prescribes the choice.
            positions: Which tokens of the stem these are, (batch, tokens). None: the first ones.

        Returns:
            (batch, prefix + kept, embed), and one token more if dropped ones are fused; and the
            positions of these tokens, None if a fused one has none.
        """
        given = choices is not None and len(choices.given) > len(choices.found)
        recorded = choices.scores if choices is not None else None
        needed = self.spec.fused or not given or recorded is not None
        scores = self.scores(x, scored) if needed else None
        if recorded is not None and scores is not None:
            recorded.append(scores)
        if choices is not None and given:
            kept = choices.given[len(choices.found)].to(x.device)
        else:
            assert scores is not None
            kept = first_places(self.masked(scores), self.spec.patches)
        if choices is not None:
            choices.found.append(kept)
        y, positions = self.gathered(x, kept, positions)
        if not self.spec.fused:
            return y, positions
        assert scores is not None
        if self.token_keep is not None:
            # A token mask that drops a token in the scoring step leaves it as a key there.
            scores = scores * self.token_keep[self.prefix :]
        return torch.cat([y, self._fused(x, y, scores, kept)], dim=1), None

    def gathered(
        self, x: Tensor, kept: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The prefix tokens and the patches at the places `kept` (batch, kept) of each image.

        Returns:
            (batch, prefix + kept, embed), and the positions of these tokens.
        """
        rows = kept + self.prefix
        if self.prefix:
            pinned = torch.arange(self.prefix, device=x.device).expand(x.shape[0], -1)
            rows = torch.cat([pinned, rows], dim=1)
        if positions is None:
            return rows_of(x, rows), rows
        return rows_of(x, rows), rows_of(positions.unsqueeze(-1), rows).squeeze(-1)

    def scores(self, x: Tensor, scored: Scored | None, keep: Tensor | None = None) -> Tensor:
        """The scores of the patches, larger for those to keep: (batch, patches).

        Args:
            x: The stream, (batch, tokens, embed).
            scored: The scoring sub-layer.
            keep: Factors (batch, tokens), 0 for tokens that have been dropped without leaving.
        """
        keep = self.token_keep if keep is None else keep
        if self.predictor is not None:
            x = x[:, self.prefix :]
            x = x if self.reads is None else x.index_select(-1, self.reads)
            x = x if self.norm is None else self.norm(x)
            found: Tensor = self.predictor(x, None if keep is None else keep[..., self.prefix :])
            return found
        if self.places is not None:
            return self.places.to(x).expand(x.shape[0], -1)
        assert scored is not None, "the walker passes the scoring attention"
        each = scored.branch.attention_scores(
            scored.x,
            self.spec.scorer,
            rows=keep,
            columns=self.value_keep,
            positions=scored.positions,
        )
        # Mean over the heads that are kept: (batch, heads, tokens before) -> (batch, patches).
        each = each[..., self.prefix : x.shape[1]]
        if self.head_keep is None:
            return each.mean(dim=1)
        heads = self.head_keep
        return (each * heads[:, None]).sum(dim=1) / heads.sum()

    def masked(self, scores: Tensor, keep: Tensor | None = None) -> Tensor:
        """The scores, and -inf for patches that a token mask has dropped."""
        keep = self.token_keep if keep is None else keep
        if keep is None:
            return scores
        return scores.masked_fill(keep[..., self.prefix :] == 0, -torch.inf)

    def _fused(self, x: Tensor, kept_rows: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        """The sum of the dropped patches, each times its class attention: (batch, 1, embed)."""
        whole = weights.unsqueeze(1) @ x[:, self.prefix :]
        chosen = rows_of(weights.unsqueeze(-1), kept).transpose(1, 2)
        return whole - chosen @ kept_rows[:, self.prefix :]


def first_places(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores, increasing; of equal ones the first.

    (batch, patches) -> (batch, count).
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        # ONNX's TopK takes the first of equal scores, and sorts no more than it returns.
        return scores.topk(count, dim=-1).indices.topk(count, dim=-1, largest=False).values
    # Not topk, which orders equal scores arbitrarily.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=-1).values


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of each image: x (batch, tokens, width), rows (batch, kept)."""
    # One gather of whole rows. torch.gather exports to GatherElements, which is 10 times slower
    # (onnxruntime#11195).
    batch, tokens = x.shape[:2]
    if batch > 1:
        rows = rows + torch.arange(batch, device=x.device).unsqueeze(1) * tokens
    kept = x.flatten(0, 1).index_select(0, rows.flatten())
    return kept.view(batch, -1, x.shape[-1])


def _mean_of(x: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the patches: (batch, patches, width) -> (batch, 1, width)."""
    if keep is None:
        return x.mean(dim=1, keepdim=True)
    factors = keep.unsqueeze(-1)
    return (x * factors).sum(dim=1, keepdim=True) / factors.sum(dim=-2, keepdim=True)
