"""Random architectures of every kind, for property tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch
from hypothesis import assume, reject
from hypothesis import strategies as st
from pydantic import ValidationError
from vitrim import InputError, StructuredMask
from vitrim.compress.masks.groups import token_sites
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    ConvSpec,
    Core,
    DifferentialSpec,
    FfnSpec,
    HeadSpec,
    Indices,
    NormSpec,
    PoolSpec,
    PredictorSpec,
    RefineSpec,
    RelativeBiasSpec,
    RopeGridSpec,
    RopeSpec,
    SelectSpec,
    SoftSplitSpec,
    StemSpec,
)
from vitrim.compress.network.architecture_checks import pinned_tokens
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.select_specs import Scorer

GRID = (2, 3)
POOLS = (
    "token",
    "mean",
    "mean_all",
    "max",
    "avgmax_all",
    "token_mean",
    "distilled",
    "dense",
    "attention",
    "refine",
)


@st.composite
def architectures(draw: Any, countable: bool = False, resizable_rope: bool = False) -> Architecture:
    """A network of one or two steps on 2 x 3 patches.

    Args:
        countable: Whether the cost must follow from live counts alone.
        resizable_rope: Whether every rope must have the frequencies that another image size needs.
    """
    embed = draw(st.integers(4, 9))
    pool = draw(st.sampled_from([kind for kind in POOLS if not countable or kind != "refine"]))
    prefix = draw(
        st.integers(
            {"token": 1, "token_mean": 1, "dense": 1, "distilled": 2, "refine": 1}.get(pool, 0), 3
        )
    )
    widths = [draw(st.integers(1, 2)) for _ in range(draw(st.integers(1, 2)))]
    branches = partial(_branches, embed, prefix, countable=countable, resizable_rope=resizable_rope)
    steps = tuple(
        tuple(draw(branches(f"blocks.{number}.{position}")) for position in range(width))
        for number, width in enumerate(widths)
    )
    reads, filled = draw(_subset(embed, countable)), draw(_subset(embed, countable))
    width = embed if reads is None else len(reads)
    norm = draw(_norm(width)) if pool != "refine" else NormSpec(width=width)
    spec, after = draw(_pool(pool, width))
    act, hidden = draw(st.sampled_from(["identity", "tanh"])), draw(st.sampled_from([None, 5]))
    head = (
        HeadSpec(classes=3, bias=draw(st.booleans()), hidden=hidden, act=act)
        if draw(st.booleans())
        else None
    )
    before = draw(st.lists(_layer_before_patches(), max_size=1))
    written = embed if filled is None else len(filled)
    return Architecture(
        image=(2, 4, 6),
        embed=embed,
        stem=StemSpec(patch=(2, 2), bias=draw(st.booleans()), before=tuple(before)),
        prefix=prefix,
        position=draw(st.booleans()),
        patch_norm=draw(_norm(written)),
        stem_norm=draw(_norm(written)),
        stem_writes=filled,
        steps=steps,
        norm=norm,
        pool=spec,
        pool_norm=draw(_norm(after)) if pool not in ("distilled", "dense") else None,
        head=head,
        head_reads=reads,
    )


@st.composite
def selecting_architectures(
    draw: Any, countable: bool = False, scorers: Sequence[Scorer] = get_args(Scorer)
) -> Architecture:
    """A network that selects patches by content at one place or at two, by some of `scorers`."""
    spec = draw(architectures(countable=countable))
    assume(spec.pool.refine is None)
    first = draw(st.integers(0, len(spec.steps)))
    selects: list[SelectSpec] = []
    patches = spec.patches
    for number in range(draw(st.integers(1, 2))):
        at = first if not number else draw(st.integers(first, len(spec.steps)))
        scorer = draw(st.sampled_from(scorers))
        predictor, norm, reads = None, None, None
        if scorer == "predictor":
            predictor = PredictorSpec(
                local=draw(st.integers(1, 3)),
                pooled=draw(st.integers(0, 3)),
                hidden=tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
            )
            reads = draw(_subset(spec.embed, countable))
            norm = draw(_norm(spec.embed if reads is None else len(reads)))
        assume(at > 0 or "attention" not in scorer)
        fused = scorer == "class-attention" and draw(st.booleans())
        assume(patches - fused > 1)
        kept = draw(st.integers(1, patches - 1 - fused))
        patches = kept + fused
        selects.append(
            SelectSpec(
                name=f"select.{number}",
                at=at,
                patches=kept,
                scorer=scorer,
                predictor=predictor,
                norm=norm,
                reads=reads,
                fused=fused,
                seed=number if scorer == "random" else 0,
            )
        )
    # A fused token has no position.
    fused_at = min((select.at for select in selects if select.fused), default=len(spec.steps))
    steps = tuple(
        tuple(_without_positions(branch) if number >= fused_at else branch for branch in step)
        for number, step in enumerate(spec.steps)
    )
    changed = spec.model_copy(update={"selects": tuple(selects), "steps": steps})
    try:
        return Architecture.model_validate(changed.model_dump(by_alias=True))
    except ValidationError:
        # Such as a scorer without an attention in the step before.
        reject()


def _without_positions(branch: BranchSpec) -> BranchSpec:
    if not isinstance(branch.core, AttentionSpec):
        return branch
    core = branch.core.model_copy(update={"rope": None, "bias": None})
    return branch.model_copy(update={"core": core})


@st.composite
def _layer_before_patches(draw: Any) -> ConvSpec | SoftSplitSpec:
    """A layer of images (2, 4, 6) that keeps their height and width."""
    same: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1)}
    if draw(st.booleans()):
        return ConvSpec(channels=3, act="relu", bias=draw(st.booleans()), **same)
    linear = draw(st.booleans())
    ffn = FfnSpec(
        hidden=draw(st.integers(1, 5)),
        gated=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        norm=None,
    )
    return SoftSplitSpec(
        channels=4,
        norm=NormSpec(width=18, kind=draw(st.sampled_from(["layer", "rms"]))),
        qkv_bias=draw(st.booleans()),
        scale=None if linear else 0.3,
        features=2 if linear else None,
        out_bias=draw(st.booleans()),
        ffn_norm=NormSpec(width=4),
        ffn=ffn,
        **same,
    )


def lone_predictor(norm: NormSpec | None = None, reads: Indices | None = None) -> Architecture:
    """Without other norms, so that a channel is read only where a matrix has a column for it."""
    ffn = BranchSpec(name="blocks.0.ffn", core=FfnSpec(hidden=3))
    select = SelectSpec(
        name="select.0",
        at=0,
        patches=2,
        scorer="predictor",
        predictor=PredictorSpec(local=2, pooled=1),
        norm=norm,
        reads=reads,
    )
    return Architecture(
        image=(2, 4, 6),
        embed=4,
        stem=StemSpec(patch=(2, 2)),
        prefix=0,
        steps=((ffn,),),
        selects=(select,),
        pool=PoolSpec(kind="mean"),
        head=HeadSpec(classes=3),
    )


def network(architecture: Architecture, seed: int = 0) -> CompactModel:
    """A network with random weights in double precision, so that rounding hides no difference."""
    torch.manual_seed(seed)
    model = CompactModel(architecture).double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor) * 0.5 + 0.1)
    return model


@st.composite
def _branches(
    draw: Any, embed: int, prefix: int, name: str, countable: bool, resizable_rope: bool
) -> BranchSpec:
    reads, writes = draw(_subset(embed, countable)), draw(_subset(embed, countable))
    core: Core = draw(
        st.one_of(
            attentions(prefix, countable, resizable_rope), _ffns(), _ffns(), st.just(ConstantSpec())
        )
    )
    constant = isinstance(core, ConstantSpec)
    return BranchSpec(
        name=name,
        core=core,
        norm=None if constant else draw(_norm(embed if reads is None else len(reads))),
        post_norm=None if constant else draw(_norm(embed if writes is None else len(writes))),
        layer_scale=not constant and draw(st.booleans()),
        reads=None if constant else reads,
        writes=writes,
    )


@st.composite
def attentions(
    draw: Any, prefix: int, countable: bool = False, resizable_rope: bool = False
) -> AttentionSpec:
    """Self-attention with any combination of options that is valid."""
    heads, qk, v = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["plain", "rope", "differential"]))
    options: dict[str, Any] = {}
    if kind == "rope":
        qk = 2 * qk
        layout = draw(st.sampled_from(["half", "interleaved"]))
        at = draw(_rope_grids()) if resizable_rope or draw(st.booleans()) else None
        options["rope"] = RopeSpec(
            layout=layout,
            tokens=GRID[0] * GRID[1],
            prefix=prefix,
            per_head=draw(st.booleans()),
            at=at,
        )
    if kind == "differential":
        options["differential"] = DifferentialSpec(
            start=0.3, width=draw(st.integers(1, 3)), dual=draw(st.booleans())
        )
    elif heads % 2 == 0 and not countable and draw(st.booleans()):
        options["kv_of"] = tuple(head // 2 for head in range(heads))
    if draw(st.booleans()):
        options["bias"] = RelativeBiasSpec(
            grid=GRID, prefix=prefix, prefix_rows=prefix == 1 and draw(st.booleans())
        )
    for name in ("q", "k", "v", "out", "gate"):
        options[f"{name}_bias"] = draw(st.booleans())
    return AttentionSpec(
        heads=heads,
        qk=qk,
        v=v,
        scale=draw(st.sampled_from([0.3, 1.0])),
        q_norm=draw(_norm(qk)),
        k_norm=draw(_norm(qk)),
        qk_norm_per_head=draw(st.booleans()),
        head_norm=draw(_norm(v)),
        head_norm_per_head=draw(st.booleans()),
        out_norm=draw(_norm(heads * v)),
        gated=draw(st.booleans()),
        **options,
    )


@st.composite
def _rope_grids(draw: Any) -> RopeGridSpec:
    return RopeGridSpec(
        kind=draw(st.sampled_from(["index", "pixel", "centred"])),
        offset=draw(st.sampled_from([0.0, 0.5])),
        over=draw(st.sampled_from(["separate", "min", "max"])),
        reference=draw(st.sampled_from([None, (3, 2)])),
    )


@st.composite
def _ffns(draw: Any) -> FfnSpec:
    hidden = draw(st.integers(1, 7))
    act = draw(st.sampled_from(["gelu", "silu", "sigmoid", "hardswish"]))
    flags = {name: draw(st.booleans()) for name in ("gated", "in_bias", "gate_bias", "out_bias")}
    return FfnSpec(hidden=hidden, act=act, norm=draw(_norm(hidden)), **flags)


@st.composite
def _pool(draw: Any, kind: str, width: int) -> tuple[PoolSpec, int]:
    """The pooling, and the width of its output."""
    if kind == "refine":
        first = draw(st.integers(1, width))
        channels = (first,) if first == width else (first, width - first)
        return PoolSpec(
            kind=draw(st.sampled_from(["token", "mean_all"])),
            refine=RefineSpec(channels=channels, scale=0.5),
        ), width
    if kind != "attention":
        return PoolSpec(kind=kind), width * (2 if kind == "token_mean" else 1)
    heads, qk, v, out = (draw(st.integers(1, 4)) for _ in range(4))
    attention = AttentionSpec(
        heads=heads,
        qk=qk,
        v=v,
        scale=0.5,
        k_norm=draw(_norm(qk)),
        qk_norm_per_head=draw(st.booleans()),
    )
    ffn = draw(st.one_of(st.none(), _ffns()))
    return PoolSpec(
        kind="attention",
        attention=attention,
        norm=draw(_norm(out)),
        ffn=ffn,
        width=out,
        prefix=draw(st.booleans()),
    ), out


def early_learned_tokens(architecture: Architecture) -> StructuredMask:
    """A mask with which learned tokens that the head does not read leave between patches."""
    places = list(token_sites(architecture))
    depth = torch.full((architecture.tokens,), len(places))
    first, prefix = pinned_tokens(architecture), architecture.prefix
    depth[prefix] = depth[-1] = 1
    # The first of them stays until one place before the others.
    depth[first:prefix] = 2
    depth[first] = 3
    depth[prefix + 2 : prefix + 4] = 4
    return StructuredMask({"token": {site: depth > n for n, site in enumerate(places)}})


@st.composite
def token_masks(draw: Any, architecture: Architecture) -> StructuredMask:
    """Any nested token sets that a network allows; learned tokens leave, too."""
    sites = list(token_sites(architecture).items())
    depth = torch.tensor(
        draw(
            st.lists(
                st.integers(0, len(sites)),
                min_size=architecture.tokens,
                max_size=architecture.tokens,
            )
        )
    )
    mask = StructuredMask(
        {"token": {site: depth > number for number, (site, _) in enumerate(sites)}}
    )
    try:
        mask.check(architecture)
    except InputError:
        assume(False)
    return mask


@st.composite
def _norm(draw: Any, width: int) -> NormSpec | None:
    if draw(st.booleans()):
        return None
    # With few channels and a tiny eps, norms of random networks would amplify rounding errors.
    return NormSpec(
        kind=draw(st.sampled_from(["layer", "rms"])),
        width=width,
        eps=1e-2,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def _subset(draw: Any, size: int, whole: bool) -> Indices | None:
    if whole or draw(st.booleans()):
        return None
    return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=2))))
