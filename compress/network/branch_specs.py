"""The plain data of one sub-layer: norm, attention, feed-forward layer, and the branch around them.

Part of the file format that `architecture.py` documents.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Indices = tuple[Count, ...]
# A permutation of some patches of the grid; not increasing, unlike `Indices`.
Order = tuple[Count, ...]

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


class Spec(BaseModel):
    """Frozen plain data; unknown keys, NaN and infinity are rejected."""

    # The strings below the fields become the descriptions in the JSON schema.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class NormSpec(Spec):
    """Normalization over the last dimension."""

    kind: Literal["layer", "rms"] = "layer"
    """LayerNorm (mean and variance) or RMSNorm (root mean square only)."""
    width: Width
    """Number of channels that are normalized."""
    eps: Annotated[float, Field(ge=0)] = 1e-6
    """Added to the variance or mean square."""
    weight: bool = True
    """Whether there is a scale per channel."""
    bias: bool = True
    """Whether there is an offset per channel."""


class RopeGridSpec(Spec):
    """Coordinates of the patches from which a rotary table is computed.

    A pair of columns with frequencies (f, g) is rotated by y(row) f + x(column) g radians. The
    frequencies are saved beside the table.
    """

    kind: Literal["index", "pixel", "centred"] = "index"
    """y of row r of n rows (x likewise): `index`: r + offset; `pixel`: n even steps from -1 to 1;
    `centred`: 2 (r + 1/2 + offset) / d - 1, where `over` defines d."""
    offset: float = 0.0
    """Shift of the coordinates, in patches."""
    over: Literal["separate", "min", "max"] = "separate"
    """The divisor d of `centred`: `separate`: n; `min` or `max`: that of rows and columns."""
    reference: tuple[Width, Width] | None = None
    """Rows and columns of a grid whose coordinates are stretched over this one: r + offset (or the
    fraction, if centred) is multiplied by reference / n. None: no stretching."""


class RopeSpec(Spec):
    """Rotary position embedding of queries and keys, a fixed table for one image size.

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", eq. 34.
    """

    layout: Literal["interleaved", "half"] = "interleaved"
    """Pairs of columns: `interleaved`: (0, 1), (2, 3)...; `half`: (0, qk/2), (1, qk/2 + 1)..."""
    tokens: Width
    """Number of tokens in the table: patches, and learned tokens between them with the angle 0."""
    prefix: Count = 0
    """Number of leading tokens that are not rotated."""
    per_head: bool = False
    """Whether each head has a table of its own."""
    at: RopeGridSpec | None = None
    """How the table follows from frequencies, which another image size needs. None: unknown."""


class RelativeBiasSpec(Spec):
    """A bias per head and offset between two patches, added to the attention scores.

    The table has (2 rows - 1) (2 columns - 1) entries per head, and three more with `prefix_rows`.
    Liu et al. 2021, "Swin Transformer", eq. 4; Bao et al. 2021, "BEiT".
    """

    grid: tuple[Width, Width]
    """Rows and columns of patches."""
    prefix: Count = 0
    """Number of prefix tokens."""
    prefix_rows: bool = False
    """Whether the table has entries for class token to patch, patch to class token, and class token
    to itself, as in BEiT. Without them the bias of a prefix token is zero."""
    resize: Literal["resample", "crop"] | None = "resample"
    """How the table follows another image size: `resample` for learned tables, `crop` for a
    function of the offset alone. None: neither is exact."""
    order: Order | None = None
    """Places in the grid of the patches of the stream, in its order. None: all, row by row."""
    inner: Indices | None = None
    """Places in the stream of learned tokens between the patches. None: there are none."""

    @property
    def learned(self) -> int:
        """Number of learned tokens of the stream."""
        return self.prefix + len(self.inner or ())

    @property
    def rows(self) -> int:
        """Entries of the table per head."""
        return (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + (3 if self.prefix_rows else 0)


class DifferentialSpec(Spec):
    """Two attention maps per head, the second subtracted from the first with the factor λ.

    λ = exp(λq1·λk1) - exp(λq2·λk2) + λ_init. The λ vectors are not columns of q or k, and pruning
    never changes them. Ye et al. 2024, "Differential Transformer", eq. 1 and 2.
    """

    start: float
    """λ_init."""
    width: Width
    """Length of each λ vector."""
    dual: bool = False
    """Whether two scalars take the place of the products of λ vectors."""


class AttentionSpec(Spec):
    """Multi-head self-attention with separate query/key and value widths."""

    kind: Literal["attention"] = "attention"
    """Distinguishes this core from the others."""
    heads: Width
    """Number of query heads."""
    qk: Width
    """Width of a query and of a key, per head."""
    v: Width
    """Width of a value, per head."""
    scale: float
    """Multiplies q·k before the softmax. Not derived from `qk`, which pruning changes."""
    q_bias: bool = True
    """Whether the query projection has a bias."""
    k_bias: bool = True
    """Whether the key projection has a bias."""
    v_bias: bool = True
    """Whether the value projection has a bias."""
    out_bias: bool = True
    """Whether the output projection has a bias."""
    q_norm: NormSpec | None = None
    """Norm over the columns of each query head."""
    k_norm: NormSpec | None = None
    """Norm over the columns of each key head."""
    qk_norm_per_head: bool = False
    """Whether each head has its own weight in `q_norm` and `k_norm`, as after heads kept different
    columns. False: all heads share one."""
    out_norm: NormSpec | None = None
    """Norm over the concatenated heads, before the output projection."""
    kv_of: tuple[Count, ...] | None = None
    """Grouped queries: the key/value head of each query head. None: each has its own."""
    gated: bool = False
    """Whether the concatenated heads are multiplied by sigmoid(x Wg)."""
    gate_bias: bool = True
    """Whether that gate has a bias."""
    rope: RopeSpec | None = None
    """Rotary position embedding."""
    bias: RelativeBiasSpec | None = None
    """Relative position bias."""
    differential: DifferentialSpec | None = None
    """Differential attention; q and k then have 2 x `heads` heads."""
    head_norm: NormSpec | None = None
    """Norm over each head's output (differential attention)."""
    head_norm_per_head: bool = False
    """Whether each head has its own weight in `head_norm`."""

    @property
    def parts(self) -> int:
        """Query/key vectors per head: 2 in differential attention, else 1."""
        return 2 if self.differential else 1

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.heads if self.kv_of is None else max(self.kv_of) + 1

    @model_validator(mode="after")
    def _consistent(self) -> AttentionSpec:
        if self.kv_of is not None and (
            len(self.kv_of) != self.heads or set(self.kv_of) != set(range(self.kv_heads))
        ):
            raise ValueError(
                f"kv_of must name for each of {self.heads} heads one of the key/value heads, "
                "without a gap"
            )
        if self.kv_of is not None and self.differential is not None:
            raise ValueError("grouped queries cannot be combined with differential attention")
        if self.rope is not None and self.qk % 2:
            raise ValueError(f"rope rotates pairs of columns, {self.qk} is odd")
        if self.rope is not None and self.differential is not None:
            raise ValueError("rope cannot be combined with differential attention")
        if self.bias is not None and self.bias.prefix_rows and self.bias.learned > 1:
            raise ValueError(
                "a bias table with rows for the class token allows no other learned token"
            )
        check_norm("q_norm", self.q_norm, self.qk)
        check_norm("k_norm", self.k_norm, self.qk)
        check_norm("head_norm", self.head_norm, self.v)
        check_norm("out_norm", self.out_norm, self.heads * self.v)
        return self


class FfnSpec(Spec):
    """Feed-forward sub-layer: act(x W1) W2, or (act(x Wg) * (x W1)) W2 when gated."""

    kind: Literal["ffn"] = "ffn"
    """Distinguishes this core from the others."""
    hidden: Width
    """Number of hidden units."""
    act: Activation = "gelu"
    """Activation function."""
    gated: bool = False
    """Whether there is a gate projection Wg (SwiGLU and similar)."""
    in_bias: bool = True
    """Whether W1 has a bias."""
    gate_bias: bool = True
    """Whether Wg has a bias."""
    out_bias: bool = True
    """Whether W2 has a bias."""
    norm: NormSpec | None = None
    """Norm over the hidden units, before W2."""


class ConstantSpec(Spec):
    """The remainder of a sub-layer of which pruning left only the bias."""

    kind: Literal["constant"] = "constant"
    """Distinguishes this core from the others."""


Core = Annotated[AttentionSpec | FfnSpec | ConstantSpec, Field(discriminator="kind")]


class BranchSpec(Spec):
    """One sub-layer on the residual stream."""

    name: str
    """Path of the sub-layer in the source model; unique in the network."""
    core: Core
    """What the branch computes between its norms."""
    norm: NormSpec | None = None
    """Norm before the core."""
    post_norm: NormSpec | None = None
    """Norm after the core."""
    layer_scale: bool = False
    """Whether the output is multiplied by a learned factor per channel."""
    reads: Indices | None = None
    """Stream channels that the branch reads, increasing. None: all."""
    writes: Indices | None = None
    """Stream channels that the branch adds to, increasing. None: all."""
    tokens: Width | None = None
    """Number of leading tokens that the branch computes and that the stream carries after it;
    attention still reads the keys of all that came in. None: all that came in."""

    @property
    def reads_positions(self) -> bool:
        """Whether its scores depend on the places of tokens: rope, or a relative bias."""
        core = self.core
        return isinstance(core, AttentionSpec) and (core.rope or core.bias) is not None


def check_norm(where: str, norm: NormSpec | None, width: int) -> None:
    """Raise ValueError if `norm` is not `width` channels wide."""
    if norm is not None and norm.width != width:
        raise ValueError(f"{where} has width {norm.width}, it reads {width} channels")


def check_indices(where: str, indices: Indices | None, width: int) -> None:
    """Raise ValueError unless `indices` are increasing, below `width`, and at least one."""
    if indices is None:
        return
    if not indices:
        raise ValueError(f"{where} is empty; leave the branch out instead")
    if list(indices) != sorted(set(indices)) or indices[-1] >= width:
        raise ValueError(f"{where} must be increasing indices below {width}")
