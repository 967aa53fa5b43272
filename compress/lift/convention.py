"""Modules that nobody registered, but whose parts carry timm's names: attn.qkv, attn.proj, mlp.fc1,
mlp.fc2, norm1, norm2, blocks, norm, head.

Names prove nothing, so each such module is run on random numbers beside what was read from it, and
refused if the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, AttentionSpec, FfnSpec, PoolSpec, StemSpec
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from ..network.modules.layers import Ffn
from ..network.modules.model import build
from ..network.modules.layers import ConvAct
from .assembly import assemble, classifier, lift_blocks
from .parts import absent, activation, layer_scale, linear, norm, under
from .positions import Places
from .proof import CLOSE, difference, filled
from .registry import Piece, falls_back, refusal, type_name
from .stem import sequence_stem
from .timm_attention import assemble as assemble_attention
from .timm_attention import no_rope, split_qkv
from .timm_block import Steps, attention_branch, ffn_branch
from .timm_mlp import ffn


@falls_back("attention")
def attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """qkv, proj, num_heads, perhaps scale, q_norm, k_norm: softmax(scale q kᵀ) v."""
    _needs("attention", module, path, qkv=nn.Linear, proj=nn.Linear, num_heads=int)
    no_rope(places, path)
    tensors = split_qkv(module.qkv, f"{path}.qkv") | under(
        "out", linear(module.proj, f"{path}.proj")
    )
    heads = module.num_heads
    scale = float(getattr(module, "scale", None) or (tensors["q.weight"].shape[0] // heads) ** -0.5)
    norms = {
        name: norm(getattr(module, name, None), f"{path}.{name}") for name in ("q_norm", "k_norm")
    }
    piece = assemble_attention(tensors, heads, scale, path, norms=norms)
    width = module.qkv.in_features
    with torch.device("meta"):
        ours = Attention(piece.spec, width, module.proj.out_features)
    _prove(
        module, filled(ours, piece.tensors), _tokens(places, width), path, "softmax(scale q k) v"
    )
    return piece


@falls_back("ffn")
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """fc1, act, fc2."""
    _needs("ffn", module, path, fc1=nn.Linear, fc2=nn.Linear, act=nn.Module)
    tensors = under("fc1", linear(module.fc1, f"{path}.fc1")) | under(
        "fc2", linear(module.fc2, f"{path}.fc2")
    )
    piece = ffn(tensors, activation(module.act, f"{path}.act"))
    with torch.device("meta"):
        ours = Ffn(piece.spec, module.fc1.in_features, module.fc2.out_features)
    _prove(
        module,
        filled(ours, piece.tensors),
        torch.randn(2, 5, module.fc1.in_features, generator=_random()),
        path,
        "fc2(act(fc1(x)))",
    )
    return piece


@falls_back("block")
def block(module: Any, path: str, places: Places) -> Steps:
    """x += s * ls1(attn(norm1(x))); x += s * ls2(mlp(norm2(x))), where s is 1, or 1 / skip_lam as
    in LV-ViT.
    """
    _needs("block", module, path, norm1=nn.Module, attn=nn.Module, norm2=nn.Module, mlp=nn.Module)
    gammas = [_gamma(module, path, number) for number in (1, 2)]
    steps: Steps = [
        [
            attention_branch(
                module.attn,
                f"{path}.attn",
                places,
                before=(module.norm1, f"{path}.norm1"),
                gamma=gammas[0],
            )
        ],
        [
            ffn_branch(
                module.mlp, f"{path}.ffn", before=(module.norm2, f"{path}.norm2"), gamma=gammas[1]
            )
        ],
    ]
    skip = float(getattr(module, "skip_lam", 1.0))
    if skip != 1.0:
        # A constant factor on what the sub-layer adds goes into its last projection.
        steps = [[_divided(piece, skip) for piece in row] for row in steps]
    width = steps[0][0].tensors["core.q.weight"].shape[1]
    branches = []
    for row in steps:
        with torch.device("meta"):
            ours = Branch(row[0].spec, width)
        branches.append(filled(ours, row[0].tensors))

    def run(x: Tensor) -> Tensor:
        for branch in branches:
            x = x + branch(x)
        return x

    _prove(module, run, _tokens(places, width), path, "x + attn(norm1(x)), then x + mlp(norm2(x))")
    return steps


@falls_back("model")
def model(module: Any, path: str) -> Piece[Architecture]:
    """patch_embed, cls_token, pos_embed, blocks, norm, head; a Linear `aux_head` on the patches as
    in LV-ViT.
    """
    if not isinstance(getattr(module, "blocks", None), nn.Sequential | nn.ModuleList):
        raise UnsupportedModel(refusal("model", module, path))
    stem, tokens, image = _stem(module)
    reasons = []
    for pool, head in _answers(module):
        piece = _network(module, stem, tokens, image, pool, head)
        ours = build(
            piece.spec, {name: tensor.detach() for name, tensor in piece.tensors.items()}
        ).eval()
        found = difference(module, ours, torch.randn(2, *image, generator=_random()))
        if not isinstance(found, str) and found <= CLOSE:
            return piece
        reasons.append(f"pooled by '{pool.kind}': {_told(found)}")
    raise UnsupportedModel(
        f"model: {type_name(module)} has timm's names, but computes something else ({'; '.join(reasons)})"
    )


def _network(
    module: Any,
    stem: Piece[StemSpec],
    tokens: tuple[Tensor | None, Tensor | None],
    image: tuple[int, int, int],
    pool: PoolSpec,
    head: Any,
) -> Piece[Architecture]:
    prefix, position = tokens
    places = Places(stem.spec.sizes(*image[1:])[-1], 0 if prefix is None else len(prefix))
    return assemble(
        image=image,
        stem=stem,
        blocks=lift_blocks(module.blocks, "blocks", [places] * len(module.blocks)),
        prefix=prefix,
        position=position,
        norms={
            "patch_norm": (getattr(module.patch_embed, "norm", None), "patch_embed.norm"),
            "stem_norm": (getattr(module, "norm_pre", None), "norm_pre"),
            "norm": (getattr(module, "norm", None), "norm"),
            "pool_norm": (
                getattr(module, "fc_norm", None) if pool.kind != "dense" else None,
                "fc_norm",
            ),
        },
        pool=Piece(pool),
        head=head,
    )


def _answers(module: Any) -> Iterator[tuple[PoolSpec, Any]]:
    """The ways in which such a model may come to its answer, likeliest first."""
    head = getattr(module, "head", None)
    first = classifier(head, "head")
    has_class = getattr(module, "cls_token", None) is not None
    for name in ("aux_head", "head_dist"):
        second = getattr(module, name, None)
        if has_class and isinstance(second, nn.Linear) and head is not None and not absent(head):
            yield (
                PoolSpec(kind="dense" if name == "aux_head" else "distilled"),
                classifier(head, "head", (second, name)),
            )
    if has_class:
        yield PoolSpec(kind="token"), first
    yield PoolSpec(kind="mean"), first
    if has_class:
        yield PoolSpec(kind="mean_all"), first


def _stem(
    module: Any,
) -> tuple[Piece[StemSpec], tuple[Tensor | None, Tensor | None], tuple[int, int, int]]:
    embed = getattr(module, "patch_embed", None)
    if not isinstance(embed, nn.Module):
        known = ("blocks", "norm", "norm_pre", "fc_norm", "head", "head_dist", "aux_head")
        other = next(
            (
                name
                for name, child in module.named_children()
                if name not in known and next(child.parameters(), None) is not None
            ),
            None,
        )
        what = (
            f"{other}: {type_name(getattr(module, other))}"
            if other
            else f"model: {type_name(module)}"
        )
        raise UnsupportedModel(
            f"{what} stands where a convolutional patch_embed was expected; lift what comes after it: a module with patch_embed, blocks, norm and head"
        )
    found = [
        token[0]
        for token in (
            getattr(module, name, None) for name in ("cls_token", "dist_token", "reg_token")
        )
        if isinstance(token, Tensor)
    ]
    prefix = torch.cat(found) if found else None
    pos_embed = getattr(module, "pos_embed", None)
    table = pos_embed[0] if isinstance(pos_embed, Tensor) else None
    reasons = []
    for stem in sequence_stem(embed, "patch_embed"):
        image = _image(
            module,
            stem,
            None if table is None else len(table),
            0 if prefix is None else len(prefix),
        )
        with torch.device("meta"):
            ours = _Patches(stem)
        outcome = difference(
            embed, filled(ours, stem.tensors), torch.randn(1, *image, generator=_random())
        )
        if not isinstance(outcome, str) and outcome <= CLOSE:
            grid = stem.spec.sizes(*image[1:])[-1]
            return stem, _placed(prefix, table, grid), image
        reasons.append(_told(outcome))
    raise UnsupportedModel(
        f"patch_embed: {type_name(embed)} computes something else than convolutions in the order of its parts ({'; '.join(reasons)})"
    )


def _placed(
    prefix: Tensor | None, table: Tensor | None, grid: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Prefix tokens with their positions, and positions of the patches."""
    patches = grid[0] * grid[1]
    if table is None or len(table) == patches:
        return prefix, table
    if prefix is None or len(table) != patches + len(prefix):
        raise UnsupportedModel(
            f"pos_embed: {len(table)} positions for {0 if prefix is None else len(prefix)} + {patches} tokens"
        )
    return prefix + table[: len(prefix)], table[len(prefix) :]


def _image(
    module: Any, stem: Piece[StemSpec], positions: int | None, prefix: int
) -> tuple[int, int, int]:
    first = stem.tensors["before.0.conv.weight" if stem.spec.before else "stem.weight"]
    for owner in (module, module.patch_embed):
        for name in ("img_size", "image_size", "input_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return first.shape[1], size, size
            if isinstance(size, tuple | list) and len(size) >= 2:
                return first.shape[1], int(size[-2]), int(size[-1])
    if positions is None or math.isqrt(positions - prefix) ** 2 != positions - prefix:
        raise UnsupportedModel(
            "model: no img_size, and no square table of positions to tell it by; set model.img_size = (height, width)"
        )
    steps = [conv.stride for conv in stem.spec.before] + [stem.spec.stride or stem.spec.patch]
    side = math.isqrt(positions - prefix)
    return (
        first.shape[1],
        side * math.prod(step[0] for step in steps),
        side * math.prod(step[1] for step in steps),
    )


class _Patches(nn.Module):
    """The stem alone: (batch, channels, height, width) -> (batch, patches, embed)."""

    def __init__(self, stem: Piece[StemSpec]) -> None:
        super().__init__()
        first = stem.tensors["before.0.conv.weight" if stem.spec.before else "stem.weight"].shape[1]
        inputs = [first, *(conv.channels for conv in stem.spec.before)]
        spec, weight = stem.spec, stem.tensors["stem.weight"]
        convs = [ConvAct(conv, width) for conv, width in zip(spec.before, inputs, strict=False)]
        last = nn.Conv2d(
            inputs[-1],
            weight.shape[0],
            spec.patch,
            stride=spec.stride or spec.patch,
            padding=spec.padding,
            bias=spec.bias,
        )
        self.before, self.stem = nn.Sequential(*convs), last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem(self.before(x)).flatten(2).transpose(1, 2)
        return out


def _gamma(module: Any, path: str, number: int) -> Tensor | None:
    gamma = getattr(module, f"gamma_{number}", None)
    return (
        gamma
        if isinstance(gamma, Tensor)
        else layer_scale(getattr(module, f"ls{number}", None), f"{path}.ls{number}")
    )


def _divided(piece: Any, by: float) -> Any:
    last = "core.out" if "core.out.weight" in piece.tensors else "core.fc2"
    return Piece(
        piece.spec,
        {
            name: tensor / by if name.startswith(last) else tensor
            for name, tensor in piece.tensors.items()
        },
    )


def _needs(kind: str, module: Any, path: str, **parts: type) -> None:
    missing = [
        name
        for name, expected in parts.items()
        if not isinstance(getattr(module, name, None), expected)
    ]
    if missing:
        raise UnsupportedModel(
            f"{refusal(kind, module, path)}, nor does it follow timm's convention: it has no {' and no '.join(missing)}"
        )


def _prove(module: nn.Module, ours: Any, inputs: Tensor, path: str, rule: str) -> None:
    found = difference(module, ours, inputs)
    if isinstance(found, str) or found > CLOSE:
        raise UnsupportedModel(
            f"{path}: {type_name(module)} has timm's names, but does not compute {rule} ({_told(found)})"
        )


def _told(found: float | str) -> str:
    return found if isinstance(found, str) else f"outputs differ by {found:.1e}"


def _tokens(places: Places, width: int) -> Tensor:
    return torch.randn(
        2, places.prefix + places.grid[0] * places.grid[1], width, generator=_random()
    )


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)
