"""A budget that widths share with what is added to the cut network afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_vit
from training_material import stripes
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.network.count import count_params
from vitrim.compress.train.later_cost import LaterCost
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError

ADDED = 5_000


def task(ratio: float, later: LaterCost, **settings: float) -> MaskTask:
    model = lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4, patch_size=4, depth=3))
    given: dict[str, Any] = {"update_steps": 2, "round_to": 4, **settings}
    options = MaskSettings(budget=Budget("params", ratio), **given)
    return MaskTask(model, options, 24, later=later)


def test_what_is_added_later_is_part_of_the_budget(tmp_path: Path) -> None:
    learning = task(0.5, LaterCost(lambda cut: count_params(cut) + ADDED))
    whole = count_params(learning.dense)
    settings = TrainSettings(epochs=3, batch_size=16, quiet=True, threads=1)
    fit(learning, stripes(), settings, tmp_path)
    found = count_params(learning.result().architecture) + ADDED
    assert 0.45 * whole < found <= 0.5 * whole


def test_what_it_needs_is_not_removed(tmp_path: Path) -> None:
    names = [branch.name for branch in task(0.5, LaterCost(count_params)).dense.branches]
    overheads = {"attention_overhead_macs": 1e9, "ffn_overhead_macs": 1e9}
    learning = task(0.3, LaterCost(count_params, frozenset(names[:3])), **overheads)
    settings = TrainSettings(epochs=3, batch_size=16, quiet=True, threads=1)
    fit(learning, stripes(), settings, tmp_path)
    left = {branch.name for branch in learning.result().architecture.branches}
    assert set(names[:3]) <= left < set(names)


def test_a_budget_that_it_exceeds_alone_is_refused() -> None:
    with pytest.raises(InputError, match=r"budget params = 0.5: not feasible; with what selec"):
        task(0.5, LaterCost(lambda cut: 10**9))
