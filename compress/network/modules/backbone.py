"""The interface of timm's Vision Transformers, with timm's meanings, for a network of plain data.

Detectors, segmenters and training scripts that are written for timm take a pruned network in place
of the dense one. Features have the width of the source model: channels that pruning removed are
zero, as in the masked model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....core.errors import InputError
from ..architecture import Architecture, HeadSpec, Indices, PoolSpec
from .branch import Branch

Pair = tuple[int, int]
# timm's names of poolings, and ours.
_POOLS = {
    "": "none",
    "avg": "mean",
    "avgmax": "avgmax",
    "max": "max",
    "token": "token",
    "map": "attention",
}
# Layer decay numbers the final norm like the last block.
_WITH_LAST_BLOCK = (99999,)


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


class Backbone(nn.Module):
    """Base class of `CompactModel` with timm's methods and properties."""

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

    def embed(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, embed)."""
        raise NotImplementedError

    def normed(self, x: Tensor) -> Tensor:
        """(batch, tokens, embed) -> (batch, tokens, channels that the head reads)."""
        if self.head_reads is not None:
            x = x.index_select(-1, self.head_reads)
        return x if self.norm is None else self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """Normalized tokens (batch, tokens, width) -> pooled features (batch, width)."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """Normalized tokens (batch, tokens, width) -> (batch, classes), or features."""
        raise NotImplementedError

    # Facts that timm's users read.

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
        return self.architecture.prefix

    @property
    def global_pool(self) -> str:
        """How tokens are pooled, in timm's words; the last two are not timm's.

        '', 'avg', 'avgmax', 'max', 'token', 'map', 'prr', 'token_mean' or 'dense'.
        """
        pool = self.architecture.pool
        if pool.refine is not None:
            return "prr"
        kind = "token" if pool.kind == "distilled" else pool.kind.removesuffix("_all")
        return next((name for name, ours in _POOLS.items() if ours == kind), kind)

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

    # Forward passes.

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the final norm.

        Args:
            x: Images, (batch, channels, height, width).

        Returns:
            (batch, tokens, num_features). With `last_queries` also the tokens that the head does
            not read are computed.
        """
        return self._spread(self.normed(self._stream(self.embed(x))), self.read_places)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returns.

        Args:
            x: (batch, tokens, num_features).
            pre_logits: Whether to return pooled features instead of logits.

        Returns:
            (batch, classes); or (batch, head_hidden_size) with `pre_logits` or without a
            classifier; or (batch, tokens, num_features) without pooling.
        """
        if self.read_places is not None:
            x = x.index_select(-1, self.read_places)
        return self.features_of(self.pooled(x)) if pre_logits else self.logits(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return the tokens after some blocks of the source model.

        A block that pruning removed returns the tokens after the block before it.

        Args:
            x: Images, (batch, channels, height, width).
            indices: Blocks, negative ones from the end; or a number: the last ones. None: all.
            return_prefix_tokens: Whether each entry is a pair of patches and prefix tokens.
            norm: Whether the final norm is applied to each.
            stop_early: Whether blocks after the last requested one are skipped.
            output_fmt: "NCHW" for feature maps (batch, num_features, rows, columns), or "NLC" for
                (batch, patches, num_features).
            intermediates_only: Whether to return only the list, in the order of depth.
            output_dict: Whether to return a dictionary with "image_intermediates", perhaps
                "image_intermediates_prefix", and "image_features".

        Returns:
            A pair: what `forward_features` returns (of the last block that ran), and the list.

        Raises:
            InputError: A block does not exist, or `output_fmt` is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt = {output_fmt!r}: choose 'NCHW' or 'NLC'")
        ends = self.architecture.block_ends
        wanted, last = take_indices(len(ends), indices)
        found: list[Tensor] = []
        x, done = self.embed(x), 0
        for number in range(last + 1 if stop_early else len(ends)):
            x = self._stream(x, done, ends[number])
            done = ends[number]
            if number in wanted:
                found.append(
                    self._spread(self.normed(x), self.read_places)
                    if norm
                    else self._spread(x, self.stream_places)
                )
        prefix = self.num_prefix_tokens
        prefixes = [tokens[:, :prefix] for tokens in found]
        maps = [self._formatted(tokens[:, prefix:], output_fmt) for tokens in found]
        paired: Any = list(zip(maps, prefixes, strict=True))
        paired = paired if return_prefix_tokens and prefix and not output_dict else maps
        if intermediates_only and not output_dict:
            return paired
        result: dict[str, Any] = {"image_intermediates": paired}
        if return_prefix_tokens and prefix:
            result["image_intermediates_prefix"] = prefixes
        if intermediates_only:
            return result
        features = self._spread(self.normed(x), self.read_places)
        return result | {"image_features": features} if output_dict else (features, paired)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """The list of `forward_intermediates`, with the arguments of DINO's models.

        Args:
            x: Images, (batch, channels, height, width).
            n: Blocks, or the number of last ones.
            reshape: Whether to return feature maps (batch, num_features, rows, columns).
            return_prefix_tokens: Whether each entry is a pair of patches and prefix tokens.
            norm: Whether the final norm is applied to each.

        Returns:
            A list of (batch, patches, num_features), or as described above.
        """
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def features_of(self, pooled: Tensor) -> Tensor:
        """Pooled features at the width of the source model: (..., width) -> (..., features)."""
        if self.feature_writes is None:
            return pooled
        return pooled.new_zeros(*pooled.shape[:-1], self.head_hidden_size).index_copy(
            -1, self.feature_writes, pooled
        )

    def _stream(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """Run some steps on all tokens: (batch, tokens, embed) -> the same shape."""
        for step in list(self.steps)[start:end]:
            x = self.run_step(cast("Sequence[Branch]", step), x)
        return x

    def run_step(self, step: Sequence[Branch], x: Tensor, queries: int | None = None) -> Tensor:
        """Run a step; with `queries`, compute that many leading tokens only."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(_run, step, x, queries, use_reentrant=False)
            return result
        return _run(step, x, queries)

    def _spread(self, x: Tensor, places: Tensor | None) -> Tensor:
        if places is None:
            return x
        return x.new_zeros(*x.shape[:-1], self.num_features).index_copy(-1, places, x)

    def _formatted(self, patches: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == "NLC":
            return patches
        rows, columns = self.architecture.grid
        return patches.reshape(len(patches), rows, columns, -1).permute(0, 3, 1, 2).contiguous()

    # Changes in place.

    def get_classifier(self) -> Any:
        """The classifier; a pair with two classifiers, an identity without one."""
        head = nn.Identity() if self.head is None else self.head
        if self.architecture.pool.kind != "distilled":
            return head
        return head, nn.Identity() if self.head_dist is None else self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with random weights, and perhaps the pooling.

        The classifier reads the features that pruning kept. A hidden layer of the head and an
        activation of its output are removed.

        Args:
            num_classes: Number of logits. 0: the network returns features.
            global_pool: '', 'avg', 'avgmax', 'max', 'token', 'map' or 'prr'. None: unchanged.

        Raises:
            InputError: The pooling cannot be changed to that one.
        """
        old = self.architecture
        pool = old.pool if global_pool is None else self._new_pool(global_pool)
        head = HeadSpec(classes=num_classes) if num_classes else None
        update: dict[str, Any] = {"pool": pool, "head": head}
        if pool.kind != old.pool.kind:
            update |= {"feature_width": None, "feature_writes": None}
            places = old.read_places
            if pool.kind != "attention" and len(places) != old.source_width:
                update |= {"feature_width": old.source_width, "feature_writes": places}
        self._change(update)
        width = self.architecture.head_width
        self.pool = self.pool if pool.kind == "attention" else None
        self.refine = self.refine if pool.refine is not None else None
        self.pre_head = None
        self.head = self._new_linear(width, num_classes)
        two = self.architecture.classifiers == 2
        self.head_dist = self._new_linear(width, num_classes) if two else None

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the blocks after the last one of `indices`, as `features_only` of timm does.

        Args:
            indices: Blocks, negative ones from the end; or a number: the last ones.
            prune_norm: Whether to remove the final norm.
            prune_head: Whether to remove pooling and classifier.

        Returns:
            The blocks of `indices`, counted from the first.

        Raises:
            InputError: A block does not exist.
        """
        old = self.architecture
        wanted, last = take_indices(len(old.block_names), indices)
        end = old.block_ends[last]
        update: dict[str, Any] = {
            "steps": old.steps[:end],
            "blocks": old.block_names[: last + 1],
            "norm": None if prune_norm else old.norm,
            "pool_norm": None if prune_head else old.pool_norm,
        }
        if prune_head:
            update |= {"pool": PoolSpec(kind="none"), "head": None}
            update |= {"feature_width": None, "feature_writes": None}
        self._change(update)
        self.steps = self.steps[:end]
        self.norm = None if prune_norm else self.norm
        if prune_head:
            self.pool_norm = None
            self.reset_classifier(0, "")
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each sub-layer in the backward pass instead of keeping its values."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Refuse to change the image size in place.

        Raises:
            InputError: Always; `vitrim.resized` returns a network of another size.
        """
        del patch_size
        raise InputError(
            f"set_input_size({img_size}): a network has one image size; "
            "call vitrim.resized(model, size), which returns a new one"
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two dimensions that are not decayed: tokens, positions."""
        tables = ("bias.table", "differential.vectors")
        return {
            name
            for name, _ in self.named_parameters()
            if name in ("prefix", "position") or name.endswith(tables)
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by depth, for the layer decay of timm's optimizers."""
        del coarse
        matches: list[tuple[str, tuple[int, ...] | None]] = []
        start = 0
        for number, end in enumerate(self.architecture.block_ends):
            if end > start:
                steps = "|".join(str(step) for step in range(start, end))
                matches.append((rf"^steps\.(?:{steps})\.", (number,)))
            start = max(start, end)
        stem = r"^(?:prefix|position|stem|before|patch_norm|stem_norm)\b"
        return {"stem": stem, "blocks": [*matches, (r"^norm\b", _WITH_LAST_BLOCK)]}

    def _new_pool(self, global_pool: str) -> PoolSpec:
        old, current = self.architecture.pool, self.global_pool
        if global_pool == current:
            return old
        kind = _POOLS.get(global_pool)
        if kind is None or kind == "attention":
            raise InputError(
                f"global_pool = {global_pool!r}: attention pooling cannot be added; choose "
                "'', 'avg', 'avgmax', 'max' or 'token'"
                if global_pool in ("map", "prr")
                else f"global_pool = {global_pool!r}: choose one of {', '.join(map(repr, _POOLS))}"
            )
        if old.kind in ("distilled", "dense"):
            raise InputError(
                f"global_pool = {global_pool!r}: the two classifiers of this network read tokens "
                f"of their own; keep {current!r}"
            )
        if old.kind.endswith("_all") and kind not in ("token", "none"):
            kind += "_all"
        return PoolSpec(kind=cast("Any", kind))

    def _new_linear(self, width: int, classes: int) -> nn.Linear | None:
        if not classes:
            return None
        weight = self.stem.weight
        return nn.Linear(width, classes, device=weight.device, dtype=weight.dtype).train(
            self.training
        )

    def _change(self, update: dict[str, Any]) -> None:
        """Validate a changed architecture and take it over."""
        changed = self.architecture.model_copy(update=update)
        try:
            self.architecture = Architecture.model_validate(changed.model_dump(by_alias=True))
        except ValidationError as error:
            message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise InputError(f"model: {message}") from error
        self.index_features()

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


def _run(step: Sequence[Branch], x: Tensor, queries: int | None) -> Tensor:
    updates = [branch(x, queries) for branch in step]
    if queries is not None:
        x = x[:, :queries]
    for branch, y in zip(step, updates, strict=True):
        x = branch.add(x, y)
    return x


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Return the requested blocks counted from the first, and the last of them.

    Args:
        count: Number of blocks.
        indices: Blocks, negative ones from the end; or a number: the last ones. None: all.

    Raises:
        InputError: A block does not exist.
    """
    if indices is None or isinstance(indices, int):
        number = count if indices is None else indices
        if not 0 < number <= count:
            raise InputError(
                f"indices = {indices}: the model has {count} blocks, 1 to {count} work"
            )
        return list(range(count - number, count)), count - 1
    found = [count + index if index < 0 else index for index in indices]
    for index, place in zip(indices, found, strict=True):
        if not 0 <= place < count:
            raise InputError(
                f"indices: block {index} of {count}; they are counted from 0, "
                "negative ones from the end"
            )
    if not found:
        raise InputError("indices: empty; name at least one block")
    return found, max(found)
