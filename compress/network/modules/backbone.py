"""The interface of timm's Vision Transformers, with timm's meanings, for a network of plain data.

Detectors, segmenters and training scripts that are written for timm take a pruned network in place
of the dense one. This module has the methods that change a network in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from ....core.errors import InputError
from ..architecture import Architecture, HeadSpec, PoolSpec
from .backbone_facts import POOLS
from .backbone_forward import BackboneForward, take_indices

# Layer decay numbers the final norm like the last block.
_WITH_LAST_BLOCK = (99999,)


class Backbone(BackboneForward):
    """Base class of `CompactModel` with timm's methods and properties."""

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
        old.require_no_selects("prune_intermediate_layers")
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
                for place, select in enumerate(self.architecture.selects):
                    if start <= select.at < end:
                        matches.append((rf"^selects\.{place}\.", (number,)))
            start = max(start, end)
        stem = r"^(?:prefix|position|stem|before|patch_norm|stem_norm)\b"
        return {"stem": stem, "blocks": [*matches, (r"^norm\b", _WITH_LAST_BLOCK)]}

    def _new_pool(self, global_pool: str) -> PoolSpec:
        old, current = self.architecture.pool, self.global_pool
        if global_pool == current:
            return old
        kind = POOLS.get(global_pool)
        if kind is None or kind == "attention":
            raise InputError(
                f"global_pool = {global_pool!r}: attention pooling cannot be added; choose "
                "'', 'avg', 'avgmax', 'max' or 'token'"
                if global_pool in ("map", "prr")
                else f"global_pool = {global_pool!r}: choose one of {', '.join(map(repr, POOLS))}"
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
