"""The properties of timm's Vision Transformers, with timm's meanings, for a network of plain data.

Widths are those of the source model: channels that pruning removed are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InputError
from ..architecture import Architecture, Indices

Pair = tuple[int, int]
ROTATED = (
    "the residual stream of this network was rotated, so they are in another basis than those of "
    "the source model; trim it with TrimOptions(stream=False)"
)
# timm's names of poolings, and ours.
POOLS = {
    "": "none",
    "avg": "mean",
    "avgmax": "avgmax",
    "max": "max",
    "token": "token",
    "map": "attention",
}


@dataclass(frozen=True)
class PatchEmbed:
    """What detectors read of timm's `patch_embed`.

    Attributes:
        img_size: Height and width of the input, in pixels.
        patch_size: Vertical and horizontal distance of patches, in pixels.
        grid_size: Rows and columns of patches.
    """

    img_size: Pair
    patch_size: Pair
    grid_size: Pair

    @property
    def num_patches(self) -> int:
        """Number of patches."""
        return math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | Pair:
        """The distance of patches in pixels: the larger one, or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """Rows and columns of patches; the network has one image size.

        Raises:
            InputError: `img_size` is another one.
        """
        if tuple(img_size) != self.img_size:
            raise InputError(
                f"image size {tuple(img_size)}: this network is for {self.img_size}; "
                "call vitrim.resized(model, size)"
            )
        return self.grid_size


class BackboneFacts(nn.Module):
    """What timm's users read of a Vision Transformer: widths, tokens, blocks, data config."""

    architecture: Architecture
    steps: nn.ModuleList
    norm: nn.Module | None
    pool: nn.Module | None
    pool_norm: nn.Module | None
    refine: nn.Module | None
    pre_head: nn.Linear | None
    head: nn.Linear | None
    head_dist: nn.Linear | None
    stem: nn.Conv2d
    head_reads: Tensor | None
    feature_writes: Tensor | None
    # Channels of the source model: of the stream, and of what the head reads.
    stream_places: Tensor | None
    read_places: Tensor | None
    grad_checkpointing: bool = False

    @property
    def num_classes(self) -> int:
        """Number of logits; 0 without a classifier."""
        return 0 if self.architecture.head is None else self.architecture.head.classes

    @property
    def num_features(self) -> int:
        """Channels of what `forward_features` returns: those of the source model."""
        return self.architecture.source_width

    @property
    def embed_dim(self) -> int:
        """Channels of what `forward_features` returns: those of the source model."""
        return self.architecture.source_width

    @property
    def head_hidden_size(self) -> int:
        """Width of what `forward_head(pre_logits=True)` returns: that of the source model."""
        return self.architecture.feature_width or self.architecture.head_width

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation and register tokens, which come first."""
        return self.architecture.source_tokens

    @property
    def global_pool(self) -> str:
        """How tokens are pooled, in timm's words; the last two are not timm's.

        '', 'avg', 'avgmax', 'max', 'token', 'map', 'prr', 'token_mean' or 'dense'.
        """
        pool = self.architecture.pool
        if pool.refine is not None:
            return "prr"
        kind = "token" if pool.kind == "distilled" else pool.kind.removesuffix("_all")
        return next((name for name, ours in POOLS.items() if ours == kind), kind)

    @property
    def patch_embed(self) -> PatchEmbed:
        """Image size, patch size and grid."""
        stem, (_, height, width) = self.architecture.stem, self.architecture.image
        strides = [conv.stride for conv in stem.before] + [stem.stride or stem.patch]
        down, across = (math.prod(stride[axis] for stride in strides) for axis in (0, 1))
        return PatchEmbed((height, width), (down, across), self.architecture.grid)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each block of the source model: its path, channels, and pixels per patch."""
        ratio = self.patch_embed.feat_ratio()
        return [
            {"module": name, "num_chs": self.embed_dim, "reduction": ratio}
            for name in self.architecture.block_names
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The data config of the source model, as `timm.data.resolve_model_data_config` reads it.

        Mean, standard deviation, interpolation and crop are absent where they are unknown.
        """
        data = self.architecture.data
        found: dict[str, Any] = {
            "input_size": self.architecture.image,
            "fixed_input_size": True,
            "num_classes": self.num_classes,
            "pool_size": None,
            "classifier": ("head", "head_dist") if self.head_dist is not None else "head",
        }
        return found if data is None else found | data.model_dump()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The same as `pretrained_cfg`."""
        return self.pretrained_cfg

    def index_features(self) -> None:
        """Set the indices that place channels and features in the source model."""
        architecture = self.architecture
        identity = tuple(range(architecture.source_width))
        reads = architecture.read_places
        self.register_index("stream_places", architecture.stream_channels)
        self.register_index("read_places", None if reads == identity else reads)
        self.register_index("feature_writes", architecture.feature_writes)

    def register_index(self, name: str, indices: Indices | None) -> None:
        """Set a buffer of indices, which is part of the architecture and hence not saved."""
        # On the CPU even if the rest is built on the meta device.
        buffer = None if indices is None else torch.tensor(indices, device="cpu")
        weight = vars(self).get("_modules", {}).get("stem")
        device = weight.weight.device if weight is not None else torch.device("cpu")
        if buffer is not None and device.type != "meta":
            buffer = buffer.to(device)
        self.register_buffer(name, buffer, persistent=False)
