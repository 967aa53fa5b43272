"""Training of selections: exact policies, losses by hand, what is trained, and resuming."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_networks import network, selecting_architectures
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from torch.nn import functional as F
from training_material import equal_weights, stripes
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.attention import kept_softmax, sampled_softmax
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Select
from vitrim.compress.surgery.compactor import compact
from vitrim.compress.tokens.impact import image_impacts
from vitrim.compress.tokens.select import chosen_tokens, select_tokens
from vitrim.compress.train.dense import Distillation
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.objectives import (
    FROZEN_SHARE,
    Objective,
    SelectionSettings,
    keep_rate,
    make_objective,
    warm_selects,
)
from vitrim.compress.train.optimizers import ADAMW_RATE_BESIDE_MUON, split_rates
from vitrim.compress.train.policies import BestPolicy, SampledPolicy
from vitrim.compress.train.regularization import DenseOptions
from vitrim.compress.train.selection_losses import (
    agreement_loss,
    channel_obstacle,
    impact_loss,
    ratio_loss,
    shared_channels,
    token_loss,
)
from vitrim.compress.train.selection_task import SelectionTask
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError
from vitrim.pipeline.source_model import with_last_queries

EPOCHS, STEPS = 3, 8
MODEL: dict[str, Any] = {
    "num_classes": 4,
    "embed_dim": 32,
    "num_heads": 4,
    "patch_size": 4,
    "depth": 3,
}


def dense(**model: Any) -> CompactModel:
    """Three blocks on 16 patches; the last one computes what the head reads."""
    return with_last_queries(lift(tiny_vit(**{**MODEL, **model}))).eval()


def objective(
    method: Any, teacher: CompactModel, *, teach: bool = True, **settings: Any
) -> Objective:
    options = SelectionSettings(method, **{"lr": 2e-3, **settings})
    found = Distillation(teacher, 0.5, 2.0) if teach else None
    return make_objective(options, EPOCHS * STEPS, teacher, distillation=found)


def training(**changes: Any) -> TrainSettings:
    return TrainSettings(
        **{"epochs": EPOCHS, "batch_size": 16, "quiet": True, "threads": 1, **changes}
    )


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# Policies


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("batch", [1, 7])
def test_dropped_factors_compute_what_gathered_patches_compute(pool: str, batch: int) -> None:
    options = {"global_pool": pool, "class_token": pool != "map"}
    model = select_tokens(dense(**options), "dynamicvit", stages=[1, 2], ratio=0.6)
    x = images(batch)
    with torch.no_grad():
        wanted = model.eval()(x)
        # The policy acts in training mode only, where all patches stay in the stream.
        model.policy = BestPolicy()
        assert torch.equal(model(x), wanted)
        found = model.train()(x)
    assert relative_error(found, wanted) < 1e-5
    assert [int((each > 0).sum(1)[0]) for each in model.policy.present] == [16, 9]


@settings(suppress_health_check=list(HealthCheck), max_examples=40)
@given(st.data())
def test_dropped_factors_compute_what_gathered_patches_compute_in_any_network(data: Any) -> None:
    model = network(data.draw(selecting_architectures()))
    assume(all(each.scorer == "predictor" for each in model.architecture.selects))
    shape = (data.draw(st.sampled_from([1, 3])), *model.architecture.image)
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape, generator=generator, dtype=dtype)
    model.policy = BestPolicy()
    with torch.no_grad():
        wanted, found = model.eval()(x), model.train()(x)
    assert float((found - wanted).abs().max()) < 1e-9 * (1 + float(wanted.abs().max()))


def test_a_sample_is_that_of_a_hard_gumbel_softmax_times_the_decision_before() -> None:
    model = select_tokens(dense(), "dynamicvit", stages=[1], ratio=0.6)
    select: Any = model.selects[0]
    x = torch.randn(5, 17, 32)
    before = torch.ones(5, 17)
    before[:, 3:9] = 0.0
    torch.manual_seed(3)
    keep = SampledPolicy()(select, x, None, before)
    scores = select.scores(x, None, before)
    torch.manual_seed(3)
    pairs = torch.stack([scores, torch.zeros_like(scores)], dim=-1)
    hard = F.gumbel_softmax(pairs.log_softmax(-1), hard=True)[..., 0].round()
    assert torch.equal(keep[:, 1:], hard * before[:, 1:])
    assert bool((keep[:, 0] == 1).all())


def test_a_sample_keeps_one_patch_at_least_and_its_gradient_reaches_the_predictor() -> None:
    model = select_tokens(dense(), "dynamicvit", stages=[1], ratio=0.6)
    select: Any = model.selects[0]
    policy = SampledPolicy()
    with torch.no_grad():
        select.predictor.rest[-1].bias.fill_(-30.0)
    keep = policy(select, torch.randn(4, 17, 32), None, None)
    assert bool((keep[:, 1:].sum(1) == 1).all())
    with torch.no_grad():
        select.predictor.rest[-1].bias.fill_(0.0)
    policy.begin()
    policy(select, torch.randn(4, 17, 32), None, None)
    policy.shares[0].sum().backward()
    assert float(select.predictor.fc.weight.grad.abs().sum()) > 0


def test_the_gradient_of_a_dropped_key_is_what_it_would_change() -> None:
    scores = torch.tensor([[[[0.0, 1.0, 9.0]]]])
    values = torch.tensor([[1.0], [3.0], [-2.0]])
    keep = torch.tensor([[[[1.0, 1.0, 0.0]]]], requires_grad=True)
    maps = sampled_softmax(scores, keep)
    assert torch.equal(maps, kept_softmax(scores, keep))
    out = (maps @ values).squeeze()
    out.backward()
    whole = (scores.softmax(-1) @ values).squeeze()
    assert keep.grad is not None
    assert float(keep.grad[0, 0, 0, 2]) == pytest.approx(float(whole - out.detach()), rel=1e-5)
    exact = torch.tensor([[[[1.0, 1.0, 0.0]]]], requires_grad=True)
    (kept_softmax(scores, exact) @ values).sum().backward()
    assert exact.grad is not None
    assert torch.equal(keep.grad[..., :2], exact.grad[..., :2])
    assert float(exact.grad[0, 0, 0, 2]) < 100 * float(keep.grad[0, 0, 0, 2])


# Losses


def test_the_losses_are_those_that_are_computed_by_hand() -> None:
    shares = [torch.tensor([0.5, 0.7]), torch.tensor([0.2, 0.4])]
    wanted = ((0.04 + 0.0) / 2 + (0.09 + 0.01) / 2) / 2
    assert float(ratio_loss(shares, [0.7, 0.5])) == pytest.approx(wanted)
    student, teacher = (
        torch.tensor([[0.0, 1.0], [2.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.5, 0.0]]),
    )
    p, q = teacher.softmax(1), student.softmax(1)
    assert float(agreement_loss(student, teacher)) == pytest.approx(
        float((p * (p / q).log()).sum() / 2), rel=1e-5
    )
    tokens, other = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]]])
    keep = torch.tensor([[1.0, 1.0, 0.0]])
    assert float(token_loss(tokens, other, keep)) == pytest.approx((1 + 4 + 9 + 0) / 4)
    scores, impacts = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[1.0, math.e**2, 7.0]])
    present = torch.tensor([[True, True, False]])
    # The logarithms are 0 and 2, minus their mean -1 and 1.
    assert float(impact_loss(scores, impacts, present)) == pytest.approx((1 + 0) / 2)


def test_the_loss_of_dynamicvit_is_the_sum_of_its_four() -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1, 2], ratio=0.6)
    found = objective("dynamicvit", teacher)
    found.attach(model)
    model.train()
    x, targets = images(6), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.manual_seed(5)
    found.begin(0)
    logits = model(x)
    loss = found.loss(logits, targets, x)
    policy: Any = found
    shares, (tokens, keep) = policy.policy.shares, policy._tokens
    with torch.no_grad():
        whole = lift(tiny_vit(**MODEL)).eval()
        stream = whole.features(x)
        wanted = whole.normed(stream)[:, 1:]
        other = F.log_softmax(whole.classify(stream), dim=1)
    kept = keep[:, 1:].bool()
    own = F.log_softmax(logits, dim=1)
    parts = [
        F.cross_entropy(logits, targets, label_smoothing=0.1),
        2.0 * sum((s - r / 16).square().mean() for s, r in zip(shares, (9, 5), strict=True)) / 2,
        0.5 * (other.exp() * (other - own)).sum() / 6,
        0.5 * (tokens[:, 1:][kept] - wanted[kept]).square().mean(),
    ]
    wanted_loss = float(torch.stack(parts).sum().detach())
    assert float(loss.detach()) == pytest.approx(wanted_loss, rel=1e-5)
    without = objective("dynamicvit", teacher, teach=False)
    without.attach(model)
    model.train()
    torch.manual_seed(5)
    without.begin(0)
    alone = without.loss(model(x), targets, x).detach()
    assert float(alone) == pytest.approx(float((parts[0] + parts[1]).detach()), rel=1e-5)


def test_the_target_of_kept_shares_is_of_the_patches_that_are_still_in_the_stream() -> None:
    model = dense()
    keep = torch.arange(17) < 13
    names = [step[0].name for step in model.architecture.steps]
    teacher = compact(model, StructuredMask({"token": dict.fromkeys(names[1:], keep)}))
    counts = teacher.architecture.step_tokens(last_queries=False)
    assert teacher.architecture.patches == 16
    assert counts[1] == 13
    student = select_tokens(teacher, "dynamicvit", stages=[1, 2], counts=[6, 3])
    found: Any = objective("dynamicvit", teacher, teach=False)
    found.attach(student)
    found.begin(0)
    student.train()(images(2))
    # Of 12 patches, of which the others left by place.
    assert found.policy.targets == [6 / 12, 3 / 12]
    targets = torch.tensor([0, 1])
    logits = torch.zeros(2, 4)
    wanted = ratio_loss(found.policy.shares, [6 / 12, 3 / 12])
    loss = found.loss(logits, targets, images(2)) - F.cross_entropy(
        logits, targets, label_smoothing=0.1
    )
    assert float(loss.detach()) == pytest.approx(2.0 * float(wanted.detach()), rel=1e-4)


def test_tokens_are_compared_in_the_channels_that_the_student_still_has() -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1], ratio=0.6)
    keep = torch.ones(32, dtype=torch.bool)
    keep[[0, 5, 31]] = False
    cut = compact(model, StructuredMask({"embed": {"*": keep}}))
    channels = shared_channels(cut.architecture, teacher.architecture)
    assert channels is not None
    row = torch.arange(32.0).expand(1, 1, 32)
    assert torch.equal(channels.of(row)[0, 0], row[0, 0, keep])
    assert channel_obstacle(cut.architecture, teacher.architecture) is None
    rotated = cut.architecture.model_copy(update={"stream_rotated": True})
    assert shared_channels(rotated, teacher.architecture) is None
    reason = channel_obstacle(rotated, teacher.architecture)
    assert reason is not None
    assert "basis" in reason
    moved = cut.architecture.model_copy(update={"order": tuple(range(15))})
    reason = channel_obstacle(moved, teacher.architecture)
    assert reason is not None
    assert "patches" in reason
    assert shared_channels(moved, teacher.architecture) is None


# Impacts


def test_impacts_of_images_average_to_those_of_patch_slimming() -> None:
    from vitrim.compress.tokens.choose import whole_scores

    model, x = dense(), images(5)
    averaged = whole_scores(model, "patch-slimming", x)
    steps = sorted(averaged)[:-1]
    each = image_impacts(model, x, steps)
    for step in steps:
        assert each[step].shape == (5, 17)
        assert relative_error(each[step].double().mean(0), averaged[step]) < 1e-4


def test_the_impact_of_the_stem_is_that_of_its_paths() -> None:
    model, x = dense(depth=1, class_token=True), images(2)
    found = image_impacts(model, x, [-1])[-1]
    stream = model.embed(x)
    branch: Any = model.steps[0][0]  # type: ignore[index]
    normed = branch.read(stream)
    q, k = branch.core.queries_and_keys(normed, normed)
    # Only the class token is read behind the single attention.
    row = branch.core.weights(q, k)[:, :, 0]
    wanted = row.square().sum(1) * stream.square().sum(-1)
    assert relative_error(found, wanted) < 1e-5


# Phases


def test_the_ratio_loss_drives_kept_shares_to_their_targets(tmp_path: Path) -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1, 2], counts=[12, 10])
    weights = {"distill_weight": 0.0, "token_weight": 0.0, "ratio_weight": 20.0}
    task = SelectionTask(
        model, objective("dynamicvit", teacher, alone=True, lr=2e-2, teach=False, **weights)
    )
    result = fit(task, stripes(), training(epochs=6), tmp_path)
    last = result.history[-1]
    # Random predictors keep half, and a quarter.
    assert abs(last["kept_percent_0"] - 75.0) < 10.0
    assert abs(last["kept_percent_1"] - 62.5) < 10.0


def changed(task: SelectionTask, before: dict[str, Tensor]) -> set[str]:
    return {
        name
        for name, tensor in task.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


def start(model: CompactModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_weights_rest_at_first_and_learn_slowly(tmp_path: Path, optimizer: Any) -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1], ratio=0.6)
    before = start(model)
    found = objective("dynamicvit", teacher, alone=True, lr=1e-2)
    task = SelectionTask(model, found, optimizer=optimizer)
    groups = task.optimizer().param_groups
    assert {group["frozen_steps"] for group in groups} == {0, round(FROZEN_SHARE * 24)}
    frozen = {group["lr"] for group in groups if group["frozen_steps"]}
    assert max(frozen) == pytest.approx(1e-4)
    own = [group["lr"] for group in groups if not group["frozen_steps"]]
    assert own == pytest.approx([1e-2] * len(own))
    assert not task.model.prefix.requires_grad  # type: ignore[union-attr]
    # A sixth of three epochs are the first four steps, half an epoch.
    fit(task, stripes(64), training(epochs=1), tmp_path / "short")
    assert changed(task, before) == {name for name in before if name.startswith("selects.")}
    model.load_state_dict(before)
    task = SelectionTask(model, objective("dynamicvit", teacher, alone=True), optimizer=optimizer)
    fit(task, stripes(), training(), tmp_path / "long")
    assert set(before) - changed(task, before) == {"prefix", "position"}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["evit", "class-attention"])
def test_weights_without_predictors_have_the_rate_of_weights(method: Any, optimizer: Any) -> None:
    teacher = dense()
    model = select_tokens(teacher, method, stages=[1], ratio=0.6)
    found = objective(method, teacher, alone=True, lr=1e-2)
    task = SelectionTask(model, found, lr=3e-5, optimizer=optimizer)
    rates = {group["lr"] for group in task.optimizer().param_groups}
    assert rates == ({3e-5} if optimizer == "adamw" else {3e-5, ADAMW_RATE_BESIDE_MUON * 3e-5})


def rates_of(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> set[float]:
    own = {id(parameter) for parameter in module.parameters()}
    return {
        group["lr"]
        for group in optimizer.param_groups
        if any(id(parameter) in own for parameter in group["params"])
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_predictors_have_the_rate_of_the_other_weights_in_fine_tuning(optimizer: Any) -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1], ratio=0.6)
    found = objective("dynamicvit", teacher, lr=1e-2)
    options = DenseOptions(layer_decay=0.5)
    made = SelectionTask(
        model, found, phase="finetune", lr=1e-2, optimizer=optimizer, options=options
    ).optimizer()
    # Neither the head nor predictors are matrices of blocks, which Muon updates.
    assert isinstance(model.head, torch.nn.Module)
    assert rates_of(made, model.selects) == rates_of(made, model.head)
    assert len(rates_of(made, model.steps)) > 1, "rates by depth"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rate_of_their_own_is_that_of_adamw(optimizer: Any) -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1], ratio=0.6)
    options = MaskSettings(budget=Budget("macs", 0.5), optimizer=optimizer, lr=3e-3)
    task = MaskTask(model, options, 8, objective=objective("dynamicvit", teacher, lr=7e-4))
    (rate,) = rates_of(task.optimizer(), task.masked.network.selects)
    assert rate == pytest.approx(7e-4)


def test_rates_of_groups_keep_their_proportions() -> None:
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [one], "lr": 4e-3}, {"params": [two], "lr": 1e-3}]
    made = split_rates(torch.optim.AdamW(groups), [one, two], 0.5)
    assert [group["lr"] for group in made.param_groups] == [2e-3, 5e-4]


def test_dps_trains_predictors_alone_and_lowers_its_loss(tmp_path: Path) -> None:
    teacher = dense()
    model = select_tokens(teacher, "dps", stages=[1, 2], ratio=0.6)
    before = start(model)
    task = SelectionTask(model, objective("dps", teacher, alone=True, lr=1e-2))
    result = fit(task, stripes(), training(epochs=6), tmp_path)
    assert changed(task, before) == {name for name in before if name.startswith("selects.")}
    losses = [line["loss"] for line in result.history]
    assert losses[-1] < 0.6 * losses[0]


def test_the_keep_rate_falls_by_a_cosine_to_its_target() -> None:
    rates = [keep_rate(step, 300) for step in range(300)]
    assert rates[:11] == [1.0] * 11
    assert rates[100:] == [0.0] * 200
    assert rates[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates))
    model = select_tokens(dense(depth=4), "evit", stages=[1, 2], ratio=0.5)
    architecture = model.architecture
    assert warm_selects(architecture, 0.0) == architecture.selects
    whole = warm_selects(architecture, 1.0)
    assert [(each.patches, each.fused) for each in whole] == [(16, False), (16, False)]
    # 8/16 + 8/16/2 of 16; 5/9 + 4/9/2 of 12 + 1.
    half = warm_selects(architecture, 0.5)
    assert [(each.patches, each.fused) for each in half] == [(12, True), (11, True)]


@pytest.mark.parametrize("method", ["evit", "class-attention"])
def test_patches_really_leave_in_training_and_validation_keeps_the_target(
    tmp_path: Path, method: Any
) -> None:
    teacher = dense(depth=4)
    model = select_tokens(teacher, method, stages=[1, 2], ratio=0.5)
    architecture = model.architecture
    seen: list[int] = []
    select = model.selects[1]
    assert isinstance(select, Select)
    select.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape[1]))
    task = SelectionTask(model, objective(method, teacher, alone=True))
    fit(task, stripes(), training(), tmp_path)
    prefix = architecture.prefix
    left = [each.left for each in architecture.selects]
    assert seen[0] == prefix + 16
    assert seen[STEPS] == prefix + left[1], "the validation of the first epoch"
    assert seen[-1] == prefix + left[1]
    assert model.architecture == architecture
    assert model.policy is None
    model(images(2))


@pytest.mark.parametrize("method", ["dynamicvit", "evit", "dps"])
def test_widths_are_learned_around_selections(tmp_path: Path, method: Any) -> None:
    teacher = dense()
    model = select_tokens(teacher, method, stages=[1], ratio=0.6)
    options = MaskSettings(
        budget=Budget("macs", 0.5),
        update_steps=2,
        attention_overhead_macs=1e5,
        ffn_overhead_macs=1e5,
    )
    task = MaskTask(model, options, EPOCHS * STEPS, objective=objective(method, teacher))
    predictors = start(model)
    fit(task, stripes(), training(), tmp_path)
    cut = task.result()
    assert count_macs(cut.architecture) <= 0.5 * count_macs(model.architecture)
    network, mask = task.reference()
    assert relative_error(compact(network, mask)(images(3)), cut(images(3))) < 1e-5
    for spec, old in zip(cut.architecture.selects, model.architecture.selects, strict=True):
        if spec.predictor is not None:
            assert spec.predictor == old.predictor, "predictors keep their own widths"
            name = (
                "selects.0.predictor.rest.0.weight"
                if method == "dynamicvit"
                else "selects.0.predictor.local.weight"
            )
            assert not torch.equal(cut.state_dict()[name], predictors[name])
    assert chosen_tokens(cut, images(2))[0].shape == (2, cut.architecture.selects[0].left)


@pytest.mark.parametrize("kind", ["alone", "masks"])
@pytest.mark.parametrize("method", ["dynamicvit", "evit"])
def test_a_resumed_training_gives_equal_weights(tmp_path: Path, method: Any, kind: str) -> None:
    teacher = dense()

    def task() -> SelectionTask | MaskTask:
        model = select_tokens(teacher, method, stages=[1], ratio=0.6)
        found = objective(method, teacher, alone=kind == "alone")
        if kind == "alone":
            return SelectionTask(model, found)
        options = MaskSettings(budget=Budget("params", 0.5), update_steps=2)
        return MaskTask(model, options, EPOCHS * STEPS, objective=found)

    def result(task: SelectionTask | MaskTask) -> CompactModel:
        return task.model if isinstance(task, SelectionTask) else task.result()

    whole, first, second = task(), task(), task()
    fit(whole, stripes(), training(), tmp_path / "whole")
    after, steps = first.after_step, 0

    def interrupted(step: int) -> None:
        nonlocal steps
        steps += 1
        after(step)
        if steps == STEPS + 3:
            raise KeyboardInterrupt

    first.after_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(first, stripes(), training(), tmp_path / "killed")
    fit(second, stripes(), training(), tmp_path / "killed", resume=True)
    assert equal_weights(result(whole), result(second))


def test_an_average_of_the_weights_is_validated_without_a_policy(tmp_path: Path) -> None:
    teacher = dense()
    model = select_tokens(teacher, "dynamicvit", stages=[1], ratio=0.6)
    task = SelectionTask(model, objective("dynamicvit", teacher), options=DenseOptions(ema=0.9))
    fit(task, stripes(), training(), tmp_path)
    assert task.average is not None
    assert task.average.module.policy is None
    assert equal_weights(model, task.average.module)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"selections: lr = 0 must be above 0"):
        SelectionSettings("evit", lr=0)
    with pytest.raises(InputError, match=r"ratio_weight = -1 must not be negative"):
        SelectionSettings("evit", ratio_weight=-1)
