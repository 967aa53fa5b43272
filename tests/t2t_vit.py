"""T2T-ViT (Yuan et al. 2021, "Tokens-to-Token ViT"), written from its published shapes.

It has two soft splits followed by a small transformer each, a third soft split with a projection,
and a deep and narrow backbone of plain blocks. T2T-ViT-14: 14 blocks, 384 channels, 6 heads, MLP
ratio 3, 64 channels in tokens-to-token; 21.5 M parameters. The backbone here includes the last soft
split, which with its projection is a convolution: 3 x 3, stride 2, padding 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, hidden), nn.GELU()
        self.fc2, self.drop = nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        out: Tensor = self.proj_drop(
            self.proj((self.attn_drop(attn) @ v).transpose(1, 2).reshape(batch, tokens, width))
        )
        return out


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.drop_path = nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class TokenTransformer(nn.Module):
    """One head with a residual connection of the values instead of the inputs."""

    def __init__(self, dim: int, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.norm1, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * in_dim, bias=False)
        self.proj = nn.Linear(in_dim, in_dim)
        self.norm2, self.mlp = nn.LayerNorm(in_dim), Mlp(in_dim, in_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.proj((q @ k.transpose(-2, -1) * self.in_dim**-0.5).softmax(dim=-1) @ v)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SoftSplits(nn.Module):
    """The tokens-to-token module without its last soft split.

    (batch, 3, height, width) -> (batch, 64, height / 8, width / 8).
    """

    def __init__(self, token_dim: int = 64) -> None:
        super().__init__()
        self.soft_split0 = nn.Unfold(7, stride=4, padding=2)
        self.soft_split1 = nn.Unfold(3, stride=2, padding=1)
        self.attention1 = TokenTransformer(3 * 49, token_dim)
        self.attention2 = TokenTransformer(token_dim * 9, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        for split, attention in (
            (self.soft_split0, self.attention1),
            (self.soft_split1, self.attention2),
        ):
            tokens = attention(split(x).transpose(1, 2))
            side = math.isqrt(tokens.shape[1])
            x = tokens.transpose(1, 2).reshape(len(x), -1, side, side)
        return x


class LastSplit(nn.Module):
    """The third soft split and the projection."""

    def __init__(self, side: int, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = (side, side)
        self.proj = nn.Conv2d(token_dim, embed_dim, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class T2TBackbone(nn.Module):
    """Feature maps (batch, 64, side, side) -> logits (batch, classes).

    Defaults are those of T2T-ViT-14 on 224 x 224 images.
    """

    def __init__(
        self,
        side: int = 28,
        token_dim: int = 64,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = LastSplit(side, token_dim, embed_dim)
        patches = ((side + 1) // 2) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sinusoids(patches + 1, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Linear(embed_dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = self.pos_drop(
            torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        )
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


class T2TViT(nn.Module):
    """The whole network with the published module names: `tokens_to_token` has no converter."""

    def __init__(self, backbone: T2TBackbone) -> None:
        super().__init__()
        self.tokens_to_token = nn.Sequential(SoftSplits(), backbone.patch_embed)
        self.cls_token, self.pos_embed, self.blocks, self.norm, self.head = (
            backbone.cls_token,
            backbone.pos_embed,
            backbone.blocks,
            backbone.norm,
            backbone.head,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


def sinusoids(positions: int, width: int) -> Tensor:
    """Position table (1, positions, width) of Vaswani et al. 2017."""
    angle = torch.arange(positions)[:, None] / 10000 ** (2 * (torch.arange(width) // 2) / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table[None].float()
