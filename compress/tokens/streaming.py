"""A network that runs step by step with the tokens that are kept so far, and its attention maps.

Tokens that have left are still computed, in their places, and no kept token reads them: the same
function as that of the compact network, without moving tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..masks.groups import token_sites
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from ..network.modules.relative_bias import RelativeBias
from ..network.modules.rope import Rope
from ..network.token_order import require_no_inner
from ..oneshot.stream import check_images, recorded_attention

# Largest number of attention weights of all steps, and of images, in one batch.
_MAP_NUMBERS, _BATCH = 2**25, 16
# Largest number of stream numbers that are kept instead of computed again: 0.5 GB.
_KEPT_NUMBERS = 2**27

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that reports nothing."""
    del stage, done, total


@dataclass(frozen=True)
class Attended:
    """What one attention computes on one batch.

    Attributes:
        read: The channels of the stream that it reads, before its norm, (batch, tokens, channels).
        maps: Attention weights, (batch, heads, queries, keys).
        values: (batch, heads, keys, v).
    """

    read: Tensor
    maps: Tensor
    values: Tensor


def working_copy(model: nn.Module) -> CompactModel:
    """A `CompactModel` in evaluation mode that may be changed, without gradients."""
    frozen = copy.deepcopy(lift(model)).eval().requires_grad_(False)
    frozen.architecture.require_no_selects("a choice of tokens by place")
    require_no_inner(frozen.architecture, "a choice of tokens by place")
    return frozen


def batches(model: CompactModel, images: Tensor) -> list[Tensor]:
    """Split validated images into batches whose attention maps fit into memory.

    Raises:
        InputError: The images do not fit the model, or there is none.
    """
    check_images(model, images)
    return list(images.split(batch_size(model)))


def batch_size(model: CompactModel) -> int:
    """The number of images whose attention maps of all steps are kept at once."""
    architecture = model.architecture
    heads = sum(getattr(branch.core, "heads", 0) for branch in architecture.branches)
    return max(1, min(_BATCH, _MAP_NUMBERS // max(1, heads * architecture.tokens**2)))


def require_images(images: Tensor | None, method: str) -> Tensor:
    """The images of a method that needs them.

    Raises:
        InputError: There are none; the message names the method.
    """
    if images is None:
        raise InputError(
            f"tokens = {method!r} needs images: give some hundred, without labels; only radial and "
            "random with a simple schedule need none"
        )
    return images


def attentions(model: CompactModel, number: int) -> list[tuple[Branch, Attention]]:
    """The attention sub-layers of a step."""
    step = cast("Sequence[Branch]", model.steps[number])
    return [(branch, branch.core) for branch in step if isinstance(branch.core, Attention)]


def run_step(
    model: CompactModel,
    number: int,
    x: Tensor,
    keep: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Run a step: (batch, tokens, embed) -> (batch, tokens after it, embed).

    Args:
        model: The network.
        number: The step.
        x: The stream.
        keep: Which of its tokens are keys, (tokens,) booleans; None: all.
        count: How many leading tokens are computed; None: as many as the network carries there.

    Returns:
        The stream after the step.
    """
    if count is None:
        count = list(token_sites(model.architecture).values())[number + 1]
    step = cast("Sequence[Branch]", model.steps[number])
    with _keys(model, number, x, keep):
        return model.run_step(step, x, count)


def observed_step(
    model: CompactModel,
    number: int,
    x: Tensor,
    keep: Tensor | None = None,
    count: int | None = None,
) -> tuple[Tensor, list[Attended]]:
    """Run a step as `run_step`, and return what its attentions compute.

    Args:
        model: The network.
        number: The step.
        x: The stream.
        keep: As for `run_step`.
        count: As for `run_step`.

    Returns:
        The stream after the step, and an entry for each attention of the step.
    """
    with _keys(model, number, x, keep), ExitStack() as stack:
        cores = [
            (branch, core, stack.enter_context(recorded_attention(core)))
            for branch, core in attentions(model, number)
        ]
        y = run_step(model, number, x, count=count)
        found = []
        for branch, core, recorded in cores:
            q, k, v = recorded[-1]
            read = x if branch.reads is None else x.index_select(-1, branch.reads)
            found.append(Attended(read, core.weights(q, k), v))
    return y, found


@contextmanager
def _keys(model: CompactModel, number: int, x: Tensor, keep: Tensor | None) -> Iterator[None]:
    with ExitStack() as stack:
        for _, core in attentions(model, number):
            stack.enter_context(_key_keep(core, x, keep))
        yield


@contextmanager
def _key_keep(core: Attention, x: Tensor, keep: Tensor | None) -> Iterator[None]:
    before = core.key_keep
    if keep is not None and not bool(keep[: x.shape[1]].all()):
        core.key_keep = keep[: x.shape[1]].to(x)
    try:
        yield
    finally:
        core.key_keep = before


@contextmanager
def position_tables(model: CompactModel, tokens: Tensor) -> Iterator[None]:
    """Let the attentions of a network read a stream that has some tokens only.

    Args:
        model: A working copy.
        tokens: The places of these tokens in the stream of the network, with all prefix tokens.

    Yields:
        Nothing; the tables of rope and relative bias are those of `tokens` in the context.
    """
    prefix = model.architecture.prefix
    patches = tokens[prefix:] - prefix
    restored: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        if isinstance(module, Rope):
            restored.append((module, "table", module.table))
            module.table = module.table.index_select(2, patches)
        elif isinstance(module, RelativeBias):
            restored.append((module, "index", module.index))
            module.index = module.index[tokens[:, None], tokens[None, :]]
    try:
        yield
    finally:
        for module, name, table in restored:
            setattr(module, name, table)


class DenseStreams:
    """The stream of all images before any step of a network, kept in memory where it is small."""

    def __init__(self, model: CompactModel, images: Tensor, numbers: Sequence[int]) -> None:
        self.model = model
        self.images = batches(model, images)
        architecture = model.architecture
        size = len(images) * architecture.tokens * architecture.embed * len(numbers)
        self._numbers = set(numbers) if size <= _KEPT_NUMBERS else set[int]()
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def before(self, number: int, batch: int) -> Tensor:
        """The stream of a batch before step `number`, (batch, tokens, embed)."""
        start = max((n for n in range(number + 1) if (n, batch) in self._kept), default=None)
        with torch.no_grad():
            if start is None:
                x, start = self.model.embed(self.images[batch]), 0
            else:
                x = self._kept[start, batch]
            for step in range(start, number):
                self._keep(step, batch, x)
                x = run_step(self.model, step, x)
        self._keep(number, batch, x)
        return x

    def _keep(self, number: int, batch: int, x: Tensor) -> None:
        if number in self._numbers:
            self._kept[number, batch] = x
