"""Measurements of single blocks: how alike patches become, and what one pruned block costs.

The functions return plain data for tables and plots. They repeat Figures 3, 6 and 7 of Tang et al.
2022, "Patch Slimming for Efficient Vision Transformers".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..masks.groups import token_sites
from ..network.architecture import Architecture
from ..network.modules.model import CompactModel
from .attention_scores import top_tokens
from .choose import METHODS, WITHOUT_IMAGES, Method, scores_without_images, whole_scores
from .streaming import Progress, batches, run_step, silent, working_copy


@dataclass(frozen=True)
class BlockRow:
    """The accuracy of a network of which one block computes only some patches.

    Attributes:
        block: The path of the block.
        method: How its patches were chosen.
        share: The share of the patches that it computes.
        tokens: Their number, prefix tokens included.
        accuracy: Share of the images with the right class; without labels, with the class of the
            whole network.
    """

    block: str
    method: str
    share: float
    tokens: int
    accuracy: float


def patch_similarity(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The mean cosine similarity of two patches of an image, by depth (Figure 3).

    Args:
        model: A supported Vision Transformer, or a `CompactModel`.
        images: (images, channels, height, width), normalized as the model expects.

    Returns:
        "stem" and the path of each block -> the similarity of the stream after it, between -1 and
        1; nan with a single patch.

    Raises:
        InputError: The images do not fit.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    network = working_copy(model)
    architecture = network.architecture
    ends = {"stem": 0, **dict(zip(architecture.block_names, architecture.block_ends, strict=True))}
    totals = dict.fromkeys(ends, 0.0)
    with torch.no_grad():
        for part in batches(network, images):
            x, done = network.embed(part), 0
            for name, end in ends.items():
                for number in range(done, end):
                    x = run_step(network, number, x)
                done = end
                totals[name] += float(_similarity(x[:, architecture.prefix :]).sum())
    return {name: total / len(images) for name, total in totals.items()}


def _similarity(patches: Tensor) -> Tensor:
    """The mean over pairs of different patches, (batch,)."""
    directions = nn.functional.normalize(patches.double(), dim=-1)
    count = directions.shape[1]
    # The sum over all pairs is the squared length of the sum; each patch is 1 to itself.
    pairs = directions.sum(dim=1).square().sum(dim=-1) - directions.square().sum(dim=(1, 2))
    return pairs / (count * (count - 1)) if count > 1 else pairs * torch.nan


def single_block_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    scoring: Tensor | None = None,
    blocks: Sequence[str] | None = None,
    methods: Sequence[Method] = ("patch-slimming",),
    shares: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.1),
    seed: int = 0,
    progress: Progress = silent,
) -> list[BlockRow]:
    """The accuracy when one block alone computes only some patches (Figures 6 and 7).

    The other patches pass the block unchanged, and return after it; inside it they are still keys.
    With one method and all blocks this is Figure 6, with one block and several methods Figure 7.

    Args:
        model: A supported Vision Transformer with a head, or a `CompactModel`.
        images: Images to classify, (images, channels, height, width), normalized.
        labels: Their classes, (images,). None: the classes that the whole network predicts.
        scoring: Images from which patches are scored. None: `images`.
        blocks: Paths of blocks. None: all with an attention.
        methods: As for `choose_tokens`.
        shares: Shares of the patches that the block computes, at least one patch each.
        seed: For "random".
        progress: Called with a stage ("score", "gates", "evaluate"), the steps done, and the steps
            in all.

    Returns:
        A row for each block, method and share, in this order.

    Raises:
        InputError: A block or method does not exist, or the model has no head.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    network = working_copy(model)
    architecture = network.architecture
    if network.head is None:
        raise InputError("accuracy: the model has no head; give one with a classifier")
    firsts = attention_blocks(architecture)
    names = list(firsts) if blocks is None else list(blocks)
    for name in names:
        if name not in firsts:
            raise InputError(f"block {name!r}: choose one of {', '.join(firsts)}")
    for method in methods:
        if method not in METHODS:
            raise InputError(f"tokens = {method!r}: choose one of {', '.join(METHODS)}")
    parts = batches(network, images)
    with torch.no_grad():
        wanted = torch.cat([network(x).argmax(dim=-1) for x in parts]) if labels is None else labels
    scored = images if scoring is None else scoring
    scores = {method: _scores(network, method, scored, seed, progress) for method in methods}
    rows: list[BlockRow] = []
    total = len(names) * len(methods) * len(shares)
    sizes = list(token_sites(architecture).values())
    for name in names:
        step = firsts[name]
        size, prefix = sizes[step + 1], architecture.prefix
        whole = torch.ones(size, dtype=torch.bool)
        for method in methods:
            for share in shares:
                count = prefix + max(1, round(share * (size - prefix)))
                keep = top_tokens(architecture, scores[method][step][:size], whole, count)
                found = torch.cat([_classes(network, x, name, keep) for x in parts])
                accuracy = float((found == wanted).double().mean())
                rows.append(BlockRow(name, method, share, count, accuracy))
                progress("evaluate", len(rows), total)
    return rows


def attention_blocks(architecture: Architecture) -> dict[str, int]:
    """The path of each block with an attention, and the number of its first such step."""
    found, start = dict[str, int](), 0
    mixing = architecture.attention_steps()
    for name, end in zip(architecture.block_names, architecture.block_ends, strict=True):
        inside = [number for number in mixing if start <= number < end]
        if inside:
            found[name] = inside[0]
        start = end
    return found


def _scores(
    model: CompactModel, method: Method, images: Tensor, seed: int, progress: Progress
) -> dict[int, Tensor]:
    if method in WITHOUT_IMAGES:
        return scores_without_images(model.architecture, method, seed)
    return whole_scores(model, method, images, progress)


def _classes(model: CompactModel, images: Tensor, block: str, keep: Tensor) -> Tensor:
    """The predicted classes where a block computes the tokens of `keep` only, (batch,)."""
    architecture, start = model.architecture, 0
    with torch.no_grad():
        x = model.embed(images)
        for name, end in zip(architecture.block_names, architecture.block_ends, strict=True):
            before = x
            for number in range(start, end):
                x = run_step(model, number, x)
            if name == block:
                count = x.shape[1]
                x = torch.where(keep[:count, None], x, before[:, :count])
            start = end
        return model.classify(x).argmax(dim=-1)
