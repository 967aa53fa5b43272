"""The plain data of what surrounds the blocks: patch embedding, pooling and classifier.

Part of the file format that `architecture.py` documents.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

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
# What a matrix product is, its rows, what it sums over, and its columns.
Product = tuple[str, int, int, int]


class ConvSpec(Spec):
    """A convolution before the patch projection, with its activation."""

    kind: Literal["conv"] = "conv"
    """Distinguishes this layer from the others. Absent in older files."""
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

    def products(self, channels: int, patches: int) -> list[Product]:
        """The matrix products for one image of `channels` that gives `patches` outputs."""
        return [("conv", patches, channels * math.prod(self.kernel), self.channels)]

    def params(self, channels: int) -> int:
        """Number of parameters for an image of `channels`."""
        return self.channels * (channels * math.prod(self.kernel) + self.bias)

    def output_size(self, size: Pair) -> Pair:
        """Rows and columns of the output for an image of `size`."""
        return _output_size(size, self.kernel, self.stride, self.padding)


class SoftSplitSpec(Spec):
    """Overlapping windows that become tokens, and one small transformer layer on these.

    With w the pixels of all channels in each window, q, k and v of width `channels`, and the
    values v as the shortcut, since the windows have another width:

        y = v + out(attention(q, k, v));  y += ffn(ffn_norm(y)), where q, k, v = qkv(norm(w))

    The tokens are pixels of the next layer. Yuan et al. 2021, "Tokens-to-Token ViT",
    section 3.1.
    """

    kind: Literal["soft_split"] = "soft_split"
    """Distinguishes this layer from the others."""
    channels: Width
    """Number of output channels."""
    kernel: tuple[Width, Width]
    """Height and width of a window, in pixels."""
    stride: tuple[Width, Width] = (1, 1)
    """Vertical and horizontal distance of windows, in pixels."""
    padding: tuple[Count, Count] = (0, 0)
    """Zeros on each side, vertical and horizontal, in pixels."""
    norm: NormSpec
    """Norm over the pixels of a window, all channels of them."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    scale: float | None = None
    """Multiplies the scores before the softmax. None: the attention has random features."""
    features: Width | None = None
    """Number of random features of a linear attention (Choromanski et al. 2021, "Rethinking
    Attention with Performers", lemma 1). None: softmax attention."""
    features_eps: Annotated[float, Field(ge=0)] = 1e-8
    """Added to the divisor of the linear attention."""
    out_bias: bool = True
    """Whether the output projection has a bias."""
    ffn_norm: NormSpec
    """Norm before `ffn`."""
    ffn: FfnSpec
    """Feed-forward layer with a residual connection."""

    @model_validator(mode="after")
    def _consistent(self) -> SoftSplitSpec:
        if (self.scale is None) == (self.features is None):
            raise ValueError("a soft split needs either `scale` or `features`")
        check_norm("ffn_norm", self.ffn_norm, self.channels)
        check_norm("ffn.norm", self.ffn.norm, self.ffn.hidden)
        return self

    def products(self, channels: int, patches: int) -> list[Product]:
        """The matrix products for one image of `channels` that gives `patches` outputs."""
        window, width, hidden = channels * math.prod(self.kernel), self.channels, self.ffn.hidden
        found: list[Product] = [("qkv", patches, window, 3 * width)]
        if self.features is None:
            found += [("scores", patches, width, patches), ("values", patches, patches, width)]
        else:
            found += [
                ("features", 2 * patches, width, self.features),
                ("divisor", patches, self.features, 1),
                ("summary", self.features, patches, width),
                ("values", patches, self.features, width),
            ]
        found.append(("out", patches, width, width))
        if self.ffn.gated:
            found.append(("ffn.gate", patches, width, hidden))
        return [*found, ("ffn.fc1", patches, width, hidden), ("ffn.fc2", patches, hidden, width)]

    def params(self, channels: int) -> int:
        """Number of parameters for an image of `channels`; random features are not learned."""
        window, width, ffn = channels * math.prod(self.kernel), self.channels, self.ffn
        total = 3 * width * (window + self.qkv_bias) + width * (width + self.out_bias)
        total += ffn.hidden * (width + ffn.in_bias) + width * (ffn.hidden + ffn.out_bias)
        total += ffn.hidden * (width + ffn.gate_bias) if ffn.gated else 0
        norms = (self.norm, self.ffn_norm, *([ffn.norm] if ffn.norm else []))
        return total + sum(norm.width * (norm.weight + norm.bias) for norm in norms)

    def output_size(self, size: Pair) -> Pair:
        """Rows and columns of windows in an image of `size`."""
        return _output_size(size, self.kernel, self.stride, self.padding)


def _layer_kind(value: Any) -> Any:
    """The tag of a layer before the patch projection; files of older versions state none."""
    kind = value.get("kind", "conv") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


StemLayer = Annotated[
    Annotated[ConvSpec, Tag("conv")] | Annotated[SoftSplitSpec, Tag("soft_split")],
    Discriminator(_layer_kind),
]


class StemSpec(Spec):
    """Patch embedding: a convolution whose outputs are the patches, and the layers before it."""

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
    before: tuple[StemLayer, ...] = ()
    """Convolutions and soft splits before the patch projection, in order. Their channels are never
    pruned."""

    def inputs(self, channels: int) -> list[int]:
        """Input channels of each layer for an image of `channels`, the patch projection last."""
        return [channels, *(layer.channels for layer in self.before)]

    def before_macs(self, channels: int, height: int, width: int) -> int:
        """Multiply-adds of the layers before the patch projection, for one image."""
        return sum(
            rows * inner * columns
            for layer, inputs, size in zip(
                self.before, self.inputs(channels), self.sizes(height, width), strict=False
            )
            for _, rows, inner, columns in layer.products(inputs, math.prod(size))
        )

    def before_params(self, channels: int) -> int:
        """Number of parameters of the layers before the patch projection."""
        pairs = zip(self.before, self.inputs(channels), strict=False)
        return sum(layer.params(inputs) for layer, inputs in pairs)

    def check_widths(self, channels: int) -> None:
        """Raise ValueError if a norm does not fit the windows of an image of `channels`."""
        for number, (layer, inputs) in enumerate(
            zip(self.before, self.inputs(channels), strict=False)
        ):
            if isinstance(layer, SoftSplitSpec):
                window = inputs * math.prod(layer.kernel)
                check_norm(f"stem.before.{number}.norm", layer.norm, window)

    def sizes(self, height: int, width: int) -> list[Pair]:
        """Rows and columns after each layer; the last entry is the patch grid."""
        found = [(height, width)]
        for layer in self.before:
            found.append(layer.output_size(found[-1]))
        found.append(_output_size(found[-1], self.patch, self.stride or self.patch, self.padding))
        return found[1:]

    def tiles(self, height: int, width: int) -> bool:
        """Whether the patches of the input of the last convolution touch and cover it exactly."""
        return (
            (self.stride or self.patch) == self.patch
            and self.padding == (0, 0)
            and height % self.patch[0] == 0
            and width % self.patch[1] == 0
        )


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
