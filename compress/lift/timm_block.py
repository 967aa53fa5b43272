"""timm's transformer blocks: each becomes steps of branches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..network.architecture import BranchSpec
from .parts import layer_scale, norm
from .positions import Places
from .registry import Piece, find, handles

# A block is a list of steps, a step a list of branches.
Steps = list[list[Piece[BranchSpec]]]


@handles(
    "block",
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer_relpos.RelPosBlock",
)
def block(module: Any, path: str, places: Places) -> Steps:
    """Pre-norm: x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))."""
    return pre_norm(
        module,
        path,
        places,
        layer_scale(module.ls1, f"{path}.ls1"),
        layer_scale(module.ls2, f"{path}.ls2"),
    )


@handles("block", "timm.models.eva.EvaBlock", "timm.models.beit.Block")
def gamma_block(module: Any, path: str, places: Places) -> Steps:
    """Pre-norm with LayerScale as a parameter of the block."""
    return pre_norm(module, path, places, module.gamma_1, module.gamma_2)


def pre_norm(
    module: Any, path: str, places: Places, one: Tensor | None, two: Tensor | None
) -> Steps:
    """norm1, attn, norm2, mlp, with the layer scales given."""
    return [
        [
            attention_branch(
                module.attn,
                f"{path}.attn",
                places,
                before=(module.norm1, f"{path}.norm1"),
                gamma=one,
            )
        ],
        [ffn_branch(module.mlp, f"{path}.ffn", before=(module.norm2, f"{path}.norm2"), gamma=two)],
    ]


@handles(
    "block",
    "timm.models.vision_transformer.ResPostBlock",
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock",
    "timm.models.eva.EvaBlockPostNorm",
)
def res_post_block(module: Any, path: str, places: Places) -> Steps:
    """x += norm1(attn(x)); x += norm2(mlp(x))."""
    return [
        [
            attention_branch(
                module.attn, f"{path}.attn", places, after=(module.norm1, f"{path}.norm1")
            )
        ],
        [ffn_branch(module.mlp, f"{path}.ffn", after=(module.norm2, f"{path}.norm2"))],
    ]


@handles("block", "timm.models.vision_transformer.ParallelThingsBlock")
def parallel_things(module: Any, path: str, places: Places) -> Steps:
    """Several attentions side by side, then several FFNs."""
    attentions, ffns = [], []
    for number, row in enumerate(module.attns):
        where = f"{path}.attns.{number}"
        attentions.append(
            attention_branch(
                row.attn,
                where,
                places,
                before=(row.norm, f"{where}.norm"),
                gamma=layer_scale(row.ls, f"{where}.ls"),
            )
        )
    for number, row in enumerate(module.ffns):
        where = f"{path}.ffns.{number}"
        ffns.append(
            ffn_branch(
                row.mlp,
                where,
                before=(row.norm, f"{where}.norm"),
                gamma=layer_scale(row.ls, f"{where}.ls"),
            )
        )
    return [attentions, ffns]


Normed = tuple[nn.Module | None, str]


def attention_branch(
    module: nn.Module,
    name: str,
    places: Places,
    *,
    before: Normed | None = None,
    after: Normed | None = None,
    gamma: Any = None,
) -> Piece[BranchSpec]:
    """An attention with the norm before or after it."""
    return wrap(
        find("attention", module, name)(module, name, places),
        name,
        before=before,
        after=after,
        gamma=gamma,
    )


def ffn_branch(
    module: nn.Module,
    name: str,
    *,
    before: Normed | None = None,
    after: Normed | None = None,
    gamma: Any = None,
) -> Piece[BranchSpec]:
    """An FFN with the norm before or after it."""
    return wrap(
        find("ffn", module, name)(module, name), name, before=before, after=after, gamma=gamma
    )


def wrap(
    core: Piece[Any],
    name: str,
    *,
    before: Normed | None = None,
    after: Normed | None = None,
    gamma: Tensor | None = None,
) -> Piece[BranchSpec]:
    """A sub-layer from its core, norms (module and path) and layer scale."""
    pre = norm(*before) if before is not None else None
    post = norm(*after) if after is not None else None
    tensors = core.under("core")
    if pre is not None:
        tensors |= pre.under("norm")
    if post is not None:
        tensors |= post.under("post_norm")
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
