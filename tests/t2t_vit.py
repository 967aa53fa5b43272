"""T2T-ViT (Yuan et al. 2021, "Tokens-to-Token ViT"), written from its published shapes.

Two soft splits are each followed by a small transformer layer, with softmax attention (T2T-ViT_t)
or with a performer's linear attention; a third soft split is projected. The backbone is deep and
narrow. T2T-ViT-14: 14 blocks, 384 channels, 6 heads, MLP ratio 3, 64 channels in tokens-to-token;
21.5 M parameters. `T2TBackbone` begins at the last soft split, which with its projection is a
convolution: 3 x 3, stride 2, padding 1.
"""

from __future__ import annotations

import math
from typing import Literal

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


class TokenAttention(nn.Module):
    """One head whose width is not that of its input; the values are the shortcut."""

    def __init__(self, dim: int, in_dim: int) -> None:
        super().__init__()
        self.num_heads, self.in_dim, self.scale = 1, in_dim, dim**-0.5
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(in_dim, in_dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.in_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        y = self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, -1)))
        out: Tensor = v.squeeze(1) + y
        return out


class TokenTransformer(nn.Module):
    def __init__(self, dim: int, in_dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TokenAttention(dim, in_dim)
        self.drop_path = nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(in_dim), Mlp(in_dim, in_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class TokenPerformer(nn.Module):
    """Linear attention with positive random features; keys come first in `kqv`."""

    def __init__(self, dim: int, in_dim: int) -> None:
        super().__init__()
        self.emb, self.m, self.epsilon = in_dim, in_dim // 2, 1e-8
        self.kqv, self.dp = nn.Linear(dim, 3 * in_dim), nn.Dropout(0.1)
        self.proj = nn.Linear(in_dim, in_dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(in_dim)
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, in_dim), nn.Dropout(0.1)
        )
        directions = nn.init.orthogonal_(torch.randn(self.m, in_dim)) * math.sqrt(self.m)
        self.w = nn.Parameter(directions, requires_grad=False)

    def prm_exp(self, x: Tensor) -> Tensor:
        half_norm = (x * x).sum(dim=-1, keepdim=True) / 2
        projected = torch.einsum("bti,mi->btm", x.float(), self.w)
        return (projected - half_norm).exp() / math.sqrt(self.m)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).split(self.emb, dim=-1)
        k, q = self.prm_exp(k), self.prm_exp(q)
        divisor = torch.einsum("bti,bi->bt", q, k.sum(dim=1))[..., None]
        summary = torch.einsum("bin,bim->bnm", v.float(), k)
        y = torch.einsum("bti,bni->btn", q, summary) / (divisor + self.epsilon)
        x = v + self.dp(self.proj(y))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class T2TModule(nn.Module):
    """Images (batch, 3, height, width) -> tokens (batch, height / 16 * width / 16, embed_dim)."""

    def __init__(
        self,
        kind: Literal["performer", "transformer"] = "performer",
        token_dim: int = 64,
        embed_dim: int = 384,
        channels: int = 3,
    ) -> None:
        super().__init__()
        layer = TokenPerformer if kind == "performer" else TokenTransformer
        self.soft_split0 = nn.Unfold(kernel_size=(7, 7), stride=(4, 4), padding=(2, 2))
        self.soft_split1 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.soft_split2 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.attention1 = layer(channels * 7 * 7, token_dim)
        self.attention2 = layer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        for split, attention in (
            (self.soft_split0, self.attention1),
            (self.soft_split1, self.attention2),
        ):
            tokens = attention(split(x).transpose(1, 2))
            side = math.isqrt(tokens.shape[1])
            x = tokens.transpose(1, 2).reshape(len(x), -1, side, side)
        out: Tensor = self.project(self.soft_split2(x).transpose(1, 2))
        return out


class T2TViT(nn.Module):
    """Images (batch, 3, size, size) -> logits (batch, classes). Defaults are T2T-ViT-14."""

    def __init__(
        self,
        kind: Literal["performer", "transformer"] = "performer",
        img_size: int = 224,
        token_dim: int = 64,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.tokens_to_token = T2TModule(kind, token_dim, embed_dim)
        patches = (img_size // 16) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sinusoids(patches + 1, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Linear(embed_dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = self.pos_drop(
            torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        )
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


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
    """Feature maps (batch, 64, side, side) -> logits (batch, classes)."""

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


def sinusoids(positions: int, width: int) -> Tensor:
    """Position table (1, positions, width) of Vaswani et al. 2017."""
    angle = torch.arange(positions)[:, None] / 10000 ** (2 * (torch.arange(width) // 2) / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table[None].float()
