"""Predicted beside measured: the features of the compact network, and each of its sub-layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ..network.architecture import Architecture
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from ..network.token_order import grid_places
from .compensation import following_constants
from .sensitivity import features, patch_features
from .stream import Stream, has_output_projection
from .stream_rotation import Readback

Widths = Mapping[str, int]


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Check:
    """How near the compact network comes to the dense one, on images held out from the fit.

    Attributes:
        images: Their number.
        cosine: Mean cosine similarity of the pooled features.
        patch_cosine: Mean cosine similarity of the normalized patch tokens; None where all patches
            leave before the end.
        agreement: Share of images with the same top-1 class; None without a head.
        error: Squared error of the pooled features, as a share of their variance over the images:
            what `predicted_error` predicts. None for a single image.
    """

    images: int
    cosine: float
    patch_cosine: float | None
    agreement: float | None
    error: float | None = None


@dataclass(frozen=True)
class Row:
    """One sub-layer of a cut.

    Attributes:
        name: The sub-layer.
        before: Its widths in the dense network, by dimension.
        after: Its widths after the cut.
        predicted: Its predicted share of the error of the features.
        measured: The same, measured on held-out images: the error of the compensated sub-layer on
            the dense stream, times the sensitivity of its depth. A refit also repairs errors of
            earlier sub-layers, which counts as an error here. None for a removed sub-layer, whose
            error is part of the one before it.
        cost_share: Its cost after the cut, as a share of its dense cost.
    """

    name: str
    before: Widths
    after: Widths
    predicted: float
    measured: float | None
    cost_share: float


@dataclass(frozen=True)
class Comparison:
    """The two networks that `measured_errors` compares.

    Attributes:
        dense: The dense network in the basis of the cut.
        compact: The compensated network.
        channels: The channels of the dense stream that the compact one has; None for all.
        depths: For each compact step, the number of dense steps whose output it reproduces.
        weights: The sensitivity of the stream after each dense step, by sub-layer name.
    """

    dense: CompactModel
    compact: CompactModel
    channels: Tensor | None
    depths: Sequence[int]
    weights: Mapping[str, float] = field(default_factory=dict)


def measured_errors(compared: Comparison, images: Tensor) -> dict[str, float]:
    """The error of each compact sub-layer on the dense stream, as a share of the features.

    Args:
        compared: The networks.
        images: Held-out images, (images, channels, height, width).

    Returns:
        {sub-layer: error}, without those that were removed.
    """
    stream = Stream(compared.dense, images)
    place = {
        branch.name: number
        for number, step in enumerate(compared.dense.architecture.steps)
        for branch in step
    }
    found: dict[str, float] = {}
    steps = cast("Sequence[Sequence[Branch]]", compared.compact.steps)
    for number, (end, step) in enumerate(zip(compared.depths, steps, strict=True)):
        if all(branch.spec.core.kind == "constant" for branch in step):
            continue
        constants = following_constants(compared.compact, number)
        while stream.position < place[step[0].spec.name]:
            stream.advance()
        before = [_selected(x, compared.channels) for x in stream.batches]
        last = stream.step[-1].spec.name
        while stream.position < end:
            last = stream.step[-1].spec.name
            stream.advance()
        total, rows = 0.0, 0
        for x, wanted in zip(before, stream.batches, strict=True):
            count = wanted.shape[1]
            y = x[:, :count] + constants
            with torch.no_grad():
                for branch in step:
                    y = branch.add(y, branch(x, count if count < x.shape[1] else None))
            change = _selected(wanted, compared.channels) - y
            total += float(change.double().square().sum())
            rows += change.shape[0] * change.shape[1]
        # Parallel sub-layers of one step share their error.
        named = [branch.spec.name for branch in step if has_output_projection(branch)]
        for name in named:
            found[name] = compared.weights.get(last, 0.0) * total / rows / len(named)
    return found


def _selected(x: Tensor, channels: Tensor | None) -> Tensor:
    return x if channels is None else x.index_select(-1, channels)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, for a terminal."""
    cells = [("sub-layer", "widths", "predicted", "measured", "cost")]
    for row in rows:
        widths = "  ".join(
            f"{name} {size}"
            if row.after.get(name, size) == size
            else f"{name} {row.after[name]}/{size}"
            for name, size in row.before.items()
        )
        measured = "absorbed" if row.measured is None else f"{row.measured:.2e}"
        cells.append(
            (row.name, widths, f"{row.predicted:.2e}", measured, f"{100 * row.cost_share:.0f} %")
        )
    sizes = [max(len(each[column]) for each in cells) for column in range(len(cells[0]))]
    lines = []
    for each in cells:
        left = [text.ljust(size) for text, size in zip(each[:2], sizes[:2], strict=True)]
        right = [text.rjust(size) for text, size in zip(each[2:], sizes[2:], strict=True)]
        lines.append("  ".join(left + right))
    return "\n".join(lines)


def compare_features(
    dense: CompactModel,
    compact: CompactModel,
    images: Tensor,
    *,
    readback: Readback = _same,
    readback_patches: Readback = _same,
) -> Check:
    """Compare the features of two networks on images that were not used to fit them.

    Args:
        dense: The reference.
        compact: The network to check, with features of the same width.
        images: (images, channels, height, width), normalized as the networks expect.
        readback: Maps the compact network's pooled features to those of the dense one, where its
            stream is in another basis.
        readback_patches: The same for patch tokens.

    Returns:
        Cosine similarities, the error and, with a head, the agreement of the top-1 classes.
    """
    cosines, same = 0.0, 0
    # None where no patch is left, or none that both have.
    patches: list[float | None] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    kept = kept_patches(dense.architecture, compact.architecture)
    with torch.no_grad():
        for part in images.split(16):
            wanted, found = last_stream(dense, part), last_stream(compact, part)
            pairs.append((features(dense, wanted), readback(features(compact, found))))
            cosines += _cosines(*pairs[-1]) or 0.0
            rows = patch_features(dense, wanted)
            if kept is not None:
                rows = rows.index_select(1, kept)
            patches.append(_cosines(rows, readback_patches(patch_features(compact, found))))
            if dense.head is not None:
                classes = dense.classify(wanted).argmax(dim=-1)
                same += int((classes == compact.classify(found).argmax(dim=-1)).sum())
    total = len(images)
    agreement = None if dense.head is None else same / total
    known = [each for each in patches if each is not None]
    patch_cosine = sum(known) / total if len(known) == len(patches) else None
    return Check(total, cosines / total, patch_cosine, agreement, _feature_error(pairs))


def kept_patches(dense: Architecture, compact: Architecture) -> Tensor | None:
    """The places among the dense patches of those that a network carries to its end; None: all."""
    if not compact.drops_tokens or dense.drops_tokens:
        return None
    count = compact.step_tokens(last_queries=False)[-1] if compact.steps else compact.tokens
    return torch.tensor(grid_places(compact, count), dtype=torch.long)


def _feature_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Mean squared error over the variance, averaged over channels as `predicted_error` is."""
    wanted, found = (torch.cat(each).double() for each in zip(*pairs, strict=True))
    if len(wanted) < 2 or wanted.shape != found.shape:
        return None
    wanted, found = wanted.flatten(1), found.flatten(1)
    variance = wanted.var(dim=0)
    variance = variance.clamp(min=1e-6 * float(variance.mean()) + 1e-24)
    return float(((wanted - found).square().mean(dim=0) / variance).mean())


def last_stream(model: CompactModel, images: Tensor) -> Tensor:
    """The stream of every token after the last step: (batch, tokens, embed)."""
    stream = Stream(model, images, batch=len(images))
    while not stream.finished:
        stream.advance()
    return stream.batches[0]


def _cosines(wanted: Tensor, found: Tensor) -> float | None:
    """The sum over the batch of the mean cosine similarity; None where nothing can be compared."""
    if not wanted.numel() or wanted.shape != found.shape:
        return None
    each = torch.cosine_similarity(wanted, found, dim=-1)
    return float(each.reshape(len(wanted), -1).mean(dim=1).sum())
