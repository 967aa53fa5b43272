"""The file format of a saved network: what `architecture.json` contains.

An `Architecture` is plain data, enough to rebuild the empty module without its source library. A
network is a residual stream of `embed` channels that a stem fills and that *steps* add to. A step
is a group of *branches* that read the same stream: one branch for a serial sub-layer, several for
parallel ones. A branch reads some channels, normalizes them, runs one core (attention or FFN), and
adds to some channels:

    x[writes] += layer_scale * post_norm(core(norm(x[reads])))

`reads` and `writes` are None for the whole stream; index lists occur when masks are not shared.

Tokens leave the stream in *prefix form*: `order` sorts the patches once so that those that stay
longest come first, and a branch with `tokens` computes only that many leading tokens, which are all
that the stream carries afterwards. Its attention still reads the keys of all incoming tokens.
Learned tokens that leave before the last patch stand between the patches (`inner`).
*Selections* between steps drop patches that they choose for each image.

The JSON schema in `architecture.schema.json` is for readers and writers without this package.
`python -m vitrim.compress.network.architecture` regenerates it after a change of the specs; a test
checks that file and code agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ...core.errors import InputError
from ...core.storage import replace_file
from .architecture_checks import (
    check_blocks,
    check_learned,
    check_order,
    check_output,
    check_positions,
    check_tokens,
    least_tokens,
    pinned_tokens,
)
from .branch_specs import (
    Activation,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    Core,
    Count,
    DifferentialSpec,
    FfnSpec,
    Indices,
    NormSpec,
    Order,
    RelativeBiasSpec,
    RopeGridSpec,
    RopeSpec,
    Spec,
    Width,
    check_indices,
    check_norm,
)
from .select_specs import PredictorSpec, SelectSpec, check_selects, selected_tokens
from .stem_and_head_specs import (
    ConvSpec,
    DataSpec,
    HeadSpec,
    PoolSpec,
    RefineSpec,
    SoftSplitSpec,
    StemSpec,
)
from .token_order import token_places

__all__ = [
    "SCHEMA",
    "SCHEMA_FILE",
    "Activation",
    "Architecture",
    "AttentionSpec",
    "BranchSpec",
    "ConstantSpec",
    "ConvSpec",
    "Core",
    "Count",
    "DataSpec",
    "DifferentialSpec",
    "FfnSpec",
    "HeadSpec",
    "Indices",
    "NormSpec",
    "Order",
    "PoolSpec",
    "PredictorSpec",
    "RefineSpec",
    "RelativeBiasSpec",
    "RopeGridSpec",
    "RopeSpec",
    "SelectSpec",
    "SoftSplitSpec",
    "StemSpec",
    "Width",
    "least_tokens",
    "schema_text",
]

SCHEMA = "vitrim.architecture/1"
SCHEMA_FILE = Path(__file__).with_name("architecture.schema.json")


class Architecture(Spec):
    """A whole network.

    Images (batch, channels, height, width) -> logits (batch, classes), or features (batch, width)
    without a head, or (batch, tokens, width) without pooling.
    """

    schema_: Literal["vitrim.architecture/1"] = Field(
        default="vitrim.architecture/1", alias="schema"
    )
    """Name and version of the file format."""
    image: tuple[Width, Width, Width]
    """Channels, height and width of the input, in pixels."""
    embed: Width
    """Number of channels of the residual stream."""
    stem: StemSpec
    """Patch embedding."""
    prefix: Count = 1
    """Number of learned tokens before the patches: class, distillation and register tokens."""
    inner: Indices | None = None
    """Places in the stream of further learned tokens, between or behind the patches, which leave
    before the head and before a selection. None: there are none."""
    learned: Order | None = None
    """Which learned tokens of the source model these are, the inner ones last. None: all."""
    source_prefix: Count | None = None
    """Number of learned tokens of the source model. None: none has left or moved."""
    position: bool = True
    """Whether a learned vector per patch is added to the patches."""
    position_resize: Literal["bicubic", "bilinear"] | None = "bicubic"
    """How the position vectors are resampled for another image size. None: they are themselves
    resampled from a table that is not kept."""
    patch_norm: NormSpec | None = None
    """Norm over each patch, before positions are added."""
    stem_norm: NormSpec | None = None
    """Norm over each token, after positions and prefix tokens."""
    stem_writes: Indices | None = None
    """Stream channels that the stem (projection, prefix tokens, positions) fills; the others start
    at zero. None: all."""
    order: Order | None = None
    """Places in the grid (row by row from the top left) of the patches that the stem embeds, in the
    order in which they follow the prefix tokens. Other patches are never embedded. None: all
    patches, row by row."""
    tokens_resampled: bool = False
    """Whether `order` and the numbers of tokens were resampled from those of another image size,
    which is approximate."""
    steps: tuple[tuple[BranchSpec, ...], ...]
    """Groups of parallel branches, in order."""
    selects: tuple[SelectSpec, ...] = ()
    """Selections of patches by content, in order, between the steps."""
    blocks: tuple[str, ...] | None = None
    """Paths of the blocks of the source model, in order; those that pruning emptied stay in the
    list. The names of a block's branches begin with its path and a dot. None: the path of a branch
    ends at its first number."""
    norm: NormSpec | None = None
    """Norm over each token, before pooling."""
    pool: PoolSpec = PoolSpec()
    """How tokens become one feature vector."""
    pool_norm: NormSpec | None = None
    """Norm over the pooled features."""
    head: HeadSpec | None = None
    """Classifier. None: the network returns features."""
    feature_width: Width | None = None
    """Number of pooled features of the source model. None: none was pruned."""
    feature_writes: Indices | None = None
    """Which of these features the network computes; the others are zero. A classifier reads the
    computed ones only."""
    stream_width: Width | None = None
    """Number of channels of the residual stream of the source model. None: none was pruned."""
    stream_channels: Indices | None = None
    """Which of these channels the residual stream still has; the others are zero."""
    stream_rotated: bool = False
    """Whether the residual stream is in another basis than that of the source model."""
    head_reads: Indices | None = None
    """Stream channels that `norm` and pooling read. None: all."""
    last_queries: bool = False
    """Whether the step with the last attention, and what follows, computes only the tokens that the
    head reads. Exact; without effect unless the head pools by prefix tokens. The same as `tokens`
    of these branches."""
    data: DataSpec | None = None
    """How the source model expects images to be prepared. None: unknown."""

    model_config = ConfigDict(populate_by_name=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.stem.sizes(*self.image[1:])[-1]

    @property
    def patches(self) -> int:
        """Number of patches that the stem embeds."""
        return self.grid[0] * self.grid[1] if self.order is None else len(self.order)

    @property
    def learned_tokens(self) -> int:
        """Number of learned tokens: those of the prefix and the inner ones."""
        return self.prefix + len(self.inner or ())

    @property
    def tokens(self) -> int:
        """Number of learned tokens and patches that the stem returns."""
        return self.learned_tokens + self.patches

    def step_tokens(
        self, last_queries: bool | None = None, removed: Collection[str] = ()
    ) -> tuple[int, ...]:
        """Number of tokens that each step computes, before a selection behind it.

        Args:
            last_queries: Replaces the field of that name. None: the field.
            removed: Names of branches that do not count as the last attention.

        Returns:
            One number for each step, non-increasing.
        """
        counts: list[int] = []
        current = self.tokens
        for number, step in enumerate(self.steps):
            current = selected_tokens(self, number, current)
            current = min([current, *(branch.tokens for branch in step if branch.tokens)])
            counts.append(current)
        shorter = self.last_queries if last_queries is None else last_queries
        if shorter and self.pooled_prefix:
            last = max(self.attention_steps(removed), default=0)
            counts[last:] = [self.pooled_prefix] * len(counts[last:])
        return tuple(counts)

    def step_inputs(
        self, last_queries: bool | None = None, removed: Collection[str] = ()
    ) -> tuple[int, ...]:
        """Number of tokens that each step reads; the arguments are those of `step_tokens`."""
        before = (self.tokens, *self.step_tokens(last_queries, removed))
        return tuple(
            selected_tokens(self, number, before[number]) for number in range(len(self.steps))
        )

    def attention_steps(self, removed: Collection[str] = ()) -> tuple[int, ...]:
        """Numbers of the steps with an attention that is not in `removed`."""
        return tuple(
            number
            for number, step in enumerate(self.steps)
            if any(
                isinstance(branch.core, AttentionSpec) and branch.name not in removed
                for branch in step
            )
        )

    @property
    def final_tokens(self) -> int:
        """Number of tokens that the head gets."""
        last = (self.tokens, *self.step_tokens())[-1]
        return int(selected_tokens(self, len(self.steps), last))

    @property
    def token_places(self) -> tuple[int, ...]:
        """For each token behind the stem its place at the source: learned tokens, whole grid."""
        return token_places(self)

    def places_in(self, source: Architecture) -> tuple[int, ...] | None:
        """For each token behind the stem its place in the stream of `source`.

        None: a token is not there.
        """
        known = {place: number for number, place in enumerate(source.token_places)}
        found = tuple(known.get(place, -1) for place in self.token_places)
        return None if -1 in found else found

    @property
    def source_tokens(self) -> int:
        """Number of learned tokens of the source model."""
        return self.prefix if self.source_prefix is None else self.source_prefix

    def require_no_selects(self, purpose: str) -> None:
        """Raise InputError if patches are selected by content, which `purpose` cannot do."""
        if self.selects:
            raise InputError(
                f"{purpose}: this network selects patches for each image ({self.selects[0].name}); "
                "do it before the selection is added"
            )

    @property
    def drops_tokens(self) -> bool:
        """Whether tokens are reordered or leave the stream before its end."""
        moved = self.order is not None or self.source_prefix is not None
        return moved or any(branch.tokens for branch in self.branches)

    @property
    def classes(self) -> int:
        """Width of the output: of the logits, or of the features if there is no head."""
        return self.head.classes if self.head is not None else self.feature_width or self.head_width

    @property
    def head_width(self) -> int:
        """Width of the pooled features."""
        if self.pool.width is not None:
            return self.pool.width
        return self.read_width(self.head_reads) * (2 if self.pool.kind == "token_mean" else 1)

    @property
    def classifiers(self) -> int:
        """Number of parallel classifiers."""
        return 0 if self.head is None else 2 if self.pool.kind in ("distilled", "dense") else 1

    @property
    def branches(self) -> tuple[BranchSpec, ...]:
        """All sub-layers in order."""
        return tuple(branch for step in self.steps for branch in step)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Paths of the blocks of the source model, in order."""
        if self.blocks is not None:
            return self.blocks
        return tuple(dict.fromkeys(_block_of(branch.name) for branch in self.branches))

    @property
    def block_ends(self) -> tuple[int, ...]:
        """The number of steps that have run when each block has ended."""
        ends: list[int] = []
        number, steps = 0, self.steps
        for name in self.block_names:
            # A step belongs to one block; an empty block ends with the block before it.
            while number < len(steps) and steps[number][0].name.startswith(f"{name}."):
                number += 1
            ends.append(number)
        return tuple(ends)

    @property
    def source_width(self) -> int:
        """Number of channels of the residual stream of the source model."""
        return self.stream_width or self.embed

    @property
    def has_source_features(self) -> bool:
        """Whether the pooled features are those of the source model, in its basis."""
        return not self.stream_rotated or self.pool.kind == "attention"

    @property
    def read_places(self) -> Indices:
        """For each channel that the head reads, its channel in the source model."""
        places = self.stream_channels or tuple(range(self.embed))
        return (
            places
            if self.head_reads is None
            else tuple(places[channel] for channel in self.head_reads)
        )

    @property
    def pooled_prefix(self) -> int:
        """Number of leading tokens that the head reads; 0 if it reads all."""
        if self.pool.refine is not None:
            return 0
        return {"token": 1, "distilled": 2}.get(self.pool.kind, 0)

    def read_width(self, reads: Indices | None) -> int:
        """Number of channels that `reads` selects."""
        return self.embed if reads is None else len(reads)

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        self._check_input()
        self._check_branches()
        check_output(self)
        return self

    def _check_input(self) -> None:
        side = self.image[1:]
        for number, grid in enumerate(self.stem.sizes(*side)):
            if min(grid) < 1:
                raise ValueError(
                    f"the image {side[0]} x {side[1]} is too small for convolution {number} "
                    "of the stem"
                )
        self.stem.check_widths(self.image[0])
        needed = pinned_tokens(self)
        if needed > self.prefix:
            raise ValueError(
                f"pool '{self.pool.kind}' needs {needed} prefix tokens, the stem has {self.prefix}"
            )
        if (self.stream_width is None) != (self.stream_channels is None):
            raise ValueError("stream_width and stream_channels need each other")
        if self.stream_channels is not None and self.stream_width is not None:
            check_indices("stream_channels", self.stream_channels, self.stream_width)
            if len(self.stream_channels) != self.embed:
                raise ValueError(
                    f"stream_channels names {len(self.stream_channels)} channels, "
                    f"the stream has {self.embed}"
                )
        if self.stream_rotated and self.head is None and not self.has_source_features:
            raise ValueError("a network with stream_rotated needs a head or attention pooling")
        if self.data is not None and len(self.data.mean) != self.image[0]:
            raise ValueError(
                f"data.mean has {len(self.data.mean)} numbers, images have {self.image[0]} channels"
            )
        check_order(self)
        check_learned(self)
        check_indices("stem_writes", self.stem_writes, self.embed)
        check_norm("stem_norm", self.stem_norm, self.read_width(self.stem_writes))
        check_norm("patch_norm", self.patch_norm, self.read_width(self.stem_writes))

    def _check_branches(self) -> None:
        check_tokens(self)
        names = [branch.name for branch in self.branches]
        if len(set(names)) != len(names):
            raise ValueError("two branches have the same name")
        check_blocks(self)
        check_selects(self)
        for branch in self.branches:
            for label, indices in (("reads", branch.reads), ("writes", branch.writes)):
                check_indices(f"{branch.name}.{label}", indices, self.embed)
            check_norm(f"{branch.name}.norm", branch.norm, self.read_width(branch.reads))
            check_norm(f"{branch.name}.post_norm", branch.post_norm, self.read_width(branch.writes))
            core = branch.core
            if isinstance(core, AttentionSpec):
                check_positions(branch.name, core, self)
            elif isinstance(core, FfnSpec):
                check_norm(f"{branch.name}.core.norm", core.norm, core.hidden)


def _block_of(branch: str) -> str:
    """The path of the block of a branch: up to its first part that ends in a number."""
    found = re.match(r"(?:[^.]+\.)*?[^.]*\d(?=\.)", branch)
    return branch.rpartition(".")[0] if found is None else found[0]


def schema_text() -> str:
    """JSON schema (draft 2020-12) of `architecture.json`, as `architecture.schema.json` has it."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        **Architecture.model_json_schema(by_alias=True, mode="validation"),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    replace_file(SCHEMA_FILE, schema_text())
