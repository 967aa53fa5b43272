"""Programs of our kernels compute the network's outputs.

For odd widths, several images, every vector unit and several threads.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import network
from tvm_networks import assert_lowered_as_by_all_passes, error_of, runnable
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    Core,
    DifferentialSpec,
    FfnSpec,
    HeadSpec,
    Indices,
    NormSpec,
    PoolSpec,
    RelativeBiasSpec,
    RopeSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.targets.catalog import load_target

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

from vitrim.export.tvm_kernels.build import TvmNetwork, build_network, tvm_target
from vitrim.export.tvm_kernels.coverage import uncovered_part
from vitrim.export.tvm_kernels.lanes import Lanes
from vitrim.export.tvm_kernels.loops import pieces, share_bounds, split_evenly, thread_grid
from vitrim.export.tvm_kernels.network import network_module
from vitrim.export.tvm_kernels.precision import Name
from vitrim.export.tvm_kernels.prefetch import plan_prefetch
from vitrim.export.tvm_kernels.program import lowering
from vitrim.export.tvm_kernels.schedule import Schedule, Shape, Tile, candidates, default_schedule
from vitrim.export.tvm_kernels.tuner import tune
from vitrim.export.tvm_kernels.tuning_log import Trial, fastest_tiles, read_trials

# The grid of patches, the number of prefix tokens, and the order of the patches.
StreamTokens = tuple[tuple[int, int], int, Indices | None]


@st.composite
def architectures(draw: Any) -> Architecture:
    """Networks that our kernels cover, with widths below and above a vector's."""
    embed, grid, patch = (
        draw(st.integers(3, 40)),
        draw(st.tuples(st.integers(1, 5), st.integers(1, 4))),
        draw(st.integers(1, 3)),
    )
    channels, padding = draw(st.integers(1, 3)), (draw(st.integers(0, 1)) if patch > 1 else 0)
    pools = ["token", "mean", "mean_all", "distilled", "dense", "attention"]
    pool = draw(st.sampled_from(pools))
    spec = StemSpec(patch=(patch, patch), padding=(padding, padding), bias=draw(st.booleans()))
    sizes = spec.sizes(grid[0] * patch, grid[1] * patch)[-1]
    prefix = draw(st.integers({"token": 1, "dense": 1, "distilled": 2}.get(pool, 0), 3))
    widths = [draw(st.integers(1, 2)) for _ in range(draw(st.integers(1, 2)))]
    patches = draw(st.permutations(range(sizes[0] * sizes[1])))
    order = tuple(patches[: draw(st.integers(1, len(patches)))]) if draw(st.booleans()) else None
    stream = (sizes, prefix, order)
    steps: tuple[tuple[BranchSpec, ...], ...] = ()
    tokens = prefix + len(order or patches)
    for number, width in enumerate(widths):
        # At least one patch stays for the head.
        tokens = draw(st.integers(prefix + 1, tokens))
        names = [f"blocks.{number}.{position}" for position in range(width)]
        steps += (tuple(draw(branches(embed, stream, name, tokens)) for name in names),)
    reads = draw(subset(embed))
    width = len(reads or range(embed))
    spec_pool = draw(attention_pools()) if pool == "attention" else PoolSpec(kind=pool)
    width_pooled = spec_pool.width or width
    classified = pool in ("distilled", "dense") or draw(st.booleans())
    written = (
        None
        if classified
        else draw(st.one_of(st.none(), st.just(tuple(range(1, 2 * width_pooled, 2)))))
    )
    return Architecture(
        image=(channels, grid[0] * patch, grid[1] * patch),
        embed=embed,
        stem=spec,
        prefix=prefix,
        order=order,
        position=draw(st.booleans()),
        patch_norm=draw(norms(embed)),
        stem_norm=draw(norms(embed)),
        steps=steps,
        norm=draw(norms(width)),
        pool=spec_pool,
        pool_norm=draw(norms(width_pooled)) if pool not in ("distilled", "dense") else None,
        head=HeadSpec(
            classes=draw(st.integers(1, 20)),
            bias=draw(st.booleans()),
            hidden=draw(st.sampled_from([None, 5])),
            act="identity"
            if pool == "distilled"
            else draw(st.sampled_from(["identity", "sigmoid"])),
        )
        if classified
        else None,
        head_reads=reads,
        feature_width=None if written is None else 2 * width_pooled,
        feature_writes=written,
    )


@st.composite
def attention_pools(draw: Any) -> PoolSpec:
    width, (qk, v) = (
        draw(st.integers(1, 20)),
        draw(st.tuples(st.integers(1, 20), st.integers(1, 20))),
    )
    biases = {f"{name}_bias": draw(st.booleans()) for name in ("k", "v", "out")}
    attention = AttentionSpec(
        heads=draw(st.integers(1, 3)),
        qk=qk,
        v=v,
        scale=0.5,
        k_norm=draw(norms(qk)),
        qk_norm_per_head=draw(st.booleans()),
        **biases,
    )
    ffn = draw(st.one_of(st.none(), ffns()))
    return PoolSpec(
        kind="attention",
        attention=attention,
        width=width,
        prefix=draw(st.booleans()),
        norm=draw(norms(width)),
        ffn=ffn,
    )


@st.composite
def branches(draw: Any, embed: int, stream: StreamTokens, name: str, tokens: int) -> BranchSpec:
    reads, writes = draw(subset(embed)), draw(subset(embed))
    core: Core = draw(st.one_of(attentions(*stream), ffns(), st.just(ConstantSpec())))
    constant = isinstance(core, ConstantSpec)
    return BranchSpec(
        name=name,
        core=core,
        norm=None if constant else draw(norms(len(reads or range(embed)))),
        post_norm=None if constant or writes is not None else draw(norms(embed)),
        layer_scale=not constant and draw(st.booleans()),
        reads=None if constant else reads,
        writes=writes,
        tokens=tokens,
    )


@st.composite
def attentions(
    draw: Any, grid: tuple[int, int], prefix: int, order: Indices | None
) -> AttentionSpec:
    heads, qk, v = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        qk += qk % 2
        layout = draw(st.sampled_from(["half", "interleaved"]))
        tokens = len(order or range(grid[0] * grid[1]))
        options["rope"] = RopeSpec(
            layout=layout, tokens=tokens, prefix=prefix, per_head=draw(st.booleans())
        )
    if draw(st.booleans()):
        options["bias"] = RelativeBiasSpec(
            grid=grid,
            prefix=prefix,
            prefix_rows=prefix == 1 and draw(st.booleans()),
            order=order,
        )
    if "rope" not in options and draw(st.booleans()):
        options["differential"] = DifferentialSpec(start=0.3, width=3, dual=draw(st.booleans()))
    elif heads % 2 == 0 and draw(st.booleans()):
        options["kv_of"] = tuple(head // 2 for head in range(heads))
    biases = {f"{name}_bias": draw(st.booleans()) for name in ("q", "k", "v", "out", "gate")}
    return AttentionSpec(
        heads=heads,
        qk=qk,
        v=v,
        scale=draw(st.sampled_from([0.3, 1.0])),
        q_norm=draw(norms(qk)),
        k_norm=draw(norms(qk)),
        qk_norm_per_head=draw(st.booleans()),
        head_norm=draw(norms(v)),
        head_norm_per_head=draw(st.booleans()),
        out_norm=draw(norms(heads * v)),
        gated=draw(st.booleans()),
        **biases,
        **options,
    )


@st.composite
def ffns(draw: Any) -> FfnSpec:
    hidden = draw(st.integers(1, 70))
    act = draw(
        st.sampled_from(
            ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu6", "hardswish", "tanh"]
        )
    )
    flags = {name: draw(st.booleans()) for name in ("gated", "in_bias", "gate_bias", "out_bias")}
    return FfnSpec(hidden=hidden, act=act, norm=draw(norms(hidden)), **flags)


@st.composite
def norms(draw: Any, width: int) -> NormSpec | None:
    if draw(st.booleans()):
        return None
    return NormSpec(
        kind=draw(st.sampled_from(["layer", "rms"])),
        width=width,
        eps=1e-1,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def subset(draw: Any, size: int) -> Indices | None:
    if draw(st.integers(0, 3)):
        return None
    return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=2))))


@settings(max_examples=12)
@given(
    architecture=architectures(),
    batch=st.integers(1, 3),
    threads=st.integers(1, 2),
    unit=st.integers(0, 2),
)
def test_any_covered_network_computes_the_same_outputs(
    architecture: Architecture, batch: int, threads: int, unit: int
) -> None:
    model = network(architecture)
    built = build_network(model, runnable()[unit % len(runnable())], batch=batch, threads=threads)
    assert built.route == "kernels"
    assert error_of(model, built, batch) < 1e-4


@settings(max_examples=3)
@given(
    architecture=architectures(),
    threads=st.integers(1, 2),
    precision=st.sampled_from(["fp32", "int8"]),
    unit=st.integers(0, 2),
)
def test_passes_that_are_left_out_would_change_no_kernel(
    architecture: Architecture, threads: int, precision: Name, unit: int
) -> None:
    profile = runnable()[unit % len(runnable())]
    assert_lowered_as_by_all_passes(
        build_network(network(architecture), profile, threads=threads, precision=precision)
    )


def small(**changes: Any) -> CompactModel:
    """A network with one attention and one FFN."""
    attention = AttentionSpec(heads=2, qk=5, v=6, scale=0.4)
    architecture = Architecture(
        image=(1, 8, 8),
        embed=12,
        stem=StemSpec(patch=(2, 2)),
        steps=(
            (BranchSpec(name="attn", core=attention, norm=NormSpec(width=12)),),
            (BranchSpec(name="mlp", core=FfnSpec(hidden=20)),),
        ),
        norm=NormSpec(width=12),
        head=HeadSpec(classes=7),
    )
    return network(architecture.model_copy(update=changes))


@pytest.mark.parametrize("kind", ["token", "mean"])
def test_the_norm_after_the_pool_selects_the_columns_that_the_head_reads(kind: str) -> None:
    model = small(
        norm=None,
        prefix=1,
        pool=PoolSpec(kind=kind),
        pool_norm=NormSpec(width=5),
        head_reads=(1, 3, 4, 8, 11),
    )
    assert error_of(model, build_network(model, runnable()[-1], batch=2), 2) < 1e-4


@pytest.mark.parametrize("head", [{"bias": False}, {"hidden": 9, "act": "sigmoid"}])
def test_the_head_of_token_labels_adds_half_of_the_largest_logits(head: dict[str, Any]) -> None:
    model = small(
        prefix=2,
        pool=PoolSpec(kind="dense"),
        head=HeadSpec(classes=19, **head),
        head_reads=(0, 1, 3, 4, 8, 11),
        norm=NormSpec(width=6),
    )
    for batch, threads in ((1, 1), (3, 2)):
        built = build_network(model, runnable()[-1], batch=batch, threads=threads)
        assert built.route == "kernels"
        assert error_of(model, built, batch) < 1e-4


@given(total=st.integers(1, 500), most=st.integers(1, 16))
def test_pieces_cover_the_whole_length_once_and_are_nearly_equal(total: int, most: int) -> None:
    found = list(pieces(split_evenly(total, most)))
    assert [start for start, _ in found] == [
        sum(size for _, size in found[:number]) for number in range(len(found))
    ]
    assert sum(size for _, size in found) == total
    assert max(size for _, size in found) <= most
    assert max(size for _, size in found) - min(size for _, size in found) <= 1
    assert len(found) == -(-total // most)


@given(count=st.integers(0, 50), parts=st.integers(1, 9))
def test_shares_of_threads_are_contiguous(count: int, parts: int) -> None:
    limits = [share_bounds(count, part, parts) for part in range(parts)]
    assert limits[0][0] == 0
    assert limits[-1][1] == count
    assert all(before[1] == after[0] for before, after in pairwise(limits))


@pytest.mark.parametrize(
    ("panels", "rows", "expected"), [(4, 25, (2, 1)), (1, 25, (1, 2)), (3, 8, (1, 2))]
)
def test_of_equally_balanced_grids_the_one_that_splits_panels_is_chosen(
    panels: int, rows: int, expected: tuple[int, int]
) -> None:
    grid = thread_grid(2, split_evenly(panels, 1), split_evenly(rows, 1))
    assert (grid.panels, grid.rows) == expected


@given(
    lines=st.integers(1, 5000),
    depth=st.integers(1, 2000),
    tiles=st.integers(1, 300),
    rows=st.integers(1, 14),
    vectors=st.integers(1, 8),
    steps=st.sampled_from([1, 2, 4]),
)
def test_the_first_tiles_fetch_the_next_panel_once(
    lines: int, depth: int, tiles: int, rows: int, vectors: int, steps: int
) -> None:
    plan = plan_prefetch(lines, depth, tiles, Tile(rows, vectors, steps))
    if plan is None:
        assert tiles == 1 or depth < steps
        return
    assert plan.tiles <= tiles
    assert plan.steps % steps == 0
    assert plan.steps * plan.groups <= depth
    # The last tile that fetches is needed, and completes the panel.
    each = plan.lines * plan.groups
    assert each * (plan.tiles - 1) < lines <= each * plan.tiles


def test_the_uncovered_part_is_reported_with_its_place() -> None:
    attention = AttentionSpec(heads=2, qk=4, v=6, scale=0.4)
    branch = BranchSpec(
        name="blocks.0.attn", core=attention, post_norm=NormSpec(width=3), writes=(1, 4, 7)
    )
    reason = uncovered_part(small(steps=((branch,),)).architecture)
    assert reason == (
        "blocks.0.attn: a norm after a sub-layer that writes to a part of the stream "
        "(post_norm with writes)"
    )
    assert uncovered_part(small(pool=PoolSpec(kind="max")).architecture) == "pooling 'max'"


@pytest.mark.parametrize("name", ["rpi4", "rpi5"])
def test_kernels_use_the_vectors_of_the_target(name: str) -> None:
    built = build_network(small(), load_target(name), batch=2)
    assert built.route == "kernels"
    assert built.notes[0].startswith("neon kernels, vectors of 4")
    assert "float32x4" in str(built.module)
    assert "float32x8" not in str(built.module)


def test_a_target_without_code_generation_is_refused() -> None:
    profile = load_target("x86-64-v3").model_copy(update={"tvm_target": None})
    with pytest.raises(
        InputError, match=r"target 'x86-64-v3' has no tvm_target; add one to its profile"
    ):
        build_network(small(), profile)


def test_the_next_build_uses_a_tuning_log(tmp_path: Path) -> None:
    log, profile, model = tmp_path / "tiles.jsonl", runnable()[0], small()
    tuned = tune(model, profile, log, time_limit_s=1.0)
    assert 1 <= tuned.shapes <= tuned.all_shapes
    assert tuned.best_s <= tuned.default_s
    trials = read_trials(log)
    assert len(trials) == tuned.trials
    built = build_network(model, profile, log=log)
    assert built.notes[1] == f"tiles of {tuned.shapes} shapes from tiles.jsonl"
    assert error_of(model, built, 1) < 1e-4


@pytest.mark.parametrize("name", ["x86-64", "x86-64-v3", "x86-64-v4-vnni", "rpi4"])
def test_the_default_tile_of_every_shape_fits_the_registers(name: str) -> None:
    unit = load_target(name).vector
    schedule = default_schedule(unit)
    for rows in range(1, 20):
        for width in (8, 64, 264):
            assert schedule.tile(Shape("dense", (rows, 64, width))).fits(unit)
            assert schedule.tile(Shape("dense-int8", (rows, 64, width))).fits(unit)


def test_avx2_takes_the_tile_that_leaves_fewer_narrow_panels() -> None:
    schedule = default_schedule(load_target("x86-64-v3").vector)

    def of(width: int) -> tuple[int, int]:
        tile = schedule.tile(Shape("dense", (197, 192, width)))
        return tile.rows, tile.vectors

    # 33 vectors are eleven panels of three, but sixteen of two and one that waits for its sums.
    assert of(264) == (4, 3)
    assert of(128) == (6, 2)
    # Equal: fewer loads.
    assert of(192) == (4, 3)


@given(tile=st.sampled_from(candidates(runnable()[0].vector)))
@settings(max_examples=4)
def test_every_tile_computes_the_same_outputs(tile: Tile) -> None:
    model, profile = small(), runnable()[0]
    module = network_module(model, Lanes.of(profile.vector), Schedule(tile), 1)
    built = TvmNetwork(module, tvm_target(profile), lowering(), "kernels", 1)
    assert error_of(model, built, 1) < 1e-4


def trial(**changes: Any) -> dict[str, Any]:
    line = {
        "schema": "vitrim.tvm-trial/1",
        "target": "x86-64-v4-vnni",
        "processor": "a core",
        "threads": 1,
        "kind": "dense",
        "sizes": [9, 4, 16],
    }
    return {**line, "rows": 8, "vectors": 3, "steps": 1, "latency_s": 1e-5, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": 0},
            r"tiles.jsonl:2: rows: Input should be greater than or equal to 1; "
            r"remove that line, or tune again",
        ),
        ({"latency_s": "soon"}, r"tiles.jsonl:2: latency_s: Input should be a valid number"),
        (
            {"schema": "vitrim.tvm-trial/9"},
            r"tiles.jsonl:2: schema: Input should be 'vitrim.tvm-trial/1'",
        ),
        ({"shell": "rm"}, r"tiles.jsonl:2: shell: Extra inputs are not permitted"),
        ({"sizes": [1] * 9}, r"tiles.jsonl:2: sizes: Tuple should have at most 4 items"),
    ],
)
def test_a_malformed_log_is_refused_by_line_and_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "tiles.jsonl"
    path.write_text(json.dumps(trial()) + "\n" + json.dumps(trial(**changes)) + "\n")
    with pytest.raises(InputError, match=message):
        read_trials(path)


def test_the_fastest_tile_of_the_target_and_thread_count_is_used() -> None:
    lines = [
        trial(rows=8, latency_s=3e-5),
        trial(rows=6, latency_s=2e-5),
        trial(rows=4, latency_s=1e-6, threads=2),
        trial(rows=5, latency_s=1e-6, target="rpi5"),
        trial(rows=12, vectors=3, latency_s=1e-6),
        trial(rows=7, latency_s=1e-6, unit="avx2"),
    ]
    trials = [Trial.model_validate(line) for line in lines]
    unit = load_target("x86-64-v4-vnni").vector
    found = fastest_tiles(trials, "x86-64-v4-vnni", 1, unit)
    assert found == {Shape("dense", (9, 4, 16)): Tile(6, 3, 1)}


def test_targets_of_an_earlier_log_keep_their_meaning(tmp_path: Path) -> None:
    log = tmp_path / "tiles.jsonl"
    lines = [
        trial(target="x86-64"),
        trial(target="x86-64-avx2"),
        trial(target="x86-64", unit="sse"),
        trial(target="rpi4"),
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = [found.target for found in read_trials(log)]
    assert named == ["x86-64-v4-vnni", "x86-64-v3", "x86-64", "rpi4"]
