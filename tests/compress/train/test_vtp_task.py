"""Control coefficients: the cut equals the masked network, meets its budget, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import relative_error, tiny_vit
from training_material import equal_weights, stripes
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.settings import TrainSettings
from vitrim.compress.train.vtp_task import VtpTask
from vitrim.core.errors import InputError

NETWORKS: tuple[dict[str, Any], ...] = (
    {},
    {"qk_norm": True, "init_values": 0.1},
    {"name": "vit_base_patch16_sapiens2", "num_heads": 4, "embed_dim": 32, "num_kv_heads": (2, 1)},
)
COUNTS = {"params": count_params, "macs": count_macs}


def drawn(network: dict[str, Any], options: MaskSettings, seed: int) -> VtpTask:
    """A task with random coefficients."""
    task = VtpTask(lift(tiny_vit(**network)), options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scores in task.coefficients.scores:
            scores.copy_(torch.rand(scores.shape, generator=generator))
    return task


@settings(max_examples=10)
@given(
    network=st.sampled_from(NETWORKS),
    kind=st.sampled_from(["params", "macs"]),
    ratio=st.floats(0.35, 0.95),
    sharing=st.sampled_from(["residual", "full"]),
    round_to=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_the_cut_of_any_coefficients_equals_the_masked_network(
    network: dict[str, Any], kind: Any, ratio: float, sharing: Any, round_to: int, seed: int
) -> None:
    options = MaskSettings(budget=Budget(kind, ratio), sharing=sharing, round_to=round_to)
    task = drawn(network, options, seed)
    whole, mask = task.reference()
    cut = task.result(last_queries=False)
    images = torch.randn(2, 3, 16, 16)
    assert relative_error(cut(images), vitrim.masked(whole, mask)(images)) < 1e-5
    assert COUNTS[kind](cut.architecture) <= ratio * task.dense_cost
    if round_to == 1:
        threshold = float(mask.note["threshold"])
        for group, scores in zip(task.coefficients.groups, task.coefficients.scores, strict=True):
            values = group.gather(scores.detach())
            keep = group.gather(mask.kept[group.dimension][group.site].float()) > 0.5
            best = values == values.max()
            assert bool((keep == ((values >= threshold - 1e-6) | best)).all())


def test_the_coefficients_are_factors_of_what_projections_read() -> None:
    task = drawn({}, MaskSettings(budget=Budget("params", 0.5)), 3)
    dense = lift(tiny_vit())
    images = torch.randn(2, 3, 16, 16)
    # By hooks on the inputs, independent of the table of axes.
    value = task.coefficients.value
    task.coefficients.begin()

    def scale(factor: torch.Tensor | None) -> Any:
        assert factor is not None
        return lambda module, inputs: (inputs[0] * factor, *inputs[1:])

    embed = value("embed", "*")
    assert dense.head is not None
    dense.head.register_forward_pre_hook(scale(embed))
    steps: Any = dense.steps
    for step in steps:
        for branch in step:
            core, name = branch.core, branch.spec.name
            if hasattr(core, "fc1"):
                core.fc1.register_forward_pre_hook(scale(embed))
                core.fc2.register_forward_pre_hook(scale(value("ffn", name)))
                continue
            for leaf in ("q", "k", "v"):
                getattr(core, leaf).register_forward_pre_hook(scale(embed))
            v, qk = value("v", name), value("qk", name)
            assert v is not None
            assert qk is not None
            core.out.register_forward_pre_hook(scale(v.repeat(3)))
            core.q.register_forward_hook(lambda module, inputs, out, qk=qk: out * qk.repeat(3))
    assert relative_error(task.folded()(images), dense(images)) < 1e-5
    task.model.eval()
    logits = task.loss(images, torch.tensor([0, 1]))[1]
    assert relative_error(logits, dense(images)) < 1e-5


def trained(folder: Path, *, epochs: int, resume: bool = False) -> VtpTask:
    options = MaskSettings(budget=Budget("params", 0.4), round_to=2, score_lr=0.05)
    model = lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4))
    task = VtpTask(model, options, sparsity=1e-2)
    run = TrainSettings(epochs=epochs, batch_size=16, quiet=True, threads=1)
    fit(task, stripes(), run, folder, resume=resume)
    return task


def test_training_lowers_coefficients_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = trained(tmp_path / "whole", epochs=3)
    values = torch.cat([scores.detach() for scores in task.coefficients.scores])
    assert 0.0 <= float(values.min()) < float(values.max()) <= 1.0
    assert float(values.mean()) < 0.8

    after = VtpTask.after_epoch

    def interrupted(self: VtpTask, epoch: int, val_top1: float) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return after(self, epoch, val_top1)

    with monkeypatch.context() as patch:
        patch.setattr(VtpTask, "after_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", epochs=3)
    again = trained(tmp_path / "killed", epochs=3, resume=True)
    assert equal_weights(task.result(), again.result())


def test_what_has_no_coefficients_is_refused_or_kept() -> None:
    budget = Budget("params", 0.5)
    with pytest.raises(InputError, match='choose "residual" or "full"'):
        VtpTask(lift(tiny_vit()), MaskSettings(budget=budget, sharing="unshared"))
    fixed = ("embed", "qk", "v", "ffn")
    with pytest.raises(InputError, match="every dimension is fixed"):
        VtpTask(lift(tiny_vit()), MaskSettings(budget=budget, fixed=fixed))
    with pytest.raises(InputError, match="not feasible"):
        VtpTask(lift(tiny_vit()), MaskSettings(budget=Budget("params", 0.001)))
    task = VtpTask(lift(tiny_vit(qk_norm=True)), MaskSettings(budget=budget))
    assert {group.dimension for group in task.coefficients.groups} == {"embed", "v", "ffn"}
