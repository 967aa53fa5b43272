"""Losses of networks that choose patches for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.architecture import Architecture

# Impacts are positive; those of a patch that nothing reads are 0.
_LEAST_IMPACT = 1e-30


def ratio_loss(shares: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Mean over selections and images of (kept share - target)².

    Args:
        shares: For each selection the share of the patches that each image keeps, (batch,).
        targets: For each selection the share that it shall keep.

    Returns:
        A scalar.

    References:
        Rao et al. 2021, "DynamicViT", eq. 14.
    """
    each = [(share - target).square().mean() for share, target in zip(shares, targets, strict=True)]
    return torch.stack(each).mean()


def agreement_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, averaged over the batch; a scalar, in nats.

    Both are logits (batch, classes).
    """
    wanted = F.log_softmax(teacher.float(), dim=1)
    found = F.log_softmax(logits.float(), dim=1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def token_loss(tokens: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Mean squared difference of the patches that are kept to the end, over all their numbers.

    Args:
        tokens: Patches behind the last norm, (batch, patches, channels).
        teacher: Those of the teacher, of the same shape.
        keep: Which are kept, (batch, patches), 0 or 1.

    Returns:
        A scalar; 0 if none is kept.

    References:
        Rao et al. 2021, "DynamicViT", eq. 12.
    """
    keep = keep.detach().float()
    squares = (tokens.float() - teacher.float()).square().mean(dim=-1)
    return (squares * keep).sum() / keep.sum().clamp(min=1.0)


def impact_loss(scores: Tensor, impacts: Tensor, present: Tensor) -> Tensor:
    """Mean squared difference of scores and logarithms of impacts, over the patches that are there.

    Only the order of an image's scores decides, so its mean logarithm is subtracted first.

    Args:
        scores: (batch, patches).
        impacts: (batch, patches), not negative.
        present: Booleans (batch, patches), at least one in each row.

    Returns:
        A scalar.

    References:
        Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers", section 3.4.
    """
    there = present.float()
    wanted = impacts.clamp(min=_LEAST_IMPACT).log().float()
    mean = (wanted * there).sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True)
    return ((scores.float() - (wanted - mean)).square() * there).sum() / there.sum()


@dataclass(frozen=True)
class SharedChannels:
    """Which of the teacher's channels the student still has.

    Attributes:
        places: For each channel that the student's head reads, its place in those of the teacher.
            None: they are the same.
    """

    places: tuple[int, ...] | None

    def of(self, tokens: Tensor) -> Tensor:
        """The teacher's tokens, (batch, tokens, channels), in the channels of the student."""
        if self.places is None:
            return tokens
        return tokens.index_select(-1, torch.tensor(self.places, device=tokens.device))


def channel_obstacle(student: Architecture, teacher: Architecture) -> str | None:
    """Why tokens of a student cannot be compared with those of its teacher; None if they can."""
    if student.stream_rotated or teacher.stream_rotated:
        # A network does not record the basis, only that it is another one.
        return "a closed-form cut has turned the residual stream to another basis"
    if student.token_places != teacher.token_places:
        return "the network embeds other patches than its teacher"
    if not set(student.read_places) <= set(teacher.read_places):
        return "the head reads channels that its teacher does not have"
    return None


def shared_channels(student: Architecture, teacher: Architecture) -> SharedChannels | None:
    """The channels in which tokens of a student and of its teacher can be compared.

    Returns:
        None if there are none, see `channel_obstacle`.
    """
    if channel_obstacle(student, teacher) is not None:
        return None
    known = {channel: place for place, channel in enumerate(teacher.read_places)}
    places = tuple(known[channel] for channel in student.read_places)
    return SharedChannels(None if places == tuple(range(len(known))) else places)
