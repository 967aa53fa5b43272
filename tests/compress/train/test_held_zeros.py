"""Zeros among weights stay zero through training, whatever the optimizer does; rounds of masks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from tiny_models import tiny_vit
from training_material import equal_weights, stripes
from vitrim import WeightMask
from vitrim.compress.masks.weight_choice import WeightOptions, round_sparsities
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.loop import CHECKPOINT, fit
from vitrim.compress.train.magnitude_task import MagnitudeTask
from vitrim.compress.train.regularization import DenseOptions
from vitrim.compress.train.schedule import Schedule
from vitrim.compress.train.settings import TrainSettings
from vitrim.compress.train.training_files import read_state
from vitrim.core.errors import InputError

QUICK = TrainSettings(epochs=2, batch_size=16, augmentation="none", quiet=True)
DATA = stripes(48)


class Crash(Exception):
    """Raised in place of a crash."""


def network() -> CompactModel:
    return vitrim.lift(tiny_vit(num_classes=4))


def zeros(model: torch.nn.Module, mask: WeightMask) -> None:
    """Check that exactly what the mask removes is zero."""
    for name, keep in mask.kept.items():
        weight = model.get_parameter(name).detach()
        assert not bool(weight[~keep].any())
        assert bool(weight[keep].all())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "muon"},
        {"weight_decay": 0.5},
        {"options": DenseOptions(ema=0.9, layer_decay=0.7)},
        {"options": DenseOptions(ema=0.9), "optimizer": "muon"},
    ],
    ids=["adamw", "muon", "decay", "average", "average of muon"],
)
def test_zeros_stay_after_every_step(tmp_path: Path, options: dict[str, Any]) -> None:
    model = network()
    mask = WeightMask.from_magnitude(model, 0.8)

    class Watched(DenseTask):
        steps = 0

        def after_step(self, step: int) -> None:
            super().after_step(step)
            zeros(self.model, mask)
            zeros(self.model_for_eval(), mask)
            # Gradients are those of the kept weights.
            for name, keep in mask.kept.items():
                gradient = self.model.get_parameter(name).grad
                assert gradient is not None
                assert not bool(gradient[~keep].any())
                assert bool(gradient[keep].any())
            self.steps += 1

    before = copy.deepcopy(model)
    task = Watched(model, phase="finetune", weights=mask, lr=1e-2, **options)
    fit(task, DATA, QUICK, tmp_path)
    assert task.steps == 6
    zeros(model, mask)
    assert not equal_weights(model, mask.zeroed(before))


def test_gradients_are_whole_again_after_the_phase(tmp_path: Path) -> None:
    model = network()
    mask = WeightMask.from_magnitude(model, 0.8)
    fit(DenseTask(model, weights=mask), DATA, replace(QUICK, epochs=1), tmp_path)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    name = next(iter(mask.kept))
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    assert bool(gradient[~mask.kept[name]].any())


def test_an_overflowed_gradient_stays_zero() -> None:
    model = network()
    mask = WeightMask.from_magnitude(model, 0.8)
    DenseTask(model, weights=mask)
    name = next(iter(mask.kept))
    weight = model.get_parameter(name)
    (weight * torch.inf).sum().backward()
    assert weight.grad is not None
    removed = weight.grad[~mask.kept[name]]
    assert torch.equal(removed, torch.zeros_like(removed))


def test_the_mask_of_another_network_is_refused() -> None:
    mask = WeightMask.from_magnitude(tiny_vit(depth=1, num_classes=4))
    with pytest.raises(InputError, match="made for a network with other parameters"):
        DenseTask(network(), weights=mask)


def rounds_task(model: CompactModel, kind: type[MagnitudeTask], **options: Any) -> MagnitudeTask:
    choice = WeightOptions(0.9)
    return kind(model, choice, round_sparsities(0.9, 3), 2, lr=1e-2, **options)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_each_round_trains_with_more_zeros(tmp_path: Path, ema: float | None) -> None:
    model = network()
    seen: list[float] = []

    class Watched(MagnitudeTask):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            zeros(self.model, self.mask)
            zeros(self.model_for_eval(), self.mask)
            seen.append(self.mask.sparsity)

    task = rounds_task(model, Watched, options=DenseOptions(ema=ema))
    result = fit(task, DATA, replace(QUICK, epochs=4), tmp_path)
    kept = 0.1 ** (1 / 3)
    assert seen == pytest.approx([1 - kept] * 6 + [1 - kept**2] * 6, abs=1e-3)
    assert task.mask.sparsity == pytest.approx(0.9, abs=1e-3)
    zeros(model, task.mask)
    # An earlier round is more accurate and has fewer zeros, so it cannot be the best.
    assert result.best_epoch > 2
    assert [line["sparsity"] for line in result.history] == pytest.approx(seen[::3])


def test_a_resumed_round_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, again = network(), network()
    settings = replace(
        QUICK, epochs=4, schedule=Schedule("restarts", restart_epochs=2, rewind=0.25)
    )
    first = rounds_task(whole, MagnitudeTask, optimizer="muon")
    fit(first, DATA, settings, tmp_path / "whole")

    class Crashing(MagnitudeTask):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 10:
                raise Crash

    with pytest.raises(Crash):
        fit(rounds_task(again, Crashing, optimizer="muon"), DATA, settings, tmp_path / "again")
    state = read_state(tmp_path / "again" / CHECKPOINT)["task"]
    assert state["round"] == 1
    assert state["kept"]["steps.0.0.core.q.weight"].dtype == torch.bool
    resumed = rounds_task(network(), MagnitudeTask, optimizer="muon")
    fit(resumed, DATA, settings, tmp_path / "again", resume=True)
    assert equal_weights(whole, resumed.model)
    assert all(torch.equal(keep, resumed.mask.kept[name]) for name, keep in first.mask.kept.items())


def test_a_checkpoint_from_before_rewinding_is_resumed(tmp_path: Path) -> None:
    model = network()
    fit(DenseTask(model), DATA, QUICK, tmp_path)
    state = read_state(tmp_path / CHECKPOINT)
    assert "rewind" not in state["settings"]["schedule"]
    again = DenseTask(network())
    assert fit(again, DATA, QUICK, tmp_path, resume=True).epochs == 2
    rewound = replace(QUICK, schedule=Schedule(rewind=0.5))
    with pytest.raises(InputError, match="it was trained with schedule"):
        fit(DenseTask(network()), DATA, rewound, tmp_path, resume=True)
