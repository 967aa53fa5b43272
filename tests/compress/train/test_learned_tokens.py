"""Tokens are learned beside widths: one budget, nested sets, and the patches that matter stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import vitrim
from tiny_models import relative_error, tiny_vit
from torch.nn import functional as F
from training_material import stripes
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import DataSplits, Split
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.masks.token_sets import token_sets
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery.plan import plan
from vitrim.compress.train.evaluate import evaluate
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.settings import TrainSettings
from vitrim.compress.train.task import EpochEnd

EPOCHS, STEPS = 4, 8
TOKENS_ONLY = ("head", "embed", "ffn", "qk", "v")


def learn(folder: Path, settings: MaskSettings, *, resume: bool = False, **model: Any) -> MaskTask:
    """One whole mask-learning phase on the stripes, with 16 patches."""
    options = {"num_classes": 4, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "depth": 3}
    task = MaskTask(lift(tiny_vit(**{**options, **model})), settings, EPOCHS * STEPS)
    training = TrainSettings(epochs=EPOCHS, batch_size=16, quiet=True, threads=1)
    fit(task, stripes(), training, folder, resume=resume)
    return task


def corner(images: int = 256) -> DataSplits:
    """4 x 4 patches of noise; which of the first 2 x 2 is bright is the class."""
    generator = np.random.Generator(np.random.PCG64(0))
    preprocessing = Preprocessing(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)

    def split(count: int) -> Split:
        targets = np.arange(count) % 4
        pixels = generator.integers(0, 120, (count, 3, 16, 16), dtype=np.uint8)
        for image, target in zip(pixels, targets, strict=True):
            row, column = 4 * (target // 2), 4 * (target % 2)
            image[:, row : row + 4, column : column + 4] += 130
        return Split(pixels, targets.astype(np.int64), preprocessing)

    names = ("a", "b", "c", "d")
    return DataSplits("corner", split(images), split(32), split(64), names, preprocessing)


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, {}),
        ({"fixed": TOKENS_ONLY}, {"name": "deit_tiny_distilled_patch16_224"}),
        ({"sharing": "unshared"}, {}),
        ({"round_to": 4}, {"class_token": False, "global_pool": "avg"}),
        ({"attention_overhead_macs": 2e6, "ffn_overhead_macs": 2e6}, {}),
    ],
    ids=["tokens and widths", "tokens alone", "unshared", "rounded, pooled", "whole sub-layers"],
)
def test_learned_tokens_meet_the_budget_and_equal_their_cut(
    tmp_path: Path, options: dict[str, Any], model: dict[str, Any]
) -> None:
    settings = MaskSettings(budget=Budget("macs", 0.5), update_steps=2, tokens=True, **options)
    task = learn(tmp_path, settings, **model)
    cut = task.result()
    params, macs = count_params(cut.architecture), count_macs(cut.architecture)
    # Tokens alone are coarse in a tiny network.
    assert (0.93 if options.get("fixed") else 0.98) * task.dense_cost <= macs * 2 <= task.dense_cost
    assert task.size() == (params, macs)
    assert cut.architecture.step_tokens()[0] < task.dense.tokens
    network, mask = task.reference()
    images = torch.randn(4, 3, 16, 16)
    assert relative_error(cut(images), vitrim.masked(network, mask)(images)) < 1e-5
    if "attention_overhead_macs" in options:
        assert len(cut.architecture.branches) < len(task.dense.branches)
    if options.get("sharing") != "unshared":
        assert task.progress.shrunk
        assert task.gates.settled, "the frozen tokens should have left the training graph"
    # The mask of the dense network has the same sets, although the graph shrank and was reordered.
    mask = task.mask()
    mask.check(task.dense)
    again = plan(task.dense, mask).architecture.model_copy(update={"last_queries": True})
    assert (count_params(again), count_macs(again)) == (params, macs)
    assert set(again.order or ()) == set(cut.architecture.order or ())


def test_shrinking_by_tokens_changes_neither_the_function_nor_the_optimizer() -> None:
    data = stripes()
    settings = MaskSettings(
        budget=Budget("macs", 0.5), update_steps=2, tokens=True, shrink_gain=0.01
    )
    model = lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4, patch_size=4, depth=3))
    task = MaskTask(model, settings, 20)
    optimizer = task.optimizer()
    images, targets = data.train.floats(slice(0, 16)), torch.from_numpy(data.train.targets[:16])
    for step in range(16):
        loss, _ = task.loss(images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(step)
    before, kept, size = task.result()(images), task.mask(), task.size()
    position = task.masked.network.position
    assert position is not None
    moments = optimizer.state[position]["exp_avg"]
    rebuilt = task._shrink()
    assert rebuilt is not None
    network = task.masked.network
    assert network.architecture.order is not None, "patches should have left in this run"
    assert relative_error(task.result()(images), before) < 1e-5
    assert task.size() == size
    assert all(torch.equal(task.mask().kept[name][site], keep) for name, site, keep in kept)
    assert network.position is not None
    channels = task.origin[0]
    rows = moments[list(network.architecture.order)][:, channels]
    assert torch.equal(rebuilt.state[network.position]["exp_avg"], rows)
    loss, _ = task.loss(images, targets)
    loss.backward()
    rebuilt.step()


def trained_on_corner(data: DataSplits) -> CompactModel:
    """A small network that has learned the data set."""
    torch.manual_seed(0)
    model = lift(
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=4,
            embed_dim=32,
            depth=3,
            num_heads=4,
            num_classes=4,
            class_token=False,
            global_pool="avg",
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    targets = torch.from_numpy(data.train.targets)
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(500):
        rows = generator.integers(0, len(targets), 32)
        loss = F.cross_entropy(model(data.train.floats(rows)), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_the_patches_that_show_the_class_stay_longest(tmp_path: Path) -> None:
    """Random sets of equal sizes lose most of them."""
    data = corner()
    model = trained_on_corner(data)
    settings = MaskSettings(
        budget=Budget("macs", 0.5), update_steps=2, tokens=True, fixed=TOKENS_ONLY, lr=1e-3
    )
    task = MaskTask(model, settings, 4 * 16)
    training = TrainSettings(epochs=4, batch_size=16, quiet=True, threads=1)
    fit(task, data, training, tmp_path)
    sets = token_sets(task.dense, task.mask().kept["token"])
    assert sum(int(keep.sum()) for keep in sets) < 0.7 * 16 * len(sets)
    # What the last attention reads; three patches show which of four is bright.
    assert int(sets[-3][[0, 1, 4, 5]].sum()) >= 3
    masks = [task.mask(), *(shuffled(task.mask(), seed) for seed in range(20))]
    learned, *drawn = (
        int(token_sets(task.dense, mask.kept["token"])[-3][[0, 1, 4, 5]].sum()) for mask in masks
    )
    assert learned > sum(drawn) / len(drawn) + 0.5
    assert evaluate(task.result(), data.test) >= 80.0


def shuffled(mask: StructuredMask, seed: int) -> StructuredMask:
    """The same numbers of tokens, drawn at random."""
    drawn = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    entries = {site: keep[drawn] for site, keep in mask.kept["token"].items()}
    return StructuredMask({"token": entries})


class Interrupted(Exception):
    """The end of a process."""


def test_an_interrupted_run_resumes_to_equal_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MaskSettings(budget=Budget("macs", 0.5), update_steps=2, tokens=True)
    whole = learn(tmp_path / "whole", settings)
    after_epoch = MaskTask.after_epoch

    def broken(self: MaskTask, epoch: int, val_top1: float) -> EpochEnd:
        if epoch == 3:
            raise Interrupted
        return after_epoch(self, epoch, val_top1)

    with monkeypatch.context() as patch:
        patch.setattr(MaskTask, "after_epoch", broken)
        with pytest.raises(Interrupted):
            learn(tmp_path / "broken", settings)
    resumed = learn(tmp_path / "broken", settings, resume=True)
    assert whole.progress.shrunk == resumed.progress.shrunk
    for name, site, keep in whole.mask():
        assert torch.equal(resumed.mask().kept[name][site], keep)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(whole.result()(images), resumed.result()(images))


@pytest.mark.parametrize(
    ("size", "named"),
    [({"budget": Budget("params", 0.3)}, r"params = 0\.3"), ({"lambda_": 1e-7}, "lambda")],
)
def test_tokens_need_a_budget_of_multiply_adds(size: dict[str, Any], named: str) -> None:
    with pytest.raises(vitrim.InputError, match=f"no parameters, so {named} sets no price"):
        MaskSettings(tokens=True, **size)
