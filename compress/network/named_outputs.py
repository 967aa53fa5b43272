"""Named outputs of a network: logits, features, tokens, and the stream after a block.

| name | shape of an image | values |
|---|---|---|
| `logits` | (classes) | what the network returns |
| `features` | (width) | what the classifier reads, as timm's `forward_head(pre_logits=True)` |
| `tokens` | (tokens, width) | all tokens after the final norm, prefix tokens first |
| `patches` | (patches, width) | the same without the prefix tokens |
| `blocks.K` | (patches, width) | patch tokens of the stream after block K, counted from 0 |

A block's output is what timm's `forward_intermediates` returns without `norm`: no final norm, no
prefix tokens. Patches are in rows from the top left. Widths are those of the source model, with
zeros for the channels that were pruned.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ...core.errors import InputError
from .architecture import Architecture, Indices
from .modules.backbone_facts import ROTATED
from .modules.branch import Branch
from .modules.layers import spread
from .modules.model import CompactModel

LOGITS, FEATURES, TOKENS, PATCHES = "logits", "features", "tokens", "patches"
NAMES = (LOGITS, FEATURES, TOKENS, PATCHES)
BLOCK = "blocks."
Kind = Literal["logits", "features", "tokens", "patches", "block"]
_MEANINGS: dict[Kind, str] = {
    "logits": "one number a class",
    "features": "the pooled features that the classifier reads",
    "tokens": "all tokens after the final norm, {prefix} prefix tokens first",
    "patches": "patch tokens after the final norm, in rows from the top left",
    "block": "patch tokens of the residual stream after block {block}, before the final norm",
}


@dataclass(frozen=True)
class OutputSpec:
    """One named output of a network.

    Attributes:
        name: Its name.
        kind: What it is.
        shape: The shape for one image, without the batch.
        meaning: The same in words.
        grid: Rows and columns of the patches; None for logits, features and tokens.
        after: For a block, the number of steps after which the stream is read.
        writes: The channels of the output that the network computes; the others are zero. None:
            all.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    meaning: str
    grid: tuple[int, int] | None = None
    after: int | None = None
    writes: Indices | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it has for one image."""
        product = 1
        for size in self.shape:
            product *= size
        return product


def require_output_names(names: Sequence[str], where: str = "outputs") -> tuple[str, ...]:
    """Validate the names of requested outputs, as far as that needs no network.

    Args:
        names: The names.
        where: The option that contains them, for the message.

    Returns:
        The names, the logits first.

    Raises:
        InputError: There is none, one is unknown or occurs twice; the message names it.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: give a list of names, such as [{PATCHES!r}, '{BLOCK}8']")
    if not names:
        raise InputError(f"{where}: is empty; name an output, or leave it out for the logits")
    for name in names:
        _require_known(name, where)
        if list(names).count(name) > 1:
            raise InputError(f"{where}: {name!r} occurs twice; name each output once")
    return tuple(sorted(names, key=lambda name: name != LOGITS))


def _require_known(name: str, where: str) -> None:
    number = name.removeprefix(BLOCK)
    if name in NAMES:
        return
    if (
        name.startswith(BLOCK)
        and number.isascii()
        and number.isdigit()
        and str(int(number)) == number
    ):
        return
    listed = f"{', '.join(NAMES)} or {BLOCK}K for the stream after block K, from 0"
    digits = re.search(r"\d+", name)
    known = [*NAMES, *([f"{BLOCK}{int(digits[0])}"] if digits else [])]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"use {listed}"
    raise InputError(f"{where}: there is no output {name!r}; {hint}")


def output_specs(
    architecture: Architecture, names: Sequence[str], where: str = "outputs"
) -> tuple[OutputSpec, ...]:
    """Describe the requested outputs of a network.

    Args:
        architecture: The network.
        names: Names that `require_output_names` accepts.
        where: The option that contains them, for the message.

    Returns:
        One entry for each name.

    Raises:
        InputError: A block is outside of the network.
    """
    return tuple(_spec(architecture, name, where) for name in names)


def _spec(architecture: Architecture, name: str, where: str) -> OutputSpec:
    grid, prefix = architecture.grid, architecture.prefix
    patches = grid[0] * grid[1]
    if name in (LOGITS, FEATURES):
        if architecture.pool.kind == "none":
            raise InputError(
                f"{where}: the network pools no tokens and has no {name}; use {TOKENS} or {PATCHES}"
            )
        if name == LOGITS:
            return OutputSpec(name, "logits", (architecture.classes,), _MEANINGS["logits"])
        width = architecture.feature_width or architecture.head_width
        places = architecture.feature_writes
        if not architecture.has_source_features:
            raise InputError(f"{where}: {name}: {ROTATED}")
        return OutputSpec(name, "features", (width,), _MEANINGS["features"], writes=places)
    width = architecture.source_width
    if architecture.stream_rotated:
        raise InputError(f"{where}: {name}: {ROTATED}")
    if architecture.drops_tokens or architecture.selects:
        raise InputError(
            f"{where}: {name}: patches leave this network on the way, so it has no output for each "
            f"of them; use {LOGITS} or {FEATURES}, or a mask without tokens"
        )
    if name in (TOKENS, PATCHES):
        kind: Kind = "tokens" if name == TOKENS else "patches"
        rows = patches if kind == "patches" else prefix + patches
        text = _MEANINGS[kind].format(prefix=prefix)
        at = grid if kind == "patches" else None
        places = architecture.read_places
        writes = None if places == tuple(range(width)) else places
        return OutputSpec(name, kind, (rows, width), text, grid=at, writes=writes)
    block, ends = int(name.removeprefix(BLOCK)), architecture.block_ends
    if block >= len(ends):
        has = f"has blocks 0 to {len(ends) - 1}" if ends else "has no blocks"
        raise InputError(f"{where}: {name!r} is outside of the network, which {has}")
    text = _MEANINGS["block"].format(block=block)
    return OutputSpec(
        name,
        "block",
        (patches, width),
        text,
        grid=grid,
        after=ends[block],
        writes=architecture.stream_channels,
    )


def needs_all_tokens(architecture: Architecture, outputs: Iterable[OutputSpec]) -> bool:
    """Whether outputs need tokens after the last attention that the head does not read."""
    reduced = max(architecture.attention_steps(), default=0)
    return any(
        output.kind in ("tokens", "patches")
        or (output.after is not None and output.after > reduced)
        for output in outputs
    )


def steps_needed(architecture: Architecture, outputs: Iterable[OutputSpec]) -> int:
    """Return the number of steps that outputs depend on; no outputs are the logits alone."""
    ends = [len(architecture.steps) if output.after is None else output.after for output in outputs]
    return max(ends, default=len(architecture.steps))


class NamedOutputs(nn.Module):
    """A network that returns a tuple of named outputs.

    Images (batch, channels, height, width) -> one tensor (batch, *shape) for each of `outputs`.

    Args:
        model: The network; its weights are shared, not copied.
        names: Names of outputs, see the module.

    Raises:
        InputError: A block is outside of the network.
    """

    def __init__(self, model: CompactModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = output_specs(model.architecture, names)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs, in their order."""
        model, prefix = self.model, self.model.architecture.prefix
        stream, after = self._stream(images)
        pooled = model.architecture.pooled_prefix
        kinds = {output.kind for output in self.outputs}
        tokens = read = stream
        if kinds == {"block"}:
            pass
        elif kinds & {"tokens", "patches"}:
            tokens = model.normed(stream)
            read = tokens[:, :pooled] if pooled else tokens
        else:
            tokens = read = model.normed(stream[:, :pooled] if pooled else stream)
        found = []
        for output in self.outputs:
            if output.kind == "logits":
                found.append(model.logits(read))
            elif output.kind == "features":
                found.append(model.features_of(model.pooled(read)))
            elif output.kind == "block":
                assert output.after is not None
                x = after[output.after][:, prefix:]
                found.append(spread(x, model.stream_places, output.shape[-1]))
            else:
                first = prefix if output.kind == "patches" else 0
                found.append(spread(tokens[:, first:], model.read_places, output.shape[-1]))
        return tuple(found)

    def _stream(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The stream after the last step, and after each number of steps that an output needs."""
        model, architecture = self.model, self.model.architecture
        if architecture.selects:
            # No output by place is left, so only the last step counts.
            return model.features(images), {}
        wanted = {output.after for output in self.outputs}
        shorter = architecture.last_queries and not needs_all_tokens(architecture, self.outputs)
        counts = architecture.step_tokens(last_queries=shorter)
        x = model.embed(images)
        after = {0: x}
        steps = list(cast("Iterable[Sequence[Branch]]", model.steps))
        for number, step in enumerate(steps[: steps_needed(architecture, self.outputs)]):
            x = model.run_step(step, x, counts[number])
            if number + 1 in wanted:
                after[number + 1] = x
        return x, after
