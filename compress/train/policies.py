"""Decisions of selections during training, in which every patch stays in the stream.

Dropped patches get the factor 0: no attention reads them and no pool averages them, so that a kept
token computes what it computes in the network that drops them. The factors have gradients, which
reach the predictors. See `CompactModel.policy`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.modules.select import Scored, Select, first_places


class TrainingPolicy(Protocol):
    """A `Policy` of a network, with what it decided in the present forward pass."""

    def begin(self) -> None:
        """Forget what was decided before; called before each forward pass."""

    def __call__(
        self, select: Select, x: Tensor, scored: Scored | None, keep: Tensor | None
    ) -> Tensor:
        """The factors of the tokens from a selection on: (batch, tokens), 0 or 1."""


class SampledPolicy:
    """Keep patches at random, with the probabilities sigmoid(score): DynamicViT's training.

    The sample is that of a hard Gumbel-softmax over (keep, drop) with the logits (score, 0), times
    the decision before; its gradient is that of the soft sample. Prefix tokens always stay, and of
    each image the patch of the largest score, so that something is left to average.

    Args:
        temperature: Of the soft sample.

    References:
        Rao et al. 2021, "DynamicViT", eq. 5 to 8; Jang et al. 2017, "Categorical Reparameterization
        with Gumbel-Softmax".
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature
        # For each selection the share of the patches in the stream that each image keeps, (batch,),
        # and the share that inference keeps. Patches that left by place count in neither.
        self.shares: list[Tensor] = []
        self.targets: list[float] = []

    def begin(self) -> None:
        """Forget the shares of the forward pass before."""
        self.shares, self.targets = [], []

    def __call__(
        self, select: Select, x: Tensor, scored: Scored | None, keep: Tensor | None
    ) -> Tensor:
        """The factors of the tokens from a selection on: (batch, tokens), 0 or 1."""
        scores = select.scores(x, scored, keep).float()
        pairs = torch.stack([scores, torch.zeros_like(scores)], dim=-1)
        soft = F.gumbel_softmax(pairs, tau=self.temperature)[..., 0]
        # The difference is exactly 0: factors are exactly 0 or 1.
        chosen = (soft >= 0.5).to(soft) + (soft - soft.detach())
        if keep is not None:
            chosen = chosen * keep[:, select.prefix :]
        best = select.masked(scores, keep).argmax(dim=1, keepdim=True)
        empty = chosen.detach().sum(dim=1, keepdim=True) == 0
        only = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True) & empty
        chosen = torch.where(only, torch.ones_like(chosen), chosen)
        self.shares.append(chosen.mean(dim=1))
        self.targets.append(select.spec.patches / chosen.shape[1])
        return _with_prefix(select, chosen)


class BestPolicy:
    """Keep the patches of the largest scores, as inference does.

    The scores have gradients, but none to the stream that they read.
    """

    def __init__(self) -> None:
        # For each selection the scores, and which patches were there, (batch, patches) each.
        self.scores: list[Tensor] = []
        self.present: list[Tensor] = []

    def begin(self) -> None:
        """Forget the scores of the forward pass before."""
        self.scores, self.present = [], []

    def __call__(
        self, select: Select, x: Tensor, scored: Scored | None, keep: Tensor | None
    ) -> Tensor:
        """The factors of the tokens from a selection on: (batch, tokens), 0 or 1."""
        scores = select.scores(x.detach(), scored, keep)
        self.scores.append(scores)
        whole = torch.ones_like(scores, dtype=torch.bool)
        self.present.append(whole if keep is None else keep[:, select.prefix :] > 0)
        kept = first_places(select.masked(scores.detach(), keep), select.spec.patches)
        return _with_prefix(select, torch.zeros_like(scores).scatter(1, kept, 1.0))


def _with_prefix(select: Select, chosen: Tensor) -> Tensor:
    return torch.cat([chosen.new_ones(len(chosen), select.prefix), chosen], dim=1)
