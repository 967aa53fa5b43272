"""Devices and precisions: what is refused, equal results on another device, and resuming there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, PretendDevice
from tiny_models import tiny_vit
from training_material import equal_weights, stripes
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.train import devices
from vitrim.compress.train.dense import DenseTask, Distillation
from vitrim.compress.train.devices import Placement, choose_placement
from vitrim.compress.train.evaluate import evaluate
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.regularization import DenseOptions
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError

# torch takes the pretend device for its own `meta`, whose tensors have no values.
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
THERE = Placement(DEVICE)
SETTINGS = TrainSettings(epochs=4, batch_size=16, augmentation="none", quiet=True, threads=1)
WHOLE: dict[str, Any] = {"attention_overhead_macs": 1e5, "ffn_overhead_macs": 1e5}


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return lift(tiny_vit(num_classes=4, embed_dim=32, num_heads=4))


def mask_task(**settings: Any) -> MaskTask:
    budget = {} if "lambda_" in settings else {"budget": Budget("params", 0.35)}
    teacher = Distillation(model(seed=5), alpha=0.5)
    learned = MaskSettings(**{"update_steps": 2, **budget, **settings})
    return MaskTask(model(), learned, 4 * 8, distillation=teacher)


def test_without_a_gpu_auto_is_the_cpu_and_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placement, note = choose_placement("auto")
    assert placement == Placement()
    assert note == "no GPU is found (CUDA or MPS); training runs on the CPU"
    assert choose_placement("cpu")[1] is None


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cuda", "fp32", r'train\.device = "cuda": torch .* (without CUDA|finds no GPU); set'),
        (
            "mps",
            "fp32",
            r'train\.device = "mps": it needs an Apple GPU; set train\.device = "auto"',
        ),
        ("cpu", "fp16", r'"fp16" needs a GPU, and training runs on the CPU; set'),
        ("auto", "fp16", r'"fp16" needs a GPU, and training runs on the CPU; set'),
        ("cpu", "bf16", r"this processor has no bf16 instructions; set"),
    ],
)
def test_a_device_or_a_precision_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: Any, precision: Any, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "cpu_matrix_dtype", lambda: torch.float32)
    with pytest.raises(InputError, match=message) as error:
        choose_placement(device, precision)
    assert "\n" not in str(error.value)


def test_auto_falls_back_to_fp32_on_a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "cpu_matrix_dtype", lambda: torch.float32)
    placement, note = choose_placement("auto", "bf16")
    assert placement.precision == "fp32"
    assert note is not None
    assert note.endswith("training runs on the CPU, in fp32: it has no bf16 instructions")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_placement("cuda", local_rank=0)[0].device == torch.device("cuda", 0)
    with pytest.raises(InputError, match="need as many GPUs, and it has 1; start at most 1"):
        choose_placement("auto", local_rank=1)


# At ten times this rate the last digits of sums, which differ by processor, change a unit's rank.
@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "lr": 5e-4}, WHOLE])
def test_masks_learned_on_another_device_are_those_of_the_cpu(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    here = mask_task(**options)
    fit(here, stripes(), SETTINGS, tmp_path / "here")
    assert here.progress.shrunk, "the training graph should have shrunk in this run"
    there = mask_task(**options)
    with PretendDevice():
        result = fit(there, stripes(), replace(SETTINGS, placement=THERE), tmp_path / "there")
    assert result.history[-1]["params"] == there.size()[0] == here.size()[0]
    for dimension, site, keep in here.mask():
        assert torch.equal(keep, there.mask().kept[dimension][site])
    # The model is on the CPU again, and equal.
    images = stripes().test.floats()
    tolerance = 1e-4 if options.get("optimizer") != "muon" else 2e-3
    assert torch.allclose(here.result()(images), there.result()(images), atol=tolerance)


def test_lambda_is_learned_on_another_device(tmp_path: Path) -> None:
    task = mask_task(lambda_=1e-4, score_lr=0.05)
    with PretendDevice():
        fit(task, stripes(), replace(SETTINGS, placement=THERE), tmp_path)
    assert task.size()[0] < sum(p.numel() for p in model().parameters())


def test_dense_training_on_another_device_equals_that_on_the_cpu(tmp_path: Path) -> None:
    found = []
    for name, placement in (("here", Placement()), ("there", THERE)):
        teacher = Distillation(model(seed=5), alpha=0.5)
        task = DenseTask(
            model(), lr=3e-3, distillation=teacher, options=DenseOptions(ema=0.9, layer_decay=0.8)
        )
        with PretendDevice():
            fit(task, stripes(), replace(SETTINGS, placement=placement), tmp_path / name)
        found.append(task.model)
    images = stripes().test.floats()
    assert torch.allclose(found[0](images), found[1](images), atol=1e-4)
    assert all(parameter.device.type == "cpu" for parameter in found[1].parameters())


@pytest.mark.parametrize("masks", [True, False])
def test_a_checkpoint_of_one_device_resumes_on_another(tmp_path: Path, masks: bool) -> None:
    class Stop(Exception):
        pass

    def task() -> Any:
        return mask_task() if masks else DenseTask(model(), lr=3e-3)

    whole = task()
    fit(whole, stripes(), SETTINGS, tmp_path / "whole")
    broken = task()
    after_step = broken.after_step

    def stopping(step: int) -> None:
        if step == 20:
            raise Stop
        after_step(step)

    broken.after_step = stopping
    with PretendDevice(), pytest.raises(Stop):
        fit(broken, stripes(), replace(SETTINGS, placement=THERE), tmp_path / "broken")
    resumed = task()
    fit(resumed, stripes(), SETTINGS, tmp_path / "broken", resume=True)
    images = stripes().test.floats()
    models = [each.result() if masks else each.model for each in (whole, resumed)]
    assert torch.allclose(models[0](images), models[1](images), atol=1e-4)


@pytest.mark.skipif(not devices.has_bf16("cpu"), reason="this processor has no bf16 instructions")
@pytest.mark.parametrize("masks", [True, False])
def test_bf16_trains_on_a_cpu_that_has_it(tmp_path: Path, masks: bool) -> None:
    data = stripes()
    task: Any = mask_task() if masks else DenseTask(model(), lr=3e-3)
    placement, _ = choose_placement("cpu", "bf16")
    fit(task, data, replace(SETTINGS, epochs=8, placement=placement), tmp_path)
    trained = task.result() if masks else task.model
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    if masks:
        assert task.size()[0] <= 0.35 * task.dense_cost
    else:
        # Of four classes.
        assert evaluate(trained, data.test) > 40.0


def test_channels_last_changes_the_memory_format_only(tmp_path: Path) -> None:
    task, data = DenseTask(model(), lr=3e-3), stripes()
    images = data.train.floats(slice(0, 4))
    placed = Placement(channels_last=True).images(images)
    assert placed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(placed, images)
    fit(task, data, replace(SETTINGS, placement=Placement(channels_last=True)), tmp_path / "last")
    plain = DenseTask(model(), lr=3e-3)
    fit(plain, data, SETTINGS, tmp_path / "plain")
    assert torch.allclose(task.model(images), plain.model(images), atol=1e-4)


@pytest.mark.parametrize("masks", [True, False])
def test_compiled_training_equals_eager_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    compiled: list[Any] = []
    compile_module = torch.compile

    def quick(module: Any) -> Any:
        # Traced as for the default backend, without the minutes of its C++ compiler.
        compiled.append(module)
        return compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quick)
    found = []
    settings = replace(SETTINGS, epochs=2)
    for name, placement in (("eager", Placement()), ("compiled", Placement(compile=True))):
        task: Any = mask_task() if masks else DenseTask(model(), lr=3e-3)
        fit(task, stripes(), replace(settings, placement=placement), tmp_path / name)
        found.append(task.result() if masks else task.model)
    assert compiled
    images = stripes().test.floats()
    assert torch.allclose(found[0](images), found[1](images), atol=1e-4)


def test_gradients_of_fp16_are_scaled_and_overflows_are_skipped() -> None:
    """The scaler of a GPU, on the CPU: a task reads unscaled gradients of its scores."""
    from vitrim.compress.train.processes import ALONE
    from vitrim.compress.train.steps import Stepper

    task, data = mask_task(), stripes()
    stepper = Stepper(task, SETTINGS, ALONE)
    stepper.use(task.optimizer())
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen: list[Any] = []
    task.after_step = lambda step: seen.append(  # type: ignore[method-assign]
        [scores.grad.clone() for scores in task.gates.scores]
    )
    images, targets = data.train.floats(slice(0, 16)), torch.from_numpy(data.train.targets[:16])
    stepper.step(images, targets, 0, "")
    plain = mask_task()
    loss, _ = plain.loss(images, targets)
    loss.backward()
    for scaled, scores in zip(seen[0], plain.gates.scores, strict=True):
        assert torch.allclose(scaled, scores.grad, atol=1e-6)
    before = {key: value.clone() for key, value in task.masked.network.state_dict().items()}
    for scores in task.gates.scores:
        scores.grad = None
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    stepper.step(images, targets, 1, "")
    assert all(torch.isfinite(gradient).all() for gradient in seen[1])
    assert equal_weights(task.masked.network, _with(task.masked.network, before))


def _with(network: Any, state: dict[str, Any]) -> Any:
    class Frozen(torch.nn.Module):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return state

    return Frozen()
