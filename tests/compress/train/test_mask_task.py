"""Mask learning meets its budget, equals its cut model, shrinks exactly, and resumes exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
import warm_processes
from tiny_models import relative_error, tiny_vit
from torch.nn import functional
from training_material import stripes
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.network.architecture import AttentionSpec
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.surgery.plan import plan
from vitrim.compress.train.dense import Distillation
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.optimizers import OptimizerName
from vitrim.compress.train.settings import TrainSettings

EPOCHS, STEPS = 4, 8
# Large for these tiny networks, so that sub-layers are removed as a whole.
WHOLE: dict[str, Any] = {"attention_overhead_macs": 1e5, "ffn_overhead_macs": 1e5}
KILLED = MaskSettings(budget=Budget("params", 0.35), update_steps=2, **WHOLE)


def learn(folder: Path, settings: MaskSettings, *, resume: bool = False, **model: Any) -> MaskTask:
    """One whole mask-learning phase on the stripes."""
    task = MaskTask(
        lift(tiny_vit(**{"num_classes": 4, "embed_dim": 32, "num_heads": 4, **model})),
        settings,
        EPOCHS * STEPS,
    )
    fit(
        task,
        stripes(),
        TrainSettings(epochs=EPOCHS, batch_size=16, quiet=True, threads=1),
        folder,
        resume=resume,
    )
    return task


@pytest.mark.parametrize(
    "settings",
    [
        MaskSettings(budget=Budget("params", 0.3), update_steps=2),
        MaskSettings(budget=Budget("macs", 0.4), update_steps=2, sharing="full"),
        MaskSettings(budget=Budget("params", 0.5), update_steps=2, sharing="unshared"),
        MaskSettings(budget=Budget("params", 0.4), update_steps=2, fixed=("head", "embed")),
        MaskSettings(budget=Budget("params", 0.5), update_steps=2, round_to=4),
        MaskSettings(budget=Budget("params", 0.3), update_steps=2, optimizer="muon", lr=5e-3),
        MaskSettings(budget=Budget("params", 0.35), update_steps=2, **WHOLE),
        MaskSettings(budget=Budget("macs", 0.4), update_steps=2, round_to=4, **WHOLE),
    ],
    ids=[
        "params",
        "macs, full",
        "unshared",
        "fixed",
        "rounded",
        "muon",
        "whole sub-layers",
        "whole sub-layers, macs",
    ],
)
def test_learned_masks_meet_the_budget_and_equal_their_cut(
    tmp_path: Path, settings: MaskSettings
) -> None:
    task = learn(tmp_path, settings)
    assert settings.budget is not None
    network, mask = task.reference()
    cut = task.result(last_queries=False)
    spent = {"params": count_params, "macs": count_macs}[settings.budget.kind](cut.architecture)
    target = settings.budget.ratio * task.dense_cost
    # Units of a tiny network are coarse; with `full` sharing one unit is removed from every block.
    assert (0.95 if settings.sharing == "full" else 0.985) * target <= spent <= target
    images = torch.randn(4, 3, 16, 16)
    assert relative_error(cut(images), vitrim.masked(network, mask)(images)) < 1e-5
    if settings.fixed:
        attention = cut.architecture.branches[0].core
        assert cut.architecture.embed == 32
        assert attention.heads == 4  # type: ignore[union-attr]
    if settings.ffn_overhead_macs:
        assert len(cut.architecture.branches) < len(task.dense.branches), (
            "a sub-layer should have been removed as a whole"
        )
    if settings.round_to == 4:
        assert cut.architecture.embed % 4 == 0


@pytest.mark.parametrize(
    "settings",
    [
        MaskSettings(budget=Budget("params", 0.35), update_steps=2),
        MaskSettings(budget=Budget("macs", 0.4), update_steps=2, round_to=2),
        MaskSettings(lambda_=1e-4, score_lr=0.05),
    ],
    ids=["params", "macs, rounded", "lambda"],
)
def test_grouped_queries_are_learned_counted_and_cut(
    tmp_path: Path, settings: MaskSettings
) -> None:
    """Two heads per key/value head in one block, four in the other; rope, RMSNorm, qk norms."""
    task = learn(
        tmp_path, settings, name="vit_base_patch16_sapiens2", num_kv_heads=(2, 1), qk_norm=True
    )
    assert [
        core.kv_of
        for branch in task.dense.branches
        if isinstance(core := branch.core, AttentionSpec)
    ] == [(0, 0, 1, 1), (0, 0, 0, 0)]
    network, mask = task.reference()
    cut = task.result(last_queries=False)
    assert task.size() == (count_params(cut.architecture), count_macs(cut.architecture))
    if settings.budget is None:
        assert count_params(cut.architecture) < count_params(task.dense)
    else:
        spent = {"params": count_params, "macs": count_macs}[settings.budget.kind](cut.architecture)
        target = settings.budget.ratio * task.dense_cost
        assert 0.985 * target <= spent <= target
        assert task.progress.shrunk, "the training graph should have shrunk in this run"
    images = torch.randn(4, 3, 16, 16)
    assert relative_error(cut(images), vitrim.masked(network, mask)(images)) < 1e-5


@pytest.mark.parametrize("overheads", [{}, WHOLE])
def test_the_mask_fits_the_dense_model_although_the_graph_shrank(
    tmp_path: Path, overheads: dict[str, Any]
) -> None:
    task = learn(tmp_path, MaskSettings(budget=Budget("params", 0.35), update_steps=2, **overheads))
    assert task.progress.shrunk, "the training graph should have shrunk in this run"
    mask = task.mask()
    mask.check(task.dense)
    assert count_params(plan(task.dense, mask).architecture) == count_params(
        task.result(last_queries=False).architecture
    )


@pytest.mark.parametrize(
    ("optimizer_name", "overheads"), [("adamw", {}), ("muon", {}), ("muon", WHOLE)]
)
def test_shrinking_changes_neither_the_function_nor_the_optimizer(
    optimizer_name: OptimizerName, overheads: dict[str, Any]
) -> None:
    data = stripes()
    settings = MaskSettings(
        budget=Budget("params", 0.35), update_steps=2, optimizer=optimizer_name, **overheads
    )
    task = MaskTask(lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4)), settings, 20)
    optimizer = task.optimizer()
    images, targets = data.train.floats(slice(0, 16)), torch.from_numpy(data.train.targets[:16])
    for step in range(16):
        loss, _ = task.loss(images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(step)
    before, kept = task.result()(images), task.mask()
    rebuilt = task._shrink()
    assert rebuilt is not None
    assert relative_error(task.result()(images), before) < 1e-5
    assert all(torch.equal(task.mask().kept[name][site], keep) for name, site, keep in kept)
    for name, parameter in task.masked.network.named_parameters():
        moments = rebuilt.state[parameter]
        assert moments, name
        assert all(
            moment.shape == parameter.shape
            for moment in moments.values()
            if isinstance(moment, torch.Tensor) and moment.ndim
        ), name
        assert float(moments.get("step", 16)) == 16
    loss, _ = task.loss(images, targets)
    loss.backward()
    rebuilt.step()


def test_lambda_removes_units_and_stops_when_nothing_improves(tmp_path: Path) -> None:
    settings = MaskSettings(lambda_=1e-4, score_lr=0.05, size_patience_epochs=2)
    task = learn(tmp_path / "removed", settings)
    assert task.size()[0] < count_params(task.dense)
    still = MaskTask(
        lift(tiny_vit(num_classes=4)),
        MaskSettings(lambda_=0.0, score_lr=1e-9, lr=0.0, size_patience_epochs=2),
        99,
    )
    result = fit(
        still,
        stripes(),
        TrainSettings(epochs=9, batch_size=16, quiet=True, threads=1),
        tmp_path / "still",
    )
    assert result.epochs == 3
    assert result.stopped == "no better accuracy and no smaller size for 2 epochs"


@pytest.mark.parametrize("both", [{"budget": Budget("params", 0.3), "lambda_": 1e-7}, {}])
def test_budget_and_lambda_exclude_each_other(both: dict[str, Any]) -> None:
    with pytest.raises(vitrim.InputError, match=r"either a budget .* or lambda"):
        MaskSettings(**both)


def test_a_removed_sub_layer_costs_nothing_and_the_others_use_the_budget() -> None:
    settings = MaskSettings(
        budget=Budget("params", 0.4),
        update_steps=1,
        attention_overhead_macs=1e12,
        ffn_overhead_macs=1e12,
    )
    task = MaskTask(lift(tiny_vit()), settings, 20)
    images, targets = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    for step in range(14):
        task.loss(images, targets)[0].backward()
        task.after_step(step)
    # At this overhead every sub-layer is too expensive, but the rest must still use the budget.
    assert task.gates.removed
    assert 0.97 * 0.4 * task.dense_cost <= task.size()[0] <= 0.4 * task.dense_cost
    assert task.size() == (
        count_params(task.result(False).architecture),
        count_macs(task.result(False).architecture),
    )


def test_an_infeasible_budget_is_refused_before_training() -> None:
    with pytest.raises(
        vitrim.InputError, match=r"not feasible; with sharing = 'residual' the smallest is"
    ):
        MaskTask(lift(tiny_vit()), MaskSettings(budget=Budget("params", 0.0001)), 10)


def learn_until_killed(folder: Path) -> None:
    """The process ends in its third epoch, as by `kill -9`."""
    whole = MaskTask.after_epoch

    def after_epoch(self: MaskTask, epoch: int, val_top1: float) -> Any:
        if epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, epoch, val_top1)

    MaskTask.after_epoch = after_epoch  # type: ignore[method-assign]
    learn(folder, KILLED)


def test_a_killed_run_resumes_to_equal_masks(tmp_path: Path) -> None:
    killed = warm_processes.start(learn_until_killed, tmp_path / "broken", log=tmp_path / "log")
    assert killed.wait() == -signal.SIGKILL, killed.errors()
    whole = learn(tmp_path / "whole", KILLED).mask()
    resumed = learn(tmp_path / "broken", KILLED, resume=True).mask()
    assert resumed.kept.keys() == whole.kept.keys()
    for dimension, site, keep in whole:
        assert torch.equal(keep, resumed.kept[dimension][site])


def test_in_bfloat16_neither_teacher_nor_shrunk_network_uses_fused_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []
    fused = functional.scaled_dot_product_attention

    def counted(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(q.shape)
        return fused(q, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    teacher = lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4))
    task = MaskTask(
        lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4)),
        MaskSettings(budget=Budget("params", 0.3), update_steps=2),
        EPOCHS * STEPS,
        distillation=Distillation(teacher, alpha=0.5, temperature=2.0),
    )
    calls.clear()
    settings = TrainSettings(
        epochs=EPOCHS, batch_size=16, quiet=True, threads=1, matmul_precision="medium"
    )
    fit(task, stripes(), settings, tmp_path)
    assert calls == []
    teacher(torch.zeros(1, *stripes().train.floats(slice(0, 1)).shape[1:]))
    assert calls != []
