"""The plain data of what surrounds the blocks: patch embedding, pooling and classifier.

Part of the file format that `architecture.py` documents.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .branch_specs import (
    Activation,
    AttentionSpec,
    Count,
    FfnSpec,
    NormSpec,
    Spec,
    Width,
    check_norm,
)

Pair = tuple[int, int]


class ConvSpec(Spec):
    """A convolution before the patch projection, with its activation."""

    channels: Width
    """Number of output channels."""
    kernel: tuple[Width, Width]
    """Height and width of the kernel, in pixels."""
    stride: tuple[Width, Width] = (1, 1)
    """Vertical and horizontal stride, in pixels."""
    padding: tuple[Count, Count] = (0, 0)
    """Zeros on each side, vertical and horizontal, in pixels."""
    bias: bool = True
    """Whether there is a bias."""
    act: Activation = "identity"
    """Activation after the convolution."""


class StemSpec(Spec):
    """Patch embedding: a convolution whose outputs are the patches, and those before it."""

    kind: Literal["conv"] = "conv"
    """The only kind in this version."""
    patch: tuple[Width, Width]
    """Height and width of the kernel of the patch projection, in pixels."""
    stride: tuple[Width, Width] | None = None
    """Vertical and horizontal stride, in pixels. None: equal to `patch`."""
    padding: tuple[Count, Count] = (0, 0)
    """Zeros on each side, vertical and horizontal, in pixels."""
    bias: bool = True
    """Whether the patch projection has a bias."""
    before: tuple[ConvSpec, ...] = ()
    """Convolutions before the patch projection, in order. Their channels are never pruned."""

    def sizes(self, height: int, width: int) -> list[Pair]:
        """Rows and columns after each convolution; the last entry is the patch grid."""
        found = [(height, width)]
        for conv in self.before:
            found.append(_output_size(found[-1], conv.kernel, conv.stride, conv.padding))
        found.append(_output_size(found[-1], self.patch, self.stride or self.patch, self.padding))
        return found[1:]


def _output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    down, across = (
        (size[axis] + 2 * padding[axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1)
    )
    return down, across


class RefineSpec(Spec):
    """Self-attention without parameters among the tokens, before they are pooled.

    Locality-Attending Vision Transformer (ICLR 2026).
    """

    channels: tuple[Count, ...]
    """Number of channels of each head; heads take the channels in order."""
    scale: float
    """Multiplies the attention scores before the softmax."""


class PoolSpec(Spec):
    """How the tokens become one feature vector, and how many classifiers read them."""

    kind: Literal[
        "token",
        "mean",
        "mean_all",
        "max",
        "max_all",
        "avgmax",
        "avgmax_all",
        "token_mean",
        "distilled",
        "dense",
        "attention",
        "none",
    ] = "token"
    """`token`: the class token. `mean`, `max`, `avgmax` (half of mean plus maximum): over the
    patches, or over all tokens with `_all`. `token_mean`: the class token and the mean of the
    patches, concatenated. `distilled`: class and distillation token, each with a classifier, whose
    logits are averaged. `dense`: the logits of the class token plus half of the largest logits of
    the patches (LV-ViT). `attention`: one learned query attends to the tokens, and an FFN may
    follow. `none`: the output is every token."""
    attention: AttentionSpec | None = None
    """The attention of kind `attention`."""
    norm: NormSpec | None = None
    """Norm before `ffn`."""
    ffn: FfnSpec | None = None
    """FFN with a residual connection after `attention`."""
    width: Width | None = None
    """Number of channels after `attention`, which are not those of the residual stream."""
    prefix: bool = True
    """Whether `attention` also attends to the prefix tokens."""
    refine: RefineSpec | None = None
    """Self-attention among the tokens before a pooling of any kind."""

    @model_validator(mode="after")
    def _consistent(self) -> PoolSpec:
        by_attention, attention = self.kind == "attention", self.attention
        if by_attention != (attention is not None) or by_attention != (self.width is not None):
            raise ValueError("pool kind 'attention' and only that needs `attention` and `width`")
        if attention is not None and (
            attention.q_norm
            or attention.kv_of
            or attention.rope
            or attention.bias
            or attention.differential
            or attention.gated
        ):
            raise ValueError("attention pooling supports plain attention only")
        if self.width is not None:
            check_norm("pool.norm", self.norm, self.width)
        return self


class DataSpec(Spec):
    """How images become the input of a model, in the terms of timm's data config."""

    mean: tuple[float, ...]
    """Mean of each channel, in units of pixel / 255."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """Standard deviation of each channel, in units of pixel / 255."""
    interpolation: str = "bicubic"
    """Filter of resizing."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the resized image that the crop keeps."""
    crop_mode: Literal["center", "squash", "border"] = "center"
    """`center`: the shorter side is resized, then the centre is cropped; `squash`: both sides are
    resized; `border`: the longer side is resized, then the border is filled."""

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers, std has {len(self.std)}")
        return self


class HeadSpec(Spec):
    """Classifier: act(Linear(features)), or act(Linear(hidden_act(Linear(features))))."""

    classes: Width
    """Number of logits."""
    bias: bool = True
    """Whether the last layer has a bias."""
    hidden: Width | None = None
    """Number of hidden units. None: there is no hidden layer."""
    hidden_act: Activation = "tanh"
    """Activation of the hidden units."""
    act: Activation = "identity"
    """Activation of the output."""
