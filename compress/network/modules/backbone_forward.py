"""The forward passes of timm's Vision Transformers: features, intermediate blocks, the head.

Features have the width of the source model: channels that pruning removed are zero, as in the
masked model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ....core.errors import InputError
from .backbone_facts import ROTATED, BackboneFacts
from .branch import Branch
from .layers import spread


class BackboneForward(BackboneFacts):
    """The forward passes that timm's users call."""

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

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the final norm.

        Args:
            x: Images, (batch, channels, height, width).

        Returns:
            (batch, tokens, num_features), patches row by row. With `last_queries` also the tokens
            that the head does not read are computed; patches that left the stream are zero.

        Raises:
            InputError: The residual stream is in another basis than that of the source model.
        """
        self._require_source_basis()
        x = self._spread(self.normed(self._stream(self.embed(x))), self.read_places)
        return self._to_grid(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returns.

        Args:
            x: (batch, tokens, num_features).
            pre_logits: Whether to return pooled features instead of logits.

        Returns:
            (batch, classes); or (batch, head_hidden_size) with `pre_logits` or without a
            classifier; or (batch, tokens, num_features) without pooling.

        Raises:
            InputError: The residual stream is in another basis than that of the source model.
        """
        self._require_source_basis()
        if self.architecture.drops_tokens:
            count = self.architecture.step_tokens(last_queries=False)[-1]
            x = x.index_select(1, self._token_places(count, x.device))
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
            InputError: A block does not exist, `output_fmt` is unknown, or the residual stream is
                in another basis than that of the source model.
        """
        self._require_source_basis()
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
                y, places = (self.normed(x), self.read_places) if norm else (x, self.stream_places)
                found.append(self._to_grid(self._spread(y, places)))
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
        features = self._to_grid(self._spread(self.normed(x), self.read_places))
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
        return spread(pooled, self.feature_writes, self.head_hidden_size)

    def _require_source_basis(self) -> None:
        if self.architecture.stream_rotated:
            raise InputError(f"tokens and features: {ROTATED}")
        self.architecture.require_no_selects("tokens and features by place")

    def _stream(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """Run some steps on all tokens that they carry: (batch, tokens, embed) -> (…, embed)."""
        counts = self.architecture.step_tokens(last_queries=False)
        for step, count in zip(list(self.steps)[start:end], counts[start:end], strict=True):
            x = self.run_step(cast("Sequence[Branch]", step), x, count)
        return x

    def _token_places(self, count: int, device: torch.device) -> Tensor:
        """The places of the first tokens of the stream among the learned ones and the grid."""
        return torch.tensor(self.architecture.token_places[:count], device=device)

    def _to_grid(self, x: Tensor) -> Tensor:
        """Put tokens in their places, with zeros for patches that left the stream."""
        architecture = self.architecture
        if not architecture.drops_tokens:
            return x
        rows, columns = architecture.grid
        count = architecture.source_tokens + rows * columns
        whole = x.new_zeros(len(x), count, x.shape[-1])
        return whole.index_copy(1, self._token_places(x.shape[1], x.device), x)

    def run_step(
        self,
        step: Sequence[Branch],
        x: Tensor,
        queries: int | None = None,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run a step.

        Args:
            step: Its branches.
            x: The stream, (batch, tokens, embed).
            queries: Compute at most that many leading tokens.
            keep: Factors (batch, tokens), 0 for keys that no attention reads.
            positions: Which tokens of the stem these are, (batch, tokens). None: the first ones.

        Returns:
            (batch, queries, embed).
        """
        if queries is not None and queries >= x.shape[1]:
            # No slices without effect in exported graphs.
            queries = None
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(
                _run, step, x, queries, keep, positions, use_reentrant=False
            )
            return result
        return _run(step, x, queries, keep, positions)

    def _spread(self, x: Tensor, places: Tensor | None) -> Tensor:
        return spread(x, places, self.num_features)

    def _formatted(self, patches: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == "NLC":
            return patches
        rows, columns = self.architecture.grid
        return patches.reshape(len(patches), rows, columns, -1).permute(0, 3, 1, 2).contiguous()


def _run(
    step: Sequence[Branch],
    x: Tensor,
    queries: int | None,
    keep: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    updates = [branch(x, queries, keep, positions) for branch in step]
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
