"""Assembles a network from its converted parts; common to all source libraries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, BranchSpec, HeadSpec, PoolSpec, StemSpec
from .parts import absent, linear, norm, not_none, prefixed
from .registry import Piece, TokenLayout, find_converter

Steps = tuple[tuple[BranchSpec, ...], ...]
Blocks = tuple[Steps, dict[str, Tensor], tuple[str, ...]]


def assemble(
    *,
    image: tuple[int, int, int],
    stem: Piece[StemSpec],
    blocks: Blocks,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    position_resize: str | None = "bicubic",
    norms: dict[str, tuple[nn.Module | None, str]] | None = None,
    pool: Piece[PoolSpec] | None = None,
    head: Piece[HeadSpec] | None = None,
) -> Piece[Architecture]:
    """Assemble a network.

    Args:
        image: Channels, height and width of the input, in pixels.
        stem: Patch embedding.
        blocks: Steps, tensors and paths, from `lift_blocks`.
        prefix: Prefix tokens, (tokens, embed). None: there are none.
        position: Positions that are added to the patches, (patches, embed). None: there are none.
        position_resize: How the model resamples positions for another image size. None: from a
            table that `position` does not contain.
        norms: patch_norm, stem_norm, norm and pool_norm as (module, path). Missing ones: no norm.
        pool: Pooling. None: the class token.
        head: Classifier. None: the network returns features.

    Returns:
        The architecture, and the tensors of all parts under their names in `CompactModel`.
    """
    steps, tensors, names = blocks
    pool = pool or Piece(PoolSpec())
    tensors = tensors | dict(stem.tensors) | dict(pool.tensors)
    tensors |= not_none({"prefix": prefix, "position": position})
    specs: dict[str, Any] = {}
    for name, (module, path) in (norms or {}).items():
        piece = norm(module, path)
        if piece is not None:
            specs[name] = piece.spec
            tensors |= piece.prefixed(name)
    if head is not None:
        tensors |= dict(head.tensors)
    architecture = Architecture(
        image=image,
        embed=stem.tensors["stem.weight"].shape[0],
        stem=stem.spec,
        prefix=0 if prefix is None else prefix.shape[0],
        position=position is not None,
        position_resize=position_resize,
        steps=steps,
        blocks=names,
        pool=pool.spec,
        head=head and head.spec,
        **specs,
    )
    return Piece(architecture, tensors)


def lift_blocks(modules: Any, path: str, layouts: list[TokenLayout]) -> Blocks:
    """Convert all blocks to steps, with tensors and paths; `layouts` has one entry per block."""
    steps: list[tuple[BranchSpec, ...]] = []
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    # Not `named_children`, which skips the second use of a block.
    for (name, module), layout in zip(modules._modules.items(), layouts, strict=True):
        where = f"{path}.{name}"
        names.append(where)
        for step in find_converter("block", module, where)(module, where, layout):
            for position, piece in enumerate(step):
                tensors |= piece.prefixed(f"steps.{len(steps)}.{position}")
            steps.append(tuple(piece.spec for piece in step))
    return tuple(steps), tensors, tuple(names)


def classifier(
    module: nn.Module | None, path: str, second: tuple[nn.Module, str] | None = None
) -> Piece[HeadSpec] | None:
    """Convert a Linear classifier, and a second parallel one if given.

    Returns None for a model that returns features.
    """
    if module is None or absent(module):
        return None
    tensors = prefixed("head", linear(module, path))
    if second is not None:
        tensors |= prefixed("head_dist", linear(*second))
        if tensors["head.weight"].shape != tensors["head_dist.weight"].shape or (
            "head.bias" in tensors
        ) != ("head_dist.bias" in tensors):
            raise UnsupportedModel(
                f"{second[1]}: two classifiers that differ in shape have no rule"
            )
    return Piece(
        HeadSpec(classes=tensors["head.weight"].shape[0], bias="head.bias" in tensors), tensors
    )
