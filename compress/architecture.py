"""What a compact Vision Transformer looks like, as plain data: enough to rebuild the empty module without its source library.

A network is a residual stream of `embed` channels that a stem fills and that *steps* add to. A step is a group of *branches* reading the same
stream: one branch for a serial sub-layer, several for parallel ones. A branch reads some channels, normalises them, runs one core (attention
or FFN), and writes to some channels:

    x[writes] += layer_scale * post_norm(core(norm(x[reads])))

`reads` and `writes` are None when they mean the whole stream; index lists appear when masks are not shared.
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

    model_config = ConfigDict(frozen=True, extra="forbid")


class NormSpec(Plain):
    """LayerNorm, RMSNorm or an affine map over the last dimension."""

    kind: Literal["layer", "rms"] = "layer"
    width: Width
    eps: float = 1e-6
    weight: bool = True
    bias: bool = True


class StemSpec(Plain):
    """Patch embedding by a convolution whose stride is its kernel."""

    kind: Literal["conv"] = "conv"
    patch: tuple[Width, Width]
    bias: bool = True


class AttentionSpec(Plain):
    """Multi-head self-attention with separate query/key and value widths.

    `scale` multiplies q·k before the softmax; it is stated here because pruning changes it in one convention and not in the other.
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


class FfnSpec(Plain):
    """Feed-forward sub-layer: act(x W1) W2, or act(x Wg) * (x W1) W2 when gated."""

    kind: Literal["ffn"] = "ffn"
    hidden: Width
    act: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu6", "hardswish", "tanh", "sigmoid"] = "gelu"
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


class PoolSpec(Plain):
    """How tokens become one feature vector: the class token, a mean (of patch tokens or of all), or class and distillation token apart."""

    kind: Literal["token", "mean", "mean_all", "distilled"] = "token"


class HeadSpec(Plain):
    """Classifier. `distilled` heads answer with the mean of the class and the distillation classifier, as in DeiT."""

    classes: Width
    bias: bool = True


class Architecture(Plain):
    """A whole network. Shapes: images (batch, channels, height, width) -> logits (batch, classes)."""

    schema_: Literal["vitrim.architecture/1"] = Field(default="vitrim.architecture/1", alias="schema")
    image: tuple[Width, Width, Width]
    embed: Width
    stem: StemSpec
    prefix: Count = 1
    position: bool = True
    stem_norm: NormSpec | None = None
    # None: the stem (convolution, prefix tokens, positions) fills the whole stream; else only these channels, the others start at zero.
    stem_writes: Indices | None = None
    steps: tuple[tuple[BranchSpec, ...], ...]
    norm: NormSpec | None = None
    pool: PoolSpec = PoolSpec()
    pool_norm: NormSpec | None = None
    head: HeadSpec
    # None: the head reads the whole stream.
    head_reads: Indices | None = None
    # Tokens that no later step can see are not computed in the last block: exact when the head pools by prefix tokens.
    last_queries: bool = False

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[1] // self.stem.patch[0], self.image[2] // self.stem.patch[1]

    @property
    def tokens(self) -> int:
        """Prefix tokens and patches."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def classes(self) -> int:
        """Width of the logits."""
        return self.head.classes

    @property
    def branches(self) -> tuple[BranchSpec, ...]:
        """All sub-layers in order."""
        return tuple(branch for step in self.steps for branch in step)

    @property
    def pooled_prefix(self) -> int:
        """Leading tokens that the head reads; 0 when it reads them all."""
        return {"token": 1, "distilled": 2}.get(self.pool.kind, 0)

    def read_width(self, reads: Indices | None) -> int:
        """Channels seen through `reads`."""
        return self.embed if reads is None else len(reads)

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        for edge, patch, side in zip(("height", "width"), self.stem.patch, self.image[1:], strict=True):
            if side < patch:
                raise ValueError(f"image {edge} {side} is smaller than the patch {patch}")
        if self.pooled_prefix > self.prefix:
            raise ValueError(f"pool '{self.pool.kind}' needs {self.pooled_prefix} prefix tokens, the stem has {self.prefix}")
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
                _check_norm(f"{branch.name}.q_norm", core.q_norm, core.qk)
                _check_norm(f"{branch.name}.k_norm", core.k_norm, core.qk)
                _check_norm(f"{branch.name}.out_norm", core.out_norm, core.heads * core.v)
            elif isinstance(core, FfnSpec):
                _check_norm(f"{branch.name}.core.norm", core.norm, core.hidden)
        _check_indices("head_reads", self.head_reads, self.embed)
        _check_indices("stem_writes", self.stem_writes, self.embed)
        _check_norm("stem_norm", self.stem_norm, self.read_width(self.stem_writes))
        _check_norm("norm", self.norm, self.read_width(self.head_reads))
        _check_norm("pool_norm", self.pool_norm, self.read_width(self.head_reads))
        return self


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
