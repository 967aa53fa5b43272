"""Parts of a batch, averaged weights, rates by depth, and stochastic depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_models import tiny_vit
from training_material import Net, equal_weights, spots, stripes
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.optimizers import OptimizerName, make_optimizer
from vitrim.compress.train.regularization import (
    DenseOptions,
    add_drop_path,
    add_patch_drop,
    rate_scales,
)
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError

SETTINGS = TrainSettings(epochs=3, batch_size=16, augmentation="none", quiet=True, threads=1)


def vit() -> Any:
    torch.manual_seed(0)
    return lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4))


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(tmp_path: Path, parts: int) -> None:
    tasks = [DenseTask(Net(dropout=0.0), lr=3e-3) for _ in range(2)]
    losses = []
    for task, count in zip(tasks, (1, parts), strict=True):
        settings = replace(SETTINGS, accumulate=count)
        result = fit(task, spots(), settings, tmp_path / f"{count}")
        losses.append([line["loss"] for line in result.history])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for a, b in zip(tasks[0].model.parameters(), tasks[1].model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_masks_of_a_batch_in_parts_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for count in (1, 4):
        settings = MaskSettings(budget=Budget("params", 0.4), update_steps=2)
        task = MaskTask(vit(), settings, 3 * 8)
        fit(task, stripes(), replace(SETTINGS, accumulate=count), tmp_path / f"{count}")
        found.append(task.mask())
    for dimension, site, keep in found[0]:
        assert torch.equal(keep, found[1].kept[dimension][site])


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path: Path) -> None:
    task = DenseTask(Net(), lr=3e-3, options=DenseOptions(ema=0.99))
    states: list[dict[str, torch.Tensor]] = []
    real = task.after_step

    def recording(step: int) -> None:
        real(step)
        states.append({key: value.clone() for key, value in task.model.state_dict().items()})

    task.after_step = recording  # type: ignore[method-assign]
    fit(task, spots(), replace(SETTINGS, restore_best=False), tmp_path)
    final = task.model.state_dict()
    assert not torch.equal(final["layers.1.weight"], states[-1]["layers.1.weight"])
    # A mean of the weights that training went through, by the decay that rises to 0.99.
    assert task.average is not None
    average = Net().state_dict()["layers.1.weight"]
    for step, state in enumerate(states):
        decay = task.average.get_decay(step)
        average = decay * average + (1.0 - decay) * state["layers.1.weight"]
    assert torch.allclose(final["layers.1.weight"], average, atol=1e-5)


def test_averaged_weights_resume_to_the_same_bits(tmp_path: Path) -> None:
    options = DenseOptions(ema=0.99, drop_path=0.3)
    whole = DenseTask(vit(), lr=3e-3, options=options)
    fit(whole, stripes(), SETTINGS, tmp_path / "whole")

    class Stop(Exception):
        pass

    broken = DenseTask(vit(), lr=3e-3, options=options)
    real = broken.after_step

    def stopping(step: int) -> None:
        if step == 12:
            raise Stop
        real(step)

    broken.after_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        fit(broken, stripes(), SETTINGS, tmp_path / "broken")
    again = DenseTask(vit(), lr=3e-3, options=options)
    fit(again, stripes(), SETTINGS, tmp_path / "broken", resume=True)
    assert equal_weights(whole.model, again.model)


def test_rates_fall_with_the_distance_to_the_head() -> None:
    model = vit()
    scales = rate_scales(model, 0.5)
    assert scales["head.weight"] == scales["norm.weight"] == 1.0
    assert scales["steps.2.0.core.q.weight"] == scales["steps.3.0.core.fc1.weight"] == 0.5
    assert scales["steps.0.0.norm.weight"] == 0.25
    assert scales["stem.weight"] == scales["position"] == 0.125


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_with_its_rate(name: OptimizerName) -> None:
    model = vit()
    scales = rate_scales(model, 0.5)
    optimizer = make_optimizer(name, model, 1e-2, 0.05, 0.5)
    plain = make_optimizer(name, model, 1e-2, 0.05)
    rate = {id(p): group["lr"] for group in plain.param_groups for p in group["params"]}
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == rate.keys()
    for key, parameter in model.named_parameters():
        assert found[id(parameter)] == pytest.approx(scales[key] * rate[id(parameter)])
    # The history shows the rate of the first group.
    assert optimizer.param_groups[0]["lr"] == max(found.values())


def test_sub_layers_are_skipped_in_training_only() -> None:
    model, images = vit(), torch.randn(64, 3, 16, 16)
    expected = model.eval()(images)
    handles = add_drop_path(model, 0.5)
    # Of two blocks only the second one is skipped.
    assert len(handles) == 2
    assert torch.equal(model.eval()(images), expected)
    torch.manual_seed(0)
    dropped = model.train()(images)
    same = torch.isclose(dropped, expected, atol=1e-5).all(dim=1)
    # Those that lost nothing are scaled by 1 / 0.5.
    assert not same.any()
    for handle in handles:
        handle.remove()
    assert torch.equal(model(images), expected)


def test_nothing_of_stochastic_depth_is_left_after_training(tmp_path: Path) -> None:
    task = DenseTask(vit(), lr=3e-3, options=DenseOptions(drop_path=0.5))
    fit(task, stripes(), SETTINGS, tmp_path)
    assert not any(module._forward_hooks for module in task.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, "ema = 1.0: give a decay between 0 and 1"),
        ({"layer_decay": 0.0}, "layer_decay = 0.0: give a factor above 0"),
        ({"drop_path": 1.0}, "drop_path = 1.0: give a probability below 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DenseOptions(**options)
    with pytest.raises(InputError, match="accumulate = 0 must be at least 1"):
        TrainSettings(epochs=1, accumulate=0)


def test_a_run_killed_within_an_epoch_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    settings = replace(SETTINGS, augmentation="light", checkpoint_s=0.0)
    whole = DenseTask(Net(), lr=3e-3)
    wanted = fit(whole, spots(), settings, tmp_path / "whole")
    broken = DenseTask(Net(), lr=3e-3)

    def stopping(step: int) -> None:
        if step == 9:
            raise Stop

    broken.after_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        fit(broken, spots(), settings, tmp_path / "broken")
    # Epochs have 6 steps; a checkpoint follows each of them.
    assert torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["inside"]
    again = DenseTask(Net(), lr=3e-3)
    steps: list[int] = []
    again.after_step = steps.append  # type: ignore[method-assign, assignment]
    found = fit(again, spots(), settings, tmp_path / "broken", resume=True)
    assert steps == list(range(9, 18))
    assert equal_weights(whole.model, again.model)
    for key in ("epoch", "loss", "train_top1", "val_top1", "lr"):
        assert [line[key] for line in found.history] == [line[key] for line in wanted.history]


def test_patch_drop_leaves_out_random_patches_in_training_only() -> None:
    model = vit()
    seen: list[int] = []
    model.steps[0][0].register_forward_hook(lambda module, inputs, y: seen.append(y.shape[1]))
    images = torch.randn(2, 3, 16, 16)
    whole = model.architecture.tokens
    task = DenseTask(model, options=DenseOptions(patch_drop=0.5))
    model.train()(images)
    model.eval()(images)
    task.finish()
    model.train()(images)
    prefix = model.architecture.prefix
    assert seen == [prefix + (whole - prefix) // 2, whole, whole]


def test_patch_drop_is_refused_where_scores_depend_on_positions() -> None:
    rotary = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=32, num_heads=2, num_classes=3
    )
    with pytest.raises(InputError, match=r"patch_drop = 0.5: blocks.0.attn has rotary or relative"):
        add_patch_drop(lift(rotary), 0.5)
