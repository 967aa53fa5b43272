"""What a compact Vision Transformer looks like, as plain data: enough to rebuild the empty module
without its source library.

A network is a residual stream of `embed` channels that a stem fills and that *steps* add to. A step
is a group of *branches* reading the same stream: one branch for a serial sub-layer, several for
parallel ones. A branch reads some channels, normalises them, runs one core (attention or FFN), and
writes to some channels:

    x[writes] += layer_scale * post_norm(core(norm(x[reads])))

`reads` and `writes` are None when they mean the whole stream; index lists appear when masks are not
shared.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA = "vitrim.architecture/1"

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Indices = tuple[Count, ...]


class Plain(BaseModel):
    """Frozen plain data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NormSpec(Plain):
    """LayerNorm, RMSNorm or an affine map over the last dimension."""

    kind: Literal["layer", "rms"] = "layer"
    width: Width
    eps: Annotated[float, Field(ge=0)] = 1e-6
    weight: bool = True
    bias: bool = True


Activation = Literal[
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "relu",
    "relu6",
    "hardswish",
    "tanh",
    "sigmoid",
    "identity",
]


class ConvSpec(Plain):
    """One convolution of a stem that has several, with its activation."""

    channels: Width
    kernel: tuple[Width, Width]
    stride: tuple[Width, Width] = (1, 1)
    padding: tuple[Count, Count] = (0, 0)
    bias: bool = True
    act: Activation = "identity"


class StemSpec(Plain):
    """Patch embedding: perhaps some convolutions, then one whose outputs are the patches.

    `stride` None means the kernel, `patch`; `before` come first, and their channels are never cut.
    """

    kind: Literal["conv"] = "conv"
    patch: tuple[Width, Width]
    stride: tuple[Width, Width] | None = None
    padding: tuple[Count, Count] = (0, 0)
    bias: bool = True
    before: tuple[ConvSpec, ...] = ()

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns after each convolution, the patch grid last."""
        found = [(height, width)]
        for conv in self.before:
            found.append(_after(found[-1], conv.kernel, conv.stride, conv.padding))
        found.append(_after(found[-1], self.patch, self.stride or self.patch, self.padding))
        return found[1:]


def _after(
    side: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[int, int]:
    down, across = (
        (side[axis] + 2 * padding[axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1)
    )
    return down, across


class RopeGridSpec(Plain):
    """Where patches lie: a pair of columns with frequencies (f, g) turns by y(row) f + x(column) g;
    the frequencies are saved beside the table.

    y of row r of n rows (x alike): `index`: r + offset; `pixel`: from -1 to 1 in even steps;
    `centred`: 2 (r + 1/2 + offset) / d - 1, where d is n, or the `min` or `max` of rows and
    columns. `reference`: the grid whose coordinates are stretched over this one: r + offset, or the
    fraction, times reference / n.
    """

    kind: Literal["index", "pixel", "centred"] = "index"
    offset: float = 0.0
    over: Literal["separate", "min", "max"] = "separate"
    reference: tuple[Width, Width] | None = None


class RopeSpec(Plain):
    """Rotary position embedding of queries and keys, by a fixed table for the model's image size;
    `prefix` leading tokens are not turned.

    Columns turn in pairs: (0, 1), (2, 3)... when interleaved, (0, qk/2), (1, qk/2 + 1)... in
    halves. `per_head`: a table for each head. `at`: how the table follows from frequencies, which
    another image size needs; None: that is not known.
    """

    layout: Literal["interleaved", "half"] = "interleaved"
    tokens: Width
    prefix: Count = 0
    per_head: bool = False
    at: RopeGridSpec | None = None


class RelativeBiasSpec(Plain):
    """A bias added to q·k for each head and each offset between two patches: a table of (2h - 1)(2w
    - 1) rows.

    `prefix_rows`: three rows more, for class token to patch, patch to class token, and class token
    to itself (BEiT); without them a prefix token's bias is zero. `resize`, for another image size:
    learned tables are resampled; a bias that is a function of the offset alone is cropped; None:
    neither would be right.
    """

    grid: tuple[Width, Width]
    prefix: Count = 0
    prefix_rows: bool = False
    resize: Literal["resample", "crop"] | None = "resample"

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + (3 if self.prefix_rows else 0)


class DifferentialSpec(Plain):
    """Two attention maps a head, the second taken off the first times λ (Ye et al. 2024, eq. 1 and
    2).

    `start` is λ_init; λ = exp(λq1·λk1) - exp(λq2·λk2) + λ_init with vectors of `width`, or of two
    scalars when `dual`. The λ vectors are no columns of q or k, and are never cut.
    """

    start: float
    width: Width
    dual: bool = False


class AttentionSpec(Plain):
    """Multi-head self-attention with separate query/key and value widths.

    `scale` multiplies q·k before the softmax; it is stated here because pruning changes it in one
    convention and not in the other.
    """

    kind: Literal["attention"] = "attention"
    heads: Width
    qk: Width
    v: Width
    scale: float
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    out_bias: bool = True
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    # With one weight for all heads, or one a head (after heads kept different sets of columns).
    qk_norm_per_head: bool = False
    out_norm: NormSpec | None = None
    # Grouped queries: the key/value head of each head; None: each has its own.
    kv_of: tuple[Count, ...] | None = None
    # A gate sigmoid(x Wg) on what the heads give, before the output projection.
    gated: bool = False
    gate_bias: bool = True
    rope: RopeSpec | None = None
    bias: RelativeBiasSpec | None = None
    differential: DifferentialSpec | None = None
    # A norm over each head's values (differential attention), with one weight for all heads or one
    # a head.
    head_norm: NormSpec | None = None
    head_norm_per_head: bool = False

    @property
    def parts(self) -> int:
        """Query/key halves a head."""
        return 2 if self.differential else 1

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_of is None else max(self.kv_of) + 1

    @model_validator(mode="after")
    def _consistent(self) -> AttentionSpec:
        if self.kv_of is not None and (
            len(self.kv_of) != self.heads or set(self.kv_of) != set(range(self.kv_heads))
        ):
            raise ValueError(
                f"kv_of must name for each of {self.heads} heads one of the key/value heads, without a gap"
            )
        if self.kv_of is not None and self.differential is not None:
            raise ValueError("grouped queries and differential attention do not go together")
        if self.rope is not None and self.qk % 2:
            raise ValueError(f"rope turns pairs of columns, {self.qk} is odd")
        if self.rope is not None and self.differential is not None:
            raise ValueError("rope and differential attention do not go together")
        if self.bias is not None and self.bias.prefix_rows and self.bias.prefix != 1:
            raise ValueError(
                "a bias table with rows for the class token needs exactly one prefix token"
            )
        _check_norm("q_norm", self.q_norm, self.qk)
        _check_norm("k_norm", self.k_norm, self.qk)
        _check_norm("head_norm", self.head_norm, self.v)
        _check_norm("out_norm", self.out_norm, self.heads * self.v)
        return self


class FfnSpec(Plain):
    """Feed-forward sub-layer: act(x W1) W2, or act(x Wg) * (x W1) W2 when gated."""

    kind: Literal["ffn"] = "ffn"
    hidden: Width
    act: Activation = "gelu"
    gated: bool = False
    in_bias: bool = True
    gate_bias: bool = True
    out_bias: bool = True
    norm: NormSpec | None = None


class ConstantSpec(Plain):
    """What is left of a sub-layer that lost everything but its bias."""

    kind: Literal["constant"] = "constant"


Core = Annotated[AttentionSpec | FfnSpec | ConstantSpec, Field(discriminator="kind")]


class BranchSpec(Plain):
    """One sub-layer on the residual stream. `name` is its path in the source model."""

    name: str
    core: Core
    norm: NormSpec | None = None
    post_norm: NormSpec | None = None
    layer_scale: bool = False
    reads: Indices | None = None
    writes: Indices | None = None


class RefineSpec(Plain):
    """Self-attention without parameters among the pooled tokens (Locality-Attending ViT):
    `channels[i]` of them are head i's.
    """

    channels: tuple[Count, ...]
    scale: float


class PoolSpec(Plain):
    """How tokens become one feature vector.

    `token`: the class token; `mean`, `max`, `avgmax` (half the sum of both): of the patch tokens,
    or of all with `_all`; `token_mean`: the class token and the mean of the patches side by side;
    `distilled`: class and distillation token, each with a classifier, averaged; `dense`: the class
    token's logits plus half the largest logit that any patch gives (LV-ViT); `attention`: one
    learned query attends to the tokens (to the prefix too if `prefix`), then perhaps an FFN, on a
    stream of its own that is `width` wide; `refine` goes before a pooling of any kind.
    """

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
    ] = "token"
    attention: AttentionSpec | None = None
    norm: NormSpec | None = None
    ffn: FfnSpec | None = None
    width: Width | None = None
    prefix: bool = True
    refine: RefineSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PoolSpec:
        if (self.kind == "attention") != (self.attention is not None) or (
            self.kind == "attention"
        ) != (self.width is not None):
            raise ValueError("pool kind 'attention' and only that needs `attention` and `width`")
        attention = self.attention
        if attention is not None and (
            attention.q_norm
            or attention.kv_of
            or attention.rope
            or attention.bias
            or attention.differential
            or attention.gated
        ):
            raise ValueError("attention pooling takes plain attention")
        if self.width is not None:
            _check_norm("pool.norm", self.norm, self.width)
        return self


class HeadSpec(Plain):
    """Classifier: act(Linear(hidden_act(Linear(features)))), the inner one only where `hidden` is
    given.

    `distilled` pooling answers with the mean of the class and the distillation classifier, as in
    DeiT.
    """

    classes: Width
    bias: bool = True
    hidden: Width | None = None
    hidden_act: Activation = "tanh"
    act: Activation = "identity"


class Architecture(Plain):
    """A whole network. Shapes: images (batch, channels, height, width) -> logits (batch, classes),
    or features where there is no head.
    """

    schema_: Literal["vitrim.architecture/1"] = Field(
        default="vitrim.architecture/1", alias="schema"
    )
    image: tuple[Width, Width, Width]
    embed: Width
    stem: StemSpec
    prefix: Count = 1
    position: bool = True
    # How the positions follow another image size; None: they were resampled from a table that is
    # not kept.
    position_resize: Literal["bicubic", "bilinear"] | None = "bicubic"
    # Over each patch, before positions are added.
    patch_norm: NormSpec | None = None
    stem_norm: NormSpec | None = None
    # None: the stem (convolution, prefix tokens, positions) fills the whole stream; else only these
    # channels, the others start at zero.
    stem_writes: Indices | None = None
    steps: tuple[tuple[BranchSpec, ...], ...]
    norm: NormSpec | None = None
    pool: PoolSpec = PoolSpec()
    pool_norm: NormSpec | None = None
    head: HeadSpec | None = None
    # Without a head the features keep the width and the order of the source model; those that were
    # cut are zero. None: nothing was cut.
    feature_width: Width | None = None
    feature_writes: Indices | None = None
    # None: the head reads the whole stream.
    head_reads: Indices | None = None
    # Tokens that no later step can see are not computed in the last block: exact when the head
    # pools by prefix tokens.
    last_queries: bool = False

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.stem.sizes(*self.image[1:])[-1]

    @property
    def tokens(self) -> int:
        """Prefix tokens and patches."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def classes(self) -> int:
        """Width of the logits, or of the features where there is no head."""
        return self.head.classes if self.head is not None else self.feature_width or self.head_width

    @property
    def head_width(self) -> int:
        """Width of the pooled features."""
        if self.pool.width is not None:
            return self.pool.width
        return self.read_width(self.head_reads) * (2 if self.pool.kind == "token_mean" else 1)

    @property
    def classifiers(self) -> int:
        """Classifiers side by side."""
        return 0 if self.head is None else 2 if self.pool.kind in ("distilled", "dense") else 1

    @property
    def branches(self) -> tuple[BranchSpec, ...]:
        """All sub-layers in order."""
        return tuple(branch for step in self.steps for branch in step)

    @property
    def pooled_prefix(self) -> int:
        """Leading tokens that the head reads; 0 when it reads them all."""
        return (
            0
            if self.pool.refine is not None
            else {"token": 1, "distilled": 2}.get(self.pool.kind, 0)
        )

    def read_width(self, reads: Indices | None) -> int:
        """Channels seen through `reads`."""
        return self.embed if reads is None else len(reads)

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        side = self.image[1:]
        for number, grid in enumerate(self.stem.sizes(*side)):
            if min(grid) < 1:
                raise ValueError(
                    f"the image {side[0]} x {side[1]} is too small for convolution {number} of the stem"
                )
        needed = {"token": 1, "distilled": 2, "token_mean": 1, "dense": 1}.get(self.pool.kind, 0)
        if needed > self.prefix:
            raise ValueError(
                f"pool '{self.pool.kind}' needs {needed} prefix tokens, the stem has {self.prefix}"
            )
        names = [branch.name for branch in self.branches]
        if len(set(names)) != len(names):
            raise ValueError("two branches have the same name")
        for branch in self.branches:
            width, written = self.read_width(branch.reads), self.read_width(branch.writes)
            for label, indices in (("reads", branch.reads), ("writes", branch.writes)):
                _check_indices(f"{branch.name}.{label}", indices, self.embed)
            _check_norm(f"{branch.name}.norm", branch.norm, width)
            _check_norm(f"{branch.name}.post_norm", branch.post_norm, written)
            core = branch.core
            if isinstance(core, AttentionSpec):
                _check_positions(branch.name, core, self.grid, self.prefix)
            elif isinstance(core, FfnSpec):
                _check_norm(f"{branch.name}.core.norm", core.norm, core.hidden)
        _check_indices("head_reads", self.head_reads, self.embed)
        _check_indices("stem_writes", self.stem_writes, self.embed)
        _check_norm("stem_norm", self.stem_norm, self.read_width(self.stem_writes))
        _check_norm("patch_norm", self.patch_norm, self.read_width(self.stem_writes))
        _check_norm("norm", self.norm, self.read_width(self.head_reads))
        _check_norm("pool_norm", self.pool_norm, self.head_width)
        if self.pool.refine is not None and self.norm is None:
            raise ValueError("pool.refine needs the norm before it")
        if self.pool.refine is not None and sum(self.pool.refine.channels) != self.read_width(
            self.head_reads
        ):
            raise ValueError(
                f"pool.refine has {sum(self.pool.refine.channels)} channels, the head reads {self.read_width(self.head_reads)}"
            )
        if self.pool_norm is not None and self.pool.kind in ("distilled", "dense"):
            raise ValueError(f"pool '{self.pool.kind}' has no norm after pooling")
        if self.head is not None and (self.feature_width or self.feature_writes):
            raise ValueError("feature_width and feature_writes are for networks without a head")
        if (self.feature_width is None) != (self.feature_writes is None):
            raise ValueError("feature_width and feature_writes go together")
        if self.feature_writes is not None and self.feature_width is not None:
            _check_indices("feature_writes", self.feature_writes, self.feature_width)
            if len(self.feature_writes) != self.head_width:
                raise ValueError(
                    f"feature_writes names {len(self.feature_writes)} features, the network has {self.head_width}"
                )
        return self


def _check_positions(name: str, core: AttentionSpec, grid: tuple[int, int], prefix: int) -> None:
    rope, bias = core.rope, core.bias
    if rope is not None and (rope.tokens, rope.prefix) != (grid[0] * grid[1], prefix):
        raise ValueError(
            f"{name}.rope is for {rope.prefix} + {rope.tokens} tokens, the stem gives {prefix} + {grid[0] * grid[1]}"
        )
    if bias is not None and (bias.grid, bias.prefix) != (grid, prefix):
        raise ValueError(
            f"{name}.bias is for {bias.prefix} + {bias.grid} tokens, the stem gives {prefix} + {grid}"
        )


def _check_norm(where: str, norm: NormSpec | None, width: int) -> None:
    if norm is not None and norm.width != width:
        raise ValueError(f"{where} has width {norm.width}, it reads {width} channels")


def _check_indices(where: str, indices: Indices | None, width: int) -> None:
    if indices is None:
        return
    if not indices:
        raise ValueError(f"{where} is empty; leave the branch out instead")
    if list(indices) != sorted(set(indices)) or indices[-1] >= width:
        raise ValueError(f"{where} must be increasing indices below {width}")
