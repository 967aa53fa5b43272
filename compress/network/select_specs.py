"""The plain data of a selection of tokens by content, and how many tokens it leaves.

A selection stands between two steps. It scores the patches of each image, keeps a constant number
of them, and drops the others from the stream; prefix tokens always stay. Kept tokens stay in their
order, and of patches with equal scores the first ones are kept. Part of the file format that
`architecture.py` documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from .branch_specs import (
    Activation,
    AttentionSpec,
    BranchSpec,
    Count,
    Indices,
    NormSpec,
    Spec,
    Width,
    check_indices,
    check_norm,
)

if TYPE_CHECKING:
    from .architecture import Architecture

# Selections are named apart from the sub-layers of source models, so that masks can name both.
NAME_PREFIX = "select."
Scorer = Literal["predictor", "class-attention", "column-attention", "random"]
ATTENTION_SCORERS: tuple[Scorer, ...] = ("class-attention", "column-attention")
# The way out where patches cannot be chosen for each image.
_MASK_INSTEAD = (
    "use a token mask instead, which drops the same patches of all images "
    '(--tokens patch-slimming, masks.tokens = "patch-slimming")'
)


class PredictorSpec(Spec):
    """A feed-forward network with one score per patch.

    The first layer has units of two kinds: each patch keeps its own values of the local ones, and
    of the pooled ones all patches get their mean. Rao et al. 2021, "DynamicViT", eq. 1 to 4.
    """

    local: Width
    """Units of the first layer that stay those of the patch."""
    pooled: Count
    """Units of the first layer that are averaged over the patches; they follow the local ones."""
    hidden: tuple[Width, ...] = ()
    """Widths of the further hidden layers."""
    act: Activation = "gelu"
    """Activation function after every layer but the last."""


class SelectSpec(Spec):
    """Drop all but a constant number of patches, chosen for each image."""

    name: str = Field(pattern=r"^select\.[\w\-]+(\.[\w\-]+)*$", max_length=200)
    """Name of the selection; unique in the network."""
    at: Count
    """Number of steps that run before it."""
    patches: Width
    """Number of patches that it keeps."""
    scorer: Scorer
    """`predictor`: the network below, on the residual stream. `class-attention`: how much the first
    token attends to each patch, the mean over the heads of the attention in the step before.
    `column-attention`: how much all tokens attend to it there, times the length of its value.
    `random`: a fixed random order of places."""
    predictor: PredictorSpec | None = None
    """The network of scorer `predictor`."""
    norm: NormSpec | None = None
    """Norm before the predictor."""
    reads: Indices | None = None
    """Stream channels that the predictor reads, increasing. None: all."""
    fused: bool = False
    """Whether one more token follows the kept ones: the sum of the dropped ones, each times its
    class attention. It counts as a patch from there on. Liang et al. 2022, "EViT"."""
    seed: Count = 0
    """Seed of scorer `random`."""

    @model_validator(mode="after")
    def _consistent(self) -> SelectSpec:
        if (self.scorer == "predictor") != (self.predictor is not None):
            raise ValueError("scorer 'predictor' and the field predictor need each other")
        if self.predictor is None and (self.norm is not None or self.reads is not None):
            raise ValueError("norm and reads are those of a predictor")
        if self.fused and self.scorer != "class-attention":
            raise ValueError("fused needs scorer 'class-attention'")
        if self.scorer in ATTENTION_SCORERS and self.at == 0:
            raise ValueError(f"scorer '{self.scorer}' needs a step before it")
        return self

    @property
    def left(self) -> int:
        """Number of tokens behind the prefix tokens that the stream carries after it."""
        return self.patches + self.fused

    @property
    def site_in(self) -> str:
        """The site of embed masks at which a predictor reads the residual stream."""
        return f"{self.name}.in"

    @property
    def hidden_sites(self) -> dict[str, int]:
        """The sites of ffn masks of a predictor's layers, with their widths.

        The first layer has its local units before its pooled ones.
        """
        spec = self.predictor
        if spec is None:
            return {}
        widths = (spec.local + spec.pooled, *spec.hidden)
        return {f"{self.name}.hidden.{number}": width for number, width in enumerate(widths)}


def is_hidden_site(site: str) -> bool:
    """Whether a site of ffn masks is a layer of a predictor, which no shared mask covers."""
    return site.startswith(NAME_PREFIX) and ".hidden." in site


def scoring_attention(architecture: Architecture, select: SelectSpec) -> BranchSpec:
    """The sub-layer whose attention scores the patches.

    Raises:
        ValueError: The step before has no attention, or several.
    """
    step = architecture.steps[select.at - 1] if 0 < select.at <= len(architecture.steps) else ()
    found = [branch for branch in step if isinstance(branch.core, AttentionSpec)]
    if len(found) != 1:
        raise ValueError(
            f"{select.name}: scorer '{select.scorer}' needs one attention in the step before, "
            f"there are {len(found)}"
        )
    return found[0]


def scoring_branches(
    architecture: Architecture, scorers: Sequence[Scorer] = ATTENTION_SCORERS
) -> frozenset[str]:
    """Names of the sub-layers whose attention scores patches, which cannot be removed.

    Args:
        architecture: The network.
        scorers: The scorers that count, all that need an attention by default.
    """
    return frozenset(
        scoring_attention(architecture, select).name
        for select in architecture.selects
        if select.scorer in scorers
    )


def static_steps(architecture: Architecture) -> int:
    """Number of steps before the first selection, which carry the same tokens for all images."""
    return architecture.selects[0].at if architecture.selects else len(architecture.steps)


def reads_positions_behind(architecture: Architecture, steps: int) -> bool:
    """Whether a sub-layer behind so many steps reads which tokens of the stem it gets."""
    behind = (branch for step in architecture.steps[steps:] for branch in step)
    return any(branch.reads_positions for branch in behind)


def selected_tokens(architecture: Architecture, step: int, tokens: Any) -> Any:
    """Number of the tokens that are left after the selections before a step."""
    for select in architecture.selects:
        if select.at == step:
            tokens = min(tokens, architecture.prefix + select.left)
    return tokens


def select_inputs(
    architecture: Architecture, counts: Sequence[Any]
) -> list[tuple[SelectSpec, Any, Any]]:
    """List the selections with the number of tokens that the step before reads, and of their own.

    `counts`: number of tokens after the stem and after each step.
    """
    found: list[tuple[SelectSpec, Any, Any]] = []
    for number, select in enumerate(architecture.selects):
        tokens, before = counts[select.at], 0
        if select.at:
            before = selected_tokens(architecture, select.at - 1, counts[select.at - 1])
        for other in architecture.selects[:number]:
            if other.at == select.at:
                tokens = architecture.prefix + other.left
        found.append((select, before, tokens))
    return found


@dataclass(frozen=True)
class SelectWidths:
    """The numbers that the multiply-adds of a selection depend on: whole numbers, or sums of gates.

    Attributes:
        reads: Channels that the scorer reads.
        stream: Channels of the residual stream.
        local: Local units of a predictor.
        pooled: Pooled units of a predictor.
        hidden: Widths of a predictor's further hidden layers.
        heads: Query heads of the scoring attention.
        kv_heads: Its key/value heads.
        qk: Width of its queries and keys.
        v: Width of its values.
    """

    reads: Any = 0
    stream: Any = 0
    local: Any = 0
    pooled: Any = 0
    hidden: Sequence[Any] = ()
    heads: Any = 0
    kv_heads: Any = 0
    qk: Any = 0
    v: Any = 0


def select_widths(architecture: Architecture, select: SelectSpec) -> SelectWidths:
    """The numbers of a selection of a network."""
    spec = select.predictor
    if spec is not None:
        reads = architecture.read_width(select.reads)
        return SelectWidths(reads, local=spec.local, pooled=spec.pooled, hidden=spec.hidden)
    if select.scorer == "random":
        return SelectWidths()
    branch = scoring_attention(architecture, select)
    core = branch.core
    assert isinstance(core, AttentionSpec)
    return SelectWidths(
        reads=architecture.read_width(branch.reads),
        stream=architecture.embed,
        heads=core.heads,
        kv_heads=core.kv_heads,
        qk=core.qk,
        v=core.v,
    )


def select_macs(
    architecture: Architecture,
    select: SelectSpec,
    widths: SelectWidths,
    tokens_before: Any,
    tokens: Any,
) -> Any:
    """Number of multiply-adds of a selection for one image.

    Args:
        architecture: The network.
        select: One of its selections.
        widths: Its numbers; those of `select_widths`, or live ones.
        tokens_before: Number of tokens that the step before it read.
        tokens: Number of tokens that it chooses from.

    Returns:
        Those of the scores and of the fused token.
    """
    patches, reads = tokens - architecture.prefix, widths.reads
    if select.scorer == "random":
        return 0
    if select.predictor is not None:
        layers = (*widths.hidden, 1)
        total = patches * reads * (widths.local + widths.pooled)
        total = total + (patches * widths.local + widths.pooled) * layers[0]
        for before, after in pairwise(layers):
            total = total + patches * before * after
        return total
    core = scoring_attention(architecture, select).core
    assert isinstance(core, AttentionSpec)
    heads, keys, qk = widths.heads * core.parts, widths.kv_heads * core.parts, widths.qk
    if select.scorer == "class-attention":
        total = heads * qk * reads
        if folds_keys(core):
            total = total + heads * qk * reads + tokens_before * reads * heads
        else:
            total = total + keys * qk * reads * tokens_before + heads * qk * tokens_before
        return total + select.fused * (patches + select.patches) * widths.stream
    total = tokens_before * reads * ((heads + keys) * qk + widths.kv_heads * widths.v)
    return total + tokens_before * tokens_before * heads * qk


def folds_keys(core: AttentionSpec) -> bool:
    """Whether the scores of one query need no keys: q·(x Wk) = (Wk q)·x, for each head."""
    return core.k_norm is None and core.rope is None and core.bias is None


def check_select_pool(architecture: Architecture) -> None:
    """Raise ValueError if a network with selections needs every patch at its end."""
    pool = architecture.pool
    if not architecture.selects or (pool.kind != "none" and pool.refine is None):
        return
    how = " behind self-attention" if pool.refine is not None else ""
    way = "add a pooling first (reset_classifier)" if pool.kind == "none" else _MASK_INSTEAD
    raise ValueError(
        f'{architecture.selects[0].name}: the head reads every patch (pool "{pool.kind}"{how}); '
        f"{way}"
    )


def check_selects(architecture: Architecture) -> None:
    """Raise ValueError unless every selection leaves fewer patches, which something reads."""
    names = [select.name for select in architecture.selects]
    if len(set(names)) != len(names):
        raise ValueError("two selections have the same name")
    ends = [select.at for select in architecture.selects]
    if ends != sorted(ends):
        raise ValueError("selections must be in order")
    if not ends:
        return
    if ends[-1] > len(architecture.steps):
        raise ValueError(f"{names[-1]} is behind step {ends[-1]}, there are fewer")
    counts = (architecture.tokens, *architecture.step_tokens(last_queries=False))
    last = max(architecture.attention_steps(), default=-1)
    if architecture.pooled_prefix and ends[-1] > last:
        raise ValueError(
            f"{names[-1]}: nothing behind it reads patches; choose in an earlier block, or "
            f"{_MASK_INSTEAD}"
        )
    for select, _, tokens in select_inputs(architecture, counts):
        present = tokens - architecture.prefix
        if present <= select.left:
            raise ValueError(
                f"{select.name} leaves {select.left} tokens behind the prefix, there are {present}"
            )
        check_indices(f"{select.name}.reads", select.reads, architecture.embed)
        check_norm(f"{select.name}.norm", select.norm, architecture.read_width(select.reads))
        if select.scorer in ATTENTION_SCORERS:
            scoring_attention(architecture, select)
            if ends.index(select.at) != architecture.selects.index(select):
                raise ValueError(f"{select.name}: another selection is between it and its scores")
        if select.scorer == "class-attention" and not architecture.prefix:
            raise ValueError(
                f"{select.name}: class-attention needs a class token; use column-attention or a "
                "predictor"
            )
    first = architecture.selects[0].at
    fusing = next((select for select in architecture.selects if select.fused), None)
    for number, step in enumerate(architecture.steps):
        kept = step[0].tokens
        if number >= first and kept is not None and kept > architecture.prefix:
            raise ValueError(
                f"{step[0].name}: {kept} tokens by place, behind {names[0]}, which chooses by "
                "image; choose in a later block, or for a network without a token mask"
            )
        if fusing is None or number < fusing.at:
            continue
        for branch in step:
            if branch.reads_positions:
                raise ValueError(
                    f"{branch.name}: its positions are those of the grid, and the token into which "
                    f"{fusing.name} fuses patches has none; choose without a fused token "
                    f"(class-attention), or {_MASK_INSTEAD}"
                )
