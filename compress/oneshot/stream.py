"""The residual stream of all calibration images, one step of the network at a time.

Only the stream at one depth is in memory, whatever the depth of the network: images x tokens x
embed numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from ..network.modules.layers import Ffn
from ..network.modules.model import CompactModel

BATCH = 16


@dataclass(frozen=True)
class Activations:
    """What one sub-layer computes on one batch.

    Attributes:
        stream: The stream that it reads, (batch, tokens, embed), of the tokens that it computes.
        inner: The input of its output projection, (batch, tokens, width).
        update: What it adds to the stream, (batch, tokens, written channels).
        qkv: Of an attention, queries, keys and values as they are multiplied; see
            `recorded_attention`.
        gate: Of a gated attention, the factors of the concatenated heads.
    """

    stream: Tensor
    inner: Tensor
    update: Tensor
    qkv: tuple[Tensor, Tensor, Tensor] | None = None
    gate: Tensor | None = None


Observer = Callable[[Branch, Activations], None]


class Stream:
    """The stream before step `position` of a network, for all images, in batches."""

    def __init__(self, model: CompactModel, images: Tensor, *, batch: int = BATCH) -> None:
        check_images(model, images)
        self.model = model
        self.position = 0
        self._counts = model.architecture.step_tokens(last_queries=False)
        with torch.no_grad():
            self.batches = [model.embed(part) for part in images.split(batch)]

    @property
    def step(self) -> Sequence[Branch]:
        """The branches that read this stream."""
        return cast("Sequence[Branch]", self.model.steps[self.position])

    @property
    def finished(self) -> bool:
        """Whether all steps have run."""
        return self.position == len(self.model.steps)

    @property
    def queries(self) -> int | None:
        """The number of leading tokens that the next step computes; None for all."""
        count = self._counts[self.position]
        return count if count < self.batches[0].shape[1] else None

    def advance(self, observe: Observer | None = None) -> None:
        """Run the next step on every batch.

        Args:
            observe: Called for every batch with each attention and feed-forward sub-layer and its
                activations, so that statistics need no pass of their own.
        """
        step, queries = self.step, self.queries
        with torch.no_grad():
            for number, x in enumerate(self.batches):
                if observe is None:
                    self.batches[number] = self.model.run_step(step, x, queries)
                    continue
                updates = []
                for branch in step:
                    if not has_output_projection(branch):
                        updates.append(branch(x, queries))
                        continue
                    found = activations(branch, x, queries)
                    observe(branch, found)
                    updates.append(found.update)
                x = x[:, :queries]
                for branch, y in zip(step, updates, strict=True):
                    x = branch.add(x, y)
                self.batches[number] = x
        self.position += 1

    def advance_from(self, inner: Sequence[Tensor]) -> None:
        """Run the next step, of one sub-layer, from the inputs of its output projection.

        Args:
            inner: These inputs for the first batches; for the others all of the step runs.
        """
        step, queries = self.step, self.queries
        branch = step[0]
        with torch.no_grad():
            for number, x in enumerate(self.batches):
                if number >= len(inner):
                    self.batches[number] = self.model.run_step(step, x, queries)
                    continue
                update = output_projection(branch)(inner[number])
                if branch.layer_scale is not None:
                    update = update * branch.layer_scale
                self.batches[number] = branch.add(x[:, :queries], update)
        self.position += 1

    def inner(self, branch: Branch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per batch: the stream, the input of the branch's output projection, and its update.

        All of the tokens that the branch computes.
        """
        queries = self.queries
        for x in self.batches:
            found = activations(branch, x, queries)
            yield x[:, :queries], found.inner, found.update


def activations(branch: Branch, x: Tensor, queries: int | None = None) -> Activations:
    """Run an attention or feed-forward sub-layer and record what it computes.

    Shapes: x (batch, tokens, embed). With `queries`, that many leading tokens are computed.
    """
    core = branch.core
    with torch.no_grad(), recorded_inputs(output_projection(branch)) as inputs:
        if not isinstance(core, Attention):
            update = branch(x, queries)
            return Activations(x[:, :queries], inputs[-1], update)
        with recorded_attention(core) as found, recorded_inputs(core.q) as read:
            update = branch(x, queries)
        gate = None if core.gate is None else core.gate(read[-1]).sigmoid()
    return Activations(x[:, :queries], inputs[-1], update, found[-1], gate)


def check_images(model: CompactModel, images: Tensor) -> None:
    """Validate calibration images.

    Raises:
        InputError: Not a float tensor of shape (images, *model.architecture.image), or no image.
    """
    wanted = model.architecture.image
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
        raise InputError(
            f"images: {tuple(images.shape)} {images.dtype}; give float images of shape "
            f"(images, {', '.join(map(str, wanted))}), normalized as the model expects"
        )
    if not len(images):
        raise InputError("images: there is none; give some hundred, without labels")


def output_projection(branch: Branch) -> nn.Linear:
    """The last linear layer of an attention or feed-forward sub-layer."""
    core = branch.core
    if isinstance(core, Attention):
        return core.out
    if isinstance(core, Ffn):
        return core.fc2
    raise TypeError(f"{branch.spec.name} has no output projection")


def has_output_projection(branch: Branch) -> bool:
    """Whether the branch is an attention or a feed-forward sub-layer."""
    return isinstance(branch.core, Attention | Ffn)


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a module while the context is open."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def recorded_attention(core: Attention) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect (q, k, v) as attention multiplies them, after norms and rope.

    Shapes: q (batch, heads * parts, tokens, qk), k likewise, v (batch, heads, tokens, v).
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    attend: Callable[..., Tensor] = core.attend

    def recording(q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> Tensor:
        found.append((q, k, v))
        return attend(q, k, v, *others, **named)

    core.attend = recording  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del core.attend


class Moments:
    """Mean and covariance of vectors that arrive in batches, summed in double precision.

    The mean of the first batch is subtracted from all vectors before they are multiplied:
    activations may have means far above their deviations, which single precision would lose.
    """

    def __init__(self, width: int, heads: int = 1) -> None:
        self.count = 0
        self._shift = torch.zeros(heads, 1, width)
        self._sum = torch.zeros(heads, width, dtype=torch.float64)
        self._products = torch.zeros(heads, width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add `rows`, (heads, vectors, width) or (vectors, width)."""
        rows = rows if rows.ndim == 3 else rows[None]
        if not self.count:
            self._shift = rows.mean(dim=1, keepdim=True)
        rows = rows - self._shift
        self.count += rows.shape[1]
        self._sum += rows.sum(dim=1, dtype=torch.float64).cpu()
        self._products += (rows.transpose(1, 2) @ rows).double().cpu()

    @property
    def mean(self) -> Tensor:
        """(heads, width)."""
        return self._shift[:, 0].double().cpu() + self._sum / self.count

    @property
    def second_moment(self) -> Tensor:
        """E[x xᵀ]: (heads, width, width)."""
        mean = self.mean
        return self.covariance + mean[:, :, None] * mean[:, None, :]

    @property
    def covariance(self) -> Tensor:
        """E[x xᵀ] - E[x] E[x]ᵀ: (heads, width, width)."""
        mean = self._sum / self.count
        return self._products / self.count - mean[:, :, None] * mean[:, None, :]
