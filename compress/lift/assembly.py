"""A whole network from its lifted parts, in any source library."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, BranchSpec, HeadSpec, PoolSpec, StemSpec
from .parts import absent, linear, norm, present, under
from .positions import Places
from .registry import Piece, find

Steps = tuple[tuple[BranchSpec, ...], ...]


def assemble(
    *,
    image: tuple[int, int, int],
    stem: Piece[StemSpec],
    blocks: tuple[Steps, dict[str, Tensor]],
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    position_resize: str | None = "bicubic",
    norms: dict[str, tuple[nn.Module | None, str]] | None = None,
    pool: Piece[PoolSpec] | None = None,
    head: Piece[HeadSpec] | None = None,
) -> Piece[Architecture]:
    """`norms`: patch_norm, stem_norm, norm and pool_norm as (module, path). `prefix` (tokens,
    embed), `position` (patches, embed).
    """
    steps, tensors = blocks
    pool = pool or Piece(PoolSpec())
    tensors = (
        tensors
        | dict(stem.tensors)
        | dict(pool.tensors)
        | present({"prefix": prefix, "position": position})
    )
    specs: dict[str, Any] = {}
    for name, (module, path) in (norms or {}).items():
        piece = norm(module, path)
        if piece is not None:
            specs[name] = piece.spec
            tensors |= piece.under(name)
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
        pool=pool.spec,
        head=head and head.spec,
        **specs,
    )
    return Piece(architecture, tensors)


def lift_blocks(modules: Any, path: str, places: list[Places]) -> tuple[Steps, dict[str, Tensor]]:
    """All blocks as steps, and their tensors. `places`: one a block."""
    steps: list[tuple[BranchSpec, ...]] = []
    tensors: dict[str, Tensor] = {}
    for (name, module), at in zip(modules.named_children(), places, strict=True):
        where = f"{path}.{name}"
        for step in find("block", module, where)(module, where, at):
            for position, piece in enumerate(step):
                tensors |= piece.under(f"steps.{len(steps)}.{position}")
            steps.append(tuple(piece.spec for piece in step))
    return tuple(steps), tensors


def classifier(
    module: nn.Module | None, path: str, second: tuple[nn.Module, str] | None = None
) -> Piece[HeadSpec] | None:
    """A Linear classifier (and a second one beside it), or None for a model that answers with
    features.
    """
    if module is None or absent(module):
        return None
    tensors = under("head", linear(module, path))
    if second is not None:
        tensors |= under("head_dist", linear(*second))
        if tensors["head.weight"].shape != tensors["head_dist.weight"].shape or (
            "head.bias" in tensors
        ) != ("head_dist.bias" in tensors):
            raise UnsupportedModel(
                f"{second[1]}: two classifiers that differ in shape have no rule"
            )
    return Piece(
        HeadSpec(classes=tensors["head.weight"].shape[0], bias="head.bias" in tensors), tensors
    )
