"""Modules without a converter of their own that follow timm's naming convention.

The names are attn.qkv, attn.proj, mlp.fc1, mlp.fc2, norm1, norm2, blocks, norm and head. Names do
not prove what a module computes. Each such module and its conversion are run on the same random
inputs, and the module is refused if the outputs differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import (
    Architecture,
    AttentionSpec,
    FfnSpec,
    PoolSpec,
    SoftSplitSpec,
    StemSpec,
)
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from ..network.modules.layers import Ffn
from ..network.modules.model import build
from ..network.modules.soft_split import stem_layers
from .assembly import assemble, classifier, lift_blocks
from .equivalence import describe, is_close, output_difference, with_tensors
from .hooks import nearest_change
from .parts import absent, activation, layer_scale, linear, norm, prefixed, softmax_scale
from .registry import Piece, TokenLayout, converts_unknown, forget, no_rule_message, type_name
from .soft_split import has_soft_splits, soft_split_stem
from .stem import sequence_stem
from .timm_attention import attention_piece, no_rope, split_qkv
from .timm_block import Steps, attention_branch, ffn_branch
from .timm_mlp import ffn_piece

Image = tuple[int, int, int]


@converts_unknown("attention")
def attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert softmax(scale q kᵀ) v with qkv, proj, num_heads, and perhaps scale and norms."""
    _require_parts("attention", module, path, qkv=nn.Linear, proj=nn.Linear, num_heads=int)
    no_rope(layout, path)
    tensors = split_qkv(module.qkv, f"{path}.qkv")
    tensors |= prefixed("out", linear(module.proj, f"{path}.proj"))
    heads = module.num_heads
    scale = softmax_scale(module, path)
    norms = {
        name: norm(getattr(module, name, None), f"{path}.{name}") for name in ("q_norm", "k_norm")
    }
    piece = attention_piece(tensors, heads, scale, path, norms=norms)
    width = module.qkv.in_features
    with torch.device("meta"):
        ours = Attention(piece.spec, width, module.proj.out_features)
    inputs, rule = _random_tokens(layout, width), "softmax(scale q k) v"
    _require_equal(module, with_tensors(ours, piece.tensors), inputs, path, rule)
    return piece


@converts_unknown("ffn")
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert fc2(act(fc1(x)))."""
    _require_parts("ffn", module, path, fc1=nn.Linear, fc2=nn.Linear, act=nn.Module)
    tensors = prefixed("fc1", linear(module.fc1, f"{path}.fc1"))
    tensors |= prefixed("fc2", linear(module.fc2, f"{path}.fc2"))
    piece = ffn_piece(tensors, activation(module.act, f"{path}.act"))
    width = module.fc1.in_features
    with torch.device("meta"):
        ours = Ffn(piece.spec, width, module.fc2.out_features)
    inputs = torch.randn(2, 5, width, generator=_generator())
    _require_equal(module, with_tensors(ours, piece.tensors), inputs, path, "fc2(act(fc1(x)))")
    return piece


@converts_unknown("block")
def block(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert x += s * ls1(attn(norm1(x))); x += s * ls2(mlp(norm2(x))).

    s is 1, or 1 / skip_lam as in LV-ViT.
    """
    parts = dict.fromkeys(("norm1", "attn", "norm2", "mlp"), nn.Module)
    _require_parts("block", module, path, **parts)
    one, two = (_gamma(module, path, number) for number in (1, 2))
    before = [(getattr(module, name), f"{path}.{name}") for name in ("norm1", "norm2")]
    attn = attention_branch(module.attn, f"{path}.attn", layout, before=before[0], gamma=one)
    steps: Steps = [[attn], [ffn_branch(module.mlp, f"{path}.ffn", before=before[1], gamma=two)]]
    skip = float(getattr(module, "skip_lam", 1.0))
    if skip != 1.0:
        # A constant factor of what the sub-layer adds is folded into its last projection.
        steps = [[_divided(piece, skip) for piece in row] for row in steps]
        for row in steps:
            forget(row[0].spec.name)
    width = steps[0][0].tensors["core.q.weight"].shape[1]
    branches = []
    for row in steps:
        with torch.device("meta"):
            ours = Branch(row[0].spec, width)
        branches.append(with_tensors(ours, row[0].tensors))

    def run(x: Tensor) -> Tensor:
        for branch in branches:
            x = x + branch(x)
        return x

    rule = "x + attn(norm1(x)), then x + mlp(norm2(x))"
    _require_equal(module, run, _random_tokens(layout, width), path, rule)
    return steps


@converts_unknown("model")
def model(module: Any, path: str) -> Piece[Architecture]:
    """Convert patch_embed, cls_token, pos_embed, blocks, norm and head.

    A Linear `aux_head` reads the patches, as in LV-ViT. T2T-ViT's stem is named `tokens_to_token`.
    """
    if not isinstance(getattr(module, "blocks", None), nn.Sequential | nn.ModuleList):
        raise UnsupportedModel(no_rule_message("model", module, path))
    stem, tokens, image = _stem(module)
    reasons = []
    for pool, head in _pools_and_heads(module):
        piece = _network(module, stem, tokens, image, pool, head)
        state = {name: tensor.detach() for name, tensor in piece.tensors.items()}
        ours = build(piece.spec, state).eval()
        found = output_difference(module, ours, torch.randn(2, *image, generator=_generator()))
        if is_close(found):
            return piece
        reasons.append(f"pooled by '{pool.kind}': {describe(found)}")
    raise UnsupportedModel(
        f"model: {type_name(module)} has timm's names, but computes something else "
        f"({'; '.join(reasons)}){nearest_change(module, '')}"
    )


def _network(
    module: Any,
    stem: Piece[StemSpec],
    tokens: tuple[Tensor | None, Tensor | None],
    image: Image,
    pool: PoolSpec,
    head: Any,
) -> Piece[Architecture]:
    prefix, position = tokens
    layout = TokenLayout(stem.spec.sizes(*image[1:])[-1], 0 if prefix is None else len(prefix))
    pool_norm = getattr(module, "fc_norm", None) if pool.kind != "dense" else None
    return assemble(
        image=image,
        stem=stem,
        blocks=lift_blocks(module.blocks, "blocks", [layout] * len(module.blocks)),
        prefix=prefix,
        position=position,
        norms={
            "patch_norm": _patch_norm(module),
            "stem_norm": (getattr(module, "norm_pre", None), "norm_pre"),
            "norm": (getattr(module, "norm", None), "norm"),
            "pool_norm": (pool_norm, "fc_norm"),
        },
        pool=Piece(pool),
        head=head,
    )


def _pools_and_heads(module: Any) -> Iterator[tuple[PoolSpec, Any]]:
    """The ways in which such a model may compute its logits, likeliest first."""
    head = getattr(module, "head", None)
    single = classifier(head, "head")
    has_class = getattr(module, "cls_token", None) is not None
    for name in ("aux_head", "head_dist"):
        second = getattr(module, name, None)
        if has_class and isinstance(second, nn.Linear) and head is not None and not absent(head):
            yield (
                PoolSpec(kind="dense" if name == "aux_head" else "distilled"),
                classifier(head, "head", (second, name)),
            )
    if has_class:
        yield PoolSpec(kind="token"), single
    yield PoolSpec(kind="mean"), single
    if has_class:
        yield PoolSpec(kind="mean_all"), single


def _stem(module: Any) -> tuple[Piece[StemSpec], tuple[Tensor | None, Tensor | None], Image]:
    embed, path = _patch_embed(module)
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [getattr(module, name, None) for name in names]
    found = [token[0] for token in tokens if isinstance(token, Tensor)]
    prefix = torch.cat(found) if found else None
    pos_embed = getattr(module, "pos_embed", None)
    table = pos_embed[0] if isinstance(pos_embed, Tensor) else None
    reasons = []
    soft = has_soft_splits(embed)
    for stem in [soft_split_stem(embed, path)] if soft else sequence_stem(embed, path):
        positions = None if table is None else len(table)
        image = _image(module, stem, positions, 0 if prefix is None else len(prefix))
        with torch.device("meta"):
            ours = _Patches(stem)
        inputs = torch.randn(1, *image, generator=_generator())
        outcome = output_difference(embed, with_tensors(ours, stem.tensors), inputs)
        if is_close(outcome):
            grid = stem.spec.sizes(*image[1:])[-1]
            return stem, _add_prefix_positions(prefix, table, grid), image
        reasons.append(describe(outcome))
    raise UnsupportedModel(
        f"{path}: {type_name(embed)} computes something else than "
        f"{'soft splits and attention' if soft else 'convolutions'} "
        f"in the order of its parts ({'; '.join(reasons)}){nearest_change(module, path)}"
    )


def _patch_embed(module: Any) -> tuple[nn.Module, str]:
    """The patch embedding and its path."""
    for name in ("patch_embed", "tokens_to_token"):
        embed = getattr(module, name, None)
        if isinstance(embed, nn.Module) and (name == "patch_embed" or has_soft_splits(embed)):
            return embed, name
    raise UnsupportedModel(_no_patch_embed_message(module))


def _patch_norm(module: Any) -> tuple[nn.Module | None, str]:
    embed, path = _patch_embed(module)
    return getattr(embed, "norm", None), f"{path}.norm"


def _no_patch_embed_message(module: Any) -> str:
    known = ("blocks", "norm", "norm_pre", "fc_norm", "head", "head_dist", "aux_head")
    other = "model"
    for name, child in module.named_children():
        if name not in known and next(child.parameters(), None) is not None:
            other, module = name, child
            break
    return (
        f"{other}: {type_name(module)} where a convolutional patch_embed, or soft splits as in "
        "T2T-ViT, were expected; "
        "lift what comes after it: a module with patch_embed, blocks, norm and head"
    )


def _add_prefix_positions(
    prefix: Tensor | None, table: Tensor | None, grid: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the prefix tokens with their positions added, and the positions of the patches."""
    patches, prefix_tokens = grid[0] * grid[1], 0 if prefix is None else len(prefix)
    if table is None or len(table) == patches:
        return prefix, table
    if prefix is None or len(table) != patches + prefix_tokens:
        raise UnsupportedModel(
            f"pos_embed: {len(table)} positions for {prefix_tokens} + {patches} tokens"
        )
    return prefix + table[:prefix_tokens], table[prefix_tokens:]


def _image(module: Any, stem: Piece[StemSpec], positions: int | None, prefix: int) -> Image:
    """Channels, height and width: from an attribute, or from the number of positions."""
    channels = _input_channels(stem)
    for owner in (module, _patch_embed(module)[0]):
        for name in ("img_size", "image_size", "input_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return channels, size, size
            if isinstance(size, tuple | list) and len(size) >= 2:
                return channels, int(size[-2]), int(size[-1])
    if positions is None or math.isqrt(positions - prefix) ** 2 != positions - prefix:
        raise UnsupportedModel(
            "model: no img_size, and no square table of positions to derive it from; "
            "set model.img_size = (height, width)"
        )
    strides = [conv.stride for conv in stem.spec.before] + [stem.spec.stride or stem.spec.patch]
    side = math.isqrt(positions - prefix)
    return (
        channels,
        side * math.prod(stride[0] for stride in strides),
        side * math.prod(stride[1] for stride in strides),
    )


def _input_channels(stem: Piece[StemSpec]) -> int:
    before = stem.spec.before
    if before and isinstance(before[0], SoftSplitSpec):
        return before[0].norm.width // math.prod(before[0].kernel)
    first = "before.0.conv.weight" if before else "stem.weight"
    return stem.tensors[first].shape[1]


class _Patches(nn.Module):
    """The stem alone: (batch, channels, height, width) -> (batch, patches, embed)."""

    def __init__(self, stem: Piece[StemSpec]) -> None:
        super().__init__()
        spec, weight = stem.spec, stem.tensors["stem.weight"]
        channels = _input_channels(stem)
        last = nn.Conv2d(
            spec.inputs(channels)[-1],
            weight.shape[0],
            spec.patch,
            stride=spec.stride or spec.patch,
            padding=spec.padding,
            bias=spec.bias,
        )
        self.before, self.stem = stem_layers(spec, channels) or nn.Sequential(), last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem(self.before(x)).flatten(2).transpose(1, 2)
        return out


def _gamma(module: Any, path: str, number: int) -> Tensor | None:
    gamma = getattr(module, f"gamma_{number}", None)
    if isinstance(gamma, Tensor):
        return gamma
    return layer_scale(getattr(module, f"ls{number}", None), f"{path}.ls{number}")


def _divided(piece: Any, by: float) -> Any:
    last = "core.out" if "core.out.weight" in piece.tensors else "core.fc2"
    tensors = {
        name: tensor / by if name.startswith(last) else tensor
        for name, tensor in piece.tensors.items()
    }
    return Piece(piece.spec, tensors)


def _require_parts(kind: str, module: Any, path: str, **parts: type) -> None:
    missing = [
        name
        for name, expected in parts.items()
        if not isinstance(getattr(module, name, None), expected)
    ]
    if missing:
        raise UnsupportedModel(
            f"{no_rule_message(kind, module, path)}, nor does it follow timm's convention: "
            f"it has no {' and no '.join(missing)}"
        )


def _require_equal(module: nn.Module, ours: Any, inputs: Tensor, path: str, rule: str) -> None:
    found = output_difference(module, ours, inputs)
    if not is_close(found):
        raise UnsupportedModel(
            f"{path}: {type_name(module)} has timm's names, but does not compute {rule} "
            f"({describe(found)}){nearest_change(module, '')}"
        )


def _random_tokens(layout: TokenLayout, width: int) -> Tensor:
    tokens = layout.prefix + layout.grid[0] * layout.grid[1]
    return torch.randn(2, tokens, width, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
