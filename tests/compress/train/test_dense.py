"""Dense training: losses, optimizers, evaluation and initial positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import muon
from tiny_models import tiny_vit
from training_material import Net, spots
from vitrim.compress.lift import lift
from vitrim.compress.train.augment import FIXED_FORMS, Augmentation
from vitrim.compress.train.dense import (
    DenseTask,
    Distillation,
    distillation_loss,
    image_key,
    init_position_embedding,
    task_loss,
    teacher_outputs,
)
from vitrim.compress.train.evaluate import evaluate, predict, top1
from vitrim.compress.train.loop import fit
from vitrim.compress.train.optimizers import make_optimizer
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError


def test_distillation_is_hintons_formula() -> None:
    torch.manual_seed(0)
    teacher, images, logits = (
        Net(1, dropout=0.0),
        torch.randn(6, 1, 8, 8),
        torch.randn(6, 3, requires_grad=True),
    )
    distillation = Distillation(teacher, alpha=0.3, temperature=2.5)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    soft = F.softmax(teacher(images) / 2.5, dim=1)
    divergence = (soft * (soft.log() - F.softmax(logits / 2.5, dim=1).log())).sum(1).mean()
    wanted = 0.7 * F.cross_entropy(logits, targets, label_smoothing=0.1) + 0.3 * 2.5**2 * divergence
    found = task_loss(logits, targets, images, 0.1, distillation)
    torch.testing.assert_close(found, wanted.detach(), check_stride=False)
    found.backward()
    assert logits.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    teacher, images = Net(1, dropout=0.5), torch.randn(4, 1, 8, 8)
    # The teacher is evaluated in evaluation mode, whatever its mode was.
    teacher.train()
    loss = distillation_loss(Net(1, dropout=0.5).eval()(images), images, Distillation(teacher))
    assert abs(float(loss.detach())) < 1e-6


def test_known_outputs_of_the_teacher_replace_its_computation() -> None:
    teacher, images = Net(1, dropout=0.0), torch.randn(6, 1, 8, 8)
    done: list[int] = []
    known = teacher_outputs(teacher, images.split(4), done.append)
    assert done == [4, 6]
    assert set(known) == {image_key(image) for image in images}
    logits, mixed = torch.randn(6, 3), images.flip(0)
    wanted = distillation_loss(logits, mixed, Distillation(teacher))

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the teacher was computed again")

    found = distillation_loss(logits, mixed, Distillation(Broken(), known=known))
    torch.testing.assert_close(found, wanted)
    # An image that was augmented is not among the known ones.
    fallback = distillation_loss(logits, mixed + 1, Distillation(teacher, known=known))
    torch.testing.assert_close(
        fallback, distillation_loss(logits, mixed + 1, Distillation(teacher))
    )


@pytest.mark.parametrize(("preset", "forms"), [("none", 1), ("flip", 2)])
def test_batches_in_a_few_fixed_forms_are_found_among_the_known_outputs(
    preset: Any, forms: int
) -> None:
    data = spots(16).train
    batches = [form(data.floats(slice(0, 16))) for form in FIXED_FORMS[preset]]
    known = teacher_outputs(Net(0), batches, lambda done: None)
    assert len(known) == 16 * forms
    torch.manual_seed(1)
    images, _ = Augmentation(preset, data.preprocessing, 3)(*data.batch(np.arange(16)))
    assert all(image_key(image) in known for image in images)
    originals = {image_key(image) for image in data.floats(slice(0, 16))}
    mirrored = sum(image_key(image) not in originals for image in images)
    assert mirrored == 0 if preset == "none" else 3 <= mirrored <= 13


@pytest.mark.parametrize(
    ("capability", "instructions", "wanted"),
    [
        ("AVX512", True, torch.bfloat16),
        ("AVX512", False, torch.float32),
        ("AVX2", True, torch.float32),
        ("DEFAULT", False, torch.float32),
    ],
)
def test_muon_computes_in_bfloat16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, instructions: bool, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    used: list[torch.dtype] = []
    original: Any = muon.zeropower_via_newtonschulz

    def recording(*args: Any, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> torch.Tensor:
        used.append(dtype)
        result: torch.Tensor = original(*args, dtype=dtype, **kwargs)
        return result

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", recording)
    model = tiny_vit()
    optimizer = make_optimizer("muon", model, 1e-3, 0.0)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert used
    assert set(used) == {wanted}


def test_soft_targets_are_not_smoothed_twice() -> None:
    logits, images = torch.randn(4, 3), torch.randn(4, 1, 8, 8)
    soft = F.softmax(torch.randn(4, 3), dim=1)
    torch.testing.assert_close(
        task_loss(logits, soft, images, 0.1, None), F.cross_entropy(logits, soft)
    )


def test_a_distilled_student_agrees_with_its_teacher(tmp_path: Path) -> None:
    data = spots(192)
    settings = TrainSettings(epochs=8, batch_size=16, augmentation="none", quiet=True)
    teacher = DenseTask(Net(0), lr=3e-3)
    fit(teacher, data, settings, tmp_path / "teacher")
    student = DenseTask(
        Net(7), phase="finetune", lr=3e-3, distillation=Distillation(teacher.model, alpha=1.0)
    )
    fit(student, data, settings, tmp_path / "student")
    agreed = top1(predict(student.model, data.test), predict(teacher.model, data.test).argmax(1))
    assert agreed > 85


@pytest.mark.parametrize(("alpha", "temperature"), [(1.5, 2.0), (-0.1, 2.0), (0.5, 0.0)])
def test_distillation_settings_are_checked(alpha: float, temperature: float) -> None:
    with pytest.raises(InputError, match="must lie in"):
        Distillation(Net(), alpha, temperature)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: Any, lifted: bool) -> None:
    model = lift(tiny_vit()) if lifted else tiny_vit()
    optimizer = make_optimizer(name, model, 1e-3, 0.05)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            key = names[id(parameter)]
            tables = ("cls_token", "pos_embed", "prefix", "position")
            undecayed = key.endswith("bias") or "norm" in key or key in tables
            assert group["weight_decay"] == (0.0 if undecayed else 0.05), key
            if name == "muon" and not group["use_fallback"]:
                assert parameter.ndim == 2
                assert key.startswith(("blocks.", "steps."))


def test_evaluation_uses_evaluation_mode_and_restores_the_mode() -> None:
    data, model = spots(), Net(0, dropout=0.9)
    model.train()
    first, second = (predict(model, data.test, batch_size=size) for size in (5, 32))
    torch.testing.assert_close(first, second)
    assert model.training
    wanted = 100 * float((first.argmax(1) == torch.from_numpy(data.test.targets)).float().mean())
    assert evaluate(model, data.test) == pytest.approx(wanted)


def test_initial_positions_of_neighbours_are_similar() -> None:
    model: Any = tiny_vit()
    before = model.pos_embed.detach().clone()
    assert init_position_embedding(model)
    assert torch.equal(model.pos_embed[0, 0], before[0, 0])
    table = model.pos_embed[0, 1:].detach()
    assert len({tuple(row.tolist()) for row in table}) == len(table)
    # More similar than opposite corners.
    similarity = F.cosine_similarity(table[:1], table)
    assert similarity[1] > similarity[-1]
    assert not init_position_embedding(Net())
