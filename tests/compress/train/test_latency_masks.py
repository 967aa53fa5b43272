"""Masks that are learned for a latency: never above it by the table, and rounded by a programme."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import COSTS, latency_table
from tiny_models import relative_error, tiny_vit
from training_material import stripes
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.latency.solution import Limits
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget, DualSolver
from vitrim.compress.masks.gates import Gates
from vitrim.compress.network.live_latency import NS_PER_MS, LatencyCost
from vitrim.compress.oneshot.budgets import file_bytes
from vitrim.compress.surgery.plan import plan
from vitrim.compress.train.freezing import Rounding, least_latency_ms, round_to_latency, snapped
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_freeze import least_masked_ms
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError
from vitrim.targets.cost_table import CostTable

TABLE = latency_table()
# Sub-layers of a tiny network that are worth less than their fixed costs.
HEAVY = latency_table(costs_ms=COSTS | {"attention": 0.1, "ffn": 0.1})
EPOCHS, STEPS = 3, 8
OVERHEADS: dict[str, Any] = {"attention_overhead_macs": 1.0, "ffn_overhead_macs": 1.0}


def learn(folder: Path, share: float, table: CostTable, **options: Any) -> MaskTask:
    """One whole mask-learning phase on the stripes, with 16 patches."""
    settings = MaskSettings(budget=Budget("latency", share, table), update_steps=2, **options)
    model = tiny_vit(num_classes=4, embed_dim=32, num_heads=4, patch_size=4, depth=3)
    task = MaskTask(lift(model), settings, EPOCHS * STEPS)
    training = TrainSettings(epochs=EPOCHS, batch_size=16, quiet=True, threads=1)
    fit(task, stripes(), training, folder)
    return task


@pytest.mark.parametrize(
    ("share", "options"),
    [
        (0.7, {"round_to": 4}),
        (0.6, {"tokens": True, "round_to": 2}),
        (0.75, {"sharing": "full"}),
        (0.45, {"tokens": True, **OVERHEADS}),
    ],
    ids=["rounded", "tokens", "full", "whole sub-layers"],
)
def test_learned_masks_are_within_the_latency_and_equal_their_cut(
    tmp_path: Path, share: float, options: dict[str, Any]
) -> None:
    table = HEAVY if "attention_overhead_macs" in options else TABLE
    task = learn(tmp_path, share, table, **options)
    cut = task.result()
    dense_ms = table.latency_ms(network_shape(task.dense))
    found_ms = table.latency_ms(network_shape(cut.architecture))
    assert 0.88 * share * dense_ms <= found_ms <= share * dense_ms
    assert task.latency_ms() == pytest.approx(found_ms, abs=2 / NS_PER_MS)
    network, mask = task.reference()
    images = torch.randn(4, 3, 16, 16)
    assert relative_error(cut(images), vitrim.masked(network, mask)(images)) < 1e-5
    again = plan(task.dense, task.mask()).architecture
    assert table.latency_ms(network_shape(again)) == pytest.approx(found_ms)
    if "attention_overhead_macs" in options:
        assert len(cut.architecture.branches) < len(task.dense.branches)
    if options.get("round_to") == 4:
        assert cut.architecture.embed % 4 == 0
        # A file that is measured to be too slow makes the masks smaller.
        task.tighten(0.9 * found_ms)
        smaller = task.result()
        assert TABLE.latency_ms(network_shape(smaller.architecture)) <= 0.9 * found_ms
        network, mask = task.reference()
        assert relative_error(smaller(images), vitrim.masked(network, mask)(images)) < 1e-5
        with pytest.raises(InputError, match="the smallest latency that can be reached is"):
            task.tighten(1e-3)


def problem(seed: int, tokens: bool) -> DualSolver:
    """Random saliencies of a network of three blocks."""
    model = lift(tiny_vit(embed_dim=32, num_heads=4, patch_size=4, depth=3)).architecture
    architecture = model.model_copy(update={"last_queries": True})
    gates = Gates(architecture, "residual", tokens=tokens)
    solver = DualSolver(architecture, gates, LatencyCost(TABLE))
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(group.size, generator=generator) for group in gates.groups]
    solver.observe(gradients, gates.kept())
    return solver


@settings(max_examples=6)
@given(seed=st.integers(0, 99), share=st.floats(0.5, 0.95), tokens=st.booleans())
def test_the_programme_is_within_the_budget_and_not_worse_than_the_greedy_search(
    seed: int, share: float, tokens: bool
) -> None:
    solver = problem(seed, tokens)
    everything = solver.gates.kept()
    target = int(share * solver.cost(everything))
    kept = solver.solve(everything, target)
    limits, rounding = Limits(target / NS_PER_MS), Rounding(TABLE, 4)
    greedy = snapped(solver, kept, 4, target)
    found = round_to_latency(solver, kept, limits, rounding, greedy)
    cut = plan(solver.architecture, solver.gates.mask(found.kept)).architecture
    assert found.latency_ms == pytest.approx(TABLE.latency_ms(network_shape(cut)))
    assert found.latency_ms * NS_PER_MS <= target * (1 + 1e-9)
    alone = round_to_latency(solver, greedy, limits, rounding)
    lost = sum(
        float(values[~keep].sum())
        for group, values, keep in zip(solver.gates.groups, solver.saliency, greedy, strict=True)
        if group.dimension != "token"
    )
    if not tokens:
        assert found.loss <= lost + 1e-9
    assert not found.removed
    assert not alone.removed


def test_a_sub_layer_leaves_at_the_freeze_only_where_the_budget_needs_it() -> None:
    solver = problem(0, tokens=False)
    rounding = Rounding(TABLE, 4)
    least_ms = least_latency_ms(solver, solver.gates.kept(), rounding)
    found = round_to_latency(solver, solver.gates.kept(), Limits(1.02 * least_ms), rounding)
    assert found.removed
    assert found.latency_ms <= 1.02 * least_ms
    pinned = Rounding(TABLE, 4, removable=())
    with pytest.raises(InputError, match="the smallest latency that can be reached is"):
        round_to_latency(solver, solver.gates.kept(), Limits(1.02 * least_ms), pinned)


@pytest.mark.parametrize("gone", [False, True], ids=["all attentions", "the first one removed"])
def test_patches_leave_at_the_stem_at_the_freeze(gone: bool) -> None:
    solver = problem(3, tokens=True)
    if gone:
        solver.gates.remove_branch(solver.architecture.branches[0].name)
    # Embedding patches costs more than all else, and sub-layers stay.
    dear = latency_table(costs_ms=COSTS | {"stem": 1e-3})
    rounding = Rounding(dear, 4, removable=())
    everything = solver.gates.kept()
    whole = plan(solver.architecture, solver.gates.mask(everything)).architecture
    whole_ms = dear.latency_ms(network_shape(whole))
    least_ms = least_latency_ms(solver, everything, rounding)
    assert least_ms < 0.2 * whole_ms
    counts = []
    for share in (0.5, 0.25, 1.02 * least_ms / whole_ms):
        found = round_to_latency(solver, everything, Limits(share * whole_ms), rounding)
        # Law 9: the sets are nested, which the plan of the mask validates.
        cut = plan(solver.architecture, solver.gates.mask(found.kept)).architecture
        assert found.latency_ms == pytest.approx(dear.latency_ms(network_shape(cut)))
        assert found.latency_ms <= share * whole_ms * (1 + 1e-9)
        assert not found.removed
        _, sets = solver.gates.split(found.kept)
        assert cut.tokens == cut.prefix + int(sets[0].sum())
        counts.append(cut.tokens)
    assert solver.architecture.tokens >= counts[0] > counts[1] > counts[2]
    # Patches that the learned gates keep out of the stem do not return.
    again = round_to_latency(solver, found.kept, Limits(2 * whole_ms), rounding)
    assert torch.equal(solver.gates.split(again.kept)[1][0], sets[0])


def test_a_file_size_is_a_budget_beside_the_latency() -> None:
    solver = problem(1, tokens=False)
    everything = solver.gates.kept()
    latency_ms = solver.cost(everything) / NS_PER_MS
    file_mb = 0.6 * file_bytes(solver.architecture, "fp32") / 1e6
    limits = Limits(latency_ms, file_mb=file_mb)
    found = round_to_latency(solver, everything, limits, Rounding(TABLE, 4), everything)
    cut = plan(solver.architecture, solver.gates.mask(found.kept)).architecture
    assert file_bytes(cut, "fp32") <= 1.01e6 * file_mb
    assert found.latency_ms < latency_ms


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (0.05, {}, r"budget latency_ms = .*: the smallest latency that learned masks can reach is"),
        (0.6, {"sharing": "unshared"}, 'sharing = "unshared": a latency is that of one width'),
    ],
)
def test_a_latency_that_cannot_be_reached_is_refused_before_training(
    share: float, options: dict[str, Any], message: str
) -> None:
    settings = MaskSettings(budget=Budget("latency", share, TABLE), **OVERHEADS, **options)
    with pytest.raises(InputError, match=message):
        MaskTask(lift(tiny_vit(num_classes=4)), settings, 10)
    with pytest.raises(InputError, match="file_mb is a budget beside a latency"):
        MaskSettings(budget=Budget("macs", 0.5), file_mb=1.0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"file_mb": 1e-3}, "file_mb = 0.001: the smallest weights that can be reached are"),
        ({"peak_memory_mb": 1e-3}, "peak_memory_mb = 0.001: the smallest memory of weights and"),
    ],
)
def test_a_size_that_cannot_be_reached_is_refused_before_training(
    limits: dict[str, Any], message: str
) -> None:
    """Not at the freeze, when most of the training is over."""
    model = lift(tiny_vit(num_classes=4))
    settings = MaskSettings(budget=Budget("latency", 0.9, TABLE), **limits)
    with pytest.raises(InputError, match=message) as caught:
        MaskTask(model, settings, 10)
    [(name, _)] = limits.items()
    least = float(str(caught.value).split("are " if name == "file_mb" else " is ")[1].split()[0])
    limit: dict[str, Any] = {name: least}
    MaskTask(model, replace(settings, **limit), 10)


def test_weights_at_the_freeze_have_the_precision_of_the_table() -> None:
    solver = problem(1, tokens=False)
    everything = solver.gates.kept()
    table = latency_table(precision="int8")
    whole_mb = file_bytes(solver.architecture, "int8") / 1e6
    limits = Limits(solver.cost(everything) / NS_PER_MS, file_mb=1.01 * whole_mb)
    kept = round_to_latency(solver, everything, limits, Rounding(table, 4)).kept
    assert all(bool(keep.all()) for keep in kept)
    smaller = round_to_latency(solver, everything, limits, Rounding(table, 4, precision="fp32"))
    assert not all(bool(keep.all()) for keep in smaller.kept)


@pytest.mark.parametrize("sharing", ["residual", "full"])
def test_the_least_latency_of_masks_can_be_learned(sharing: Any) -> None:
    model = lift(tiny_vit(num_classes=4))
    settings = MaskSettings(
        budget=Budget("latency", 1.0, TABLE), sharing=sharing, round_to=4, **OVERHEADS
    )
    least_ms = least_masked_ms(model.architecture, settings)
    dense_ms = TABLE.latency_ms(network_shape(model.architecture))
    assert least_ms < dense_ms
    enough = Budget("latency", (least_ms + 3 / NS_PER_MS) / dense_ms, TABLE)
    MaskTask(model, replace(settings, budget=enough), 10)
    with pytest.raises(InputError):
        MaskTask(model, replace(settings, budget=replace(enough, ratio=0.98 * enough.ratio)), 10)
