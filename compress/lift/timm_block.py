"""Converters of timm's transformer blocks: each block becomes steps of branches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..network.architecture import BranchSpec
from .parts import layer_scale, norm
from .registry import Piece, TokenLayout, converts, find_converter

# A block is a list of steps, and a step a list of branches.
Steps = list[list[Piece[BranchSpec]]]
# A norm and its path.
Normed = tuple[nn.Module | None, str]


@converts(
    "block",
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer_relpos.RelPosBlock",
)
def block(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))."""
    one, two = layer_scale(module.ls1, f"{path}.ls1"), layer_scale(module.ls2, f"{path}.ls2")
    return pre_norm(module, path, layout, one, two)


@converts("block", "timm.models.eva.EvaBlock", "timm.models.beit.Block")
def gamma_block(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert a pre-norm block whose layer scales are its own parameters."""
    return pre_norm(module, path, layout, module.gamma_1, module.gamma_2)


def pre_norm(
    module: Any, path: str, layout: TokenLayout, one: Tensor | None, two: Tensor | None
) -> Steps:
    """Convert a pre-norm block with norm1, attn, norm2 and mlp.

    Args:
        module: The block.
        path: Its path in the source model.
        layout: The tokens that it sees.
        one: Layer scale of the attention, (embed,). None: there is none.
        two: Layer scale of the FFN, (embed,). None: there is none.

    Returns:
        Two steps of one branch.
    """
    norm1, norm2 = (module.norm1, f"{path}.norm1"), (module.norm2, f"{path}.norm2")
    attention = attention_branch(module.attn, f"{path}.attn", layout, before=norm1, gamma=one)
    return [[attention], [ffn_branch(module.mlp, f"{path}.ffn", before=norm2, gamma=two)]]


@converts(
    "block",
    "timm.models.vision_transformer.ResPostBlock",
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock",
    "timm.models.eva.EvaBlockPostNorm",
)
def res_post_block(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert x += norm1(attn(x)); x += norm2(mlp(x))."""
    norm1, norm2 = (module.norm1, f"{path}.norm1"), (module.norm2, f"{path}.norm2")
    attention = attention_branch(module.attn, f"{path}.attn", layout, after=norm1)
    return [[attention], [ffn_branch(module.mlp, f"{path}.ffn", after=norm2)]]


@converts("block", "timm.models.vision_transformer.ParallelThingsBlock")
def parallel_things(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert several parallel attentions, followed by several parallel FFNs."""
    attentions, ffns = [], []
    for number, row in enumerate(module.attns):
        where = f"{path}.attns.{number}"
        before, gamma = (row.norm, f"{where}.norm"), layer_scale(row.ls, f"{where}.ls")
        attentions.append(attention_branch(row.attn, where, layout, before=before, gamma=gamma))
    for number, row in enumerate(module.ffns):
        where = f"{path}.ffns.{number}"
        before, gamma = (row.norm, f"{where}.norm"), layer_scale(row.ls, f"{where}.ls")
        ffns.append(ffn_branch(row.mlp, where, before=before, gamma=gamma))
    return [attentions, ffns]


def attention_branch(
    module: nn.Module,
    name: str,
    layout: TokenLayout,
    *,
    before: Normed | None = None,
    after: Normed | None = None,
    gamma: Any = None,
) -> Piece[BranchSpec]:
    """Convert an attention with its norms and its layer scale.

    Args:
        module: The attention.
        name: Its path in the source model, which becomes the name of the branch.
        layout: The tokens that it sees.
        before: Norm before it, and the norm's path. None: there is none.
        after: Norm after it, and the norm's path. None: there is none.
        gamma: Layer scale, (embed,). None: there is none.

    Returns:
        The branch.
    """
    core = find_converter("attention", module, name)(module, name, layout)
    return wrap(core, name, before=before, after=after, gamma=gamma)


def ffn_branch(
    module: nn.Module,
    name: str,
    *,
    before: Normed | None = None,
    after: Normed | None = None,
    gamma: Any = None,
) -> Piece[BranchSpec]:
    """Convert an FFN with its norms and its layer scale.

    Args:
        module: The FFN.
        name: Its path in the source model, which becomes the name of the branch.
        before: Norm before it, and the norm's path. None: there is none.
        after: Norm after it, and the norm's path. None: there is none.
        gamma: Layer scale, (embed,). None: there is none.

    Returns:
        The branch.
    """
    core = find_converter("ffn", module, name)(module, name)
    return wrap(core, name, before=before, after=after, gamma=gamma)


def wrap(
    core: Piece[Any],
    name: str,
    *,
    before: Normed | None = None,
    after: Normed | None = None,
    gamma: Tensor | None = None,
) -> Piece[BranchSpec]:
    """Build a branch around a converted core.

    Args:
        core: The converted attention or FFN.
        name: Name of the branch.
        before: Norm before the core, and the norm's path. None: there is none.
        after: Norm after the core, and the norm's path. None: there is none.
        gamma: Layer scale, (embed,). None: there is none.

    Returns:
        The branch.
    """
    pre = norm(*before) if before is not None else None
    post = norm(*after) if after is not None else None
    tensors = core.prefixed("core")
    if pre is not None:
        tensors |= pre.prefixed("norm")
    if post is not None:
        tensors |= post.prefixed("post_norm")
    if gamma is not None:
        tensors["layer_scale"] = gamma
    spec = BranchSpec(
        name=name,
        core=core.spec,
        norm=pre and pre.spec,
        post_norm=post and post.spec,
        layer_scale=gamma is not None,
    )
    return Piece(spec, tensors)
