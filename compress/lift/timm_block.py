"""timm's transformer blocks: each becomes steps of branches."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..architecture import BranchSpec
from .parts import layer_scale, norm
from .registry import Piece, find, handles

# A block is a list of steps, a step a list of branches.
Steps = list[list[Piece[BranchSpec]]]


@handles("block", "timm.models.vision_transformer.Block")
def block(module: Any, path: str) -> Steps:
    """Pre-norm: x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))."""
    return [
        [branch(f"{path}.attn", module.norm1, ("attention", module.attn), layer_scale(module.ls1, f"{path}.ls1"), f"{path}.norm1")],
        [branch(f"{path}.ffn", module.norm2, ("ffn", module.mlp), layer_scale(module.ls2, f"{path}.ls2"), f"{path}.norm2")],
    ]


def branch(
    name: str,
    before: nn.Module | None,
    core: tuple[str, nn.Module],
    gamma: Any = None,
    norm_path: str = "",
    after: nn.Module | None = None,
) -> Piece[BranchSpec]:
    """One sub-layer with the norm before or after it. `core`: its kind (attention or ffn) and module."""
    kind, module = core
    lifted: Piece[Any] = find(kind, module, name)(module, name)
    pre, post = norm(before, norm_path or f"{name}.norm"), norm(after, f"{name}.post_norm")
    tensors = lifted.under("core")
    if pre is not None:
        tensors |= pre.under("norm")
    if post is not None:
        tensors |= post.under("post_norm")
    if gamma is not None:
        tensors["layer_scale"] = gamma
    spec = BranchSpec(name=name, core=lifted.spec, norm=pre and pre.spec, post_norm=post and post.spec, layer_scale=gamma is not None)
    return Piece(spec, tensors)
