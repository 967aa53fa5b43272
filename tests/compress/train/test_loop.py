"""The training loop: learning, best epochs, resuming to the same bits, and stopping."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_processes
from safetensors.torch import save_file
from torch import Tensor
from training_material import Net, equal_weights, spots
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.evaluate import evaluate
from vitrim.compress.train.loop import BEST, CHECKPOINT, fit
from vitrim.compress.train.schedule import Schedule
from vitrim.compress.train.settings import TrainSettings
from vitrim.compress.train.task import EpochEnd
from vitrim.compress.train.training_files import append_history
from vitrim.core.errors import InputError
from warm_processes import Running

QUICK = TrainSettings(epochs=4, batch_size=16, augmentation="none", quiet=True)


class Crash(Exception):
    """Raised in place of a crash."""


class CrashingTask(DenseTask):
    """Crashes in the middle of an epoch."""

    crash_at = 10**9

    def after_step(self, step: int) -> None:
        if step == self.crash_at:
            raise Crash


def task(seed: int = 0, kind: type[DenseTask] = DenseTask, **options: Any) -> Any:
    return kind(Net(seed), **({"lr": 3e-3} | options))


def test_training_improves_accuracy_and_writes_the_history(tmp_path: Path) -> None:
    data, dense = spots(192), task(metrics={"params": 7.0})
    before = evaluate(dense.model, data.test)
    result = fit(dense, data, replace(QUICK, epochs=12), tmp_path)
    assert evaluate(dense.model, data.test) > max(90.0, before)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line["phase"] == "baseline"
        assert line["params"] == 7.0
        assert {
            "loss",
            "train_top1",
            "val_top1",
            "images_per_s",
            "loader_share",
            "lr",
            "seconds",
        } <= line.keys()
        assert 0 <= line["loader_share"] <= 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert result.best_val_top1 == max(line["val_top1"] for line in lines)


def test_the_best_epoch_is_restored(tmp_path: Path) -> None:
    class Recording(DenseTask):
        def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
            seen.append({key: value.clone() for key, value in self.model.state_dict().items()})
            return EpochEnd(score={1: 5.0, 2: 9.0, 3: 9.0}.get(epoch, 1.0))

    seen: list[dict[str, Tensor]] = []
    dense = task(kind=Recording)
    result = fit(dense, spots(), QUICK, tmp_path)
    # Of equal epochs the first one is the best.
    assert result.best_epoch == 2
    assert all(torch.equal(seen[1][key], value) for key, value in dense.model.state_dict().items())
    last = task(kind=Recording)
    seen.clear()
    fit(last, spots(), replace(QUICK, restore_best=False), tmp_path)
    assert all(torch.equal(seen[3][key], value) for key, value in last.model.state_dict().items())


def test_an_epoch_of_score_minus_infinity_is_never_the_best(tmp_path: Path) -> None:
    class OverBudget(DenseTask):
        def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
            return EpochEnd(score=float("-inf"))

    result = fit(task(kind=OverBudget), spots(), replace(QUICK, patience_epochs=1), tmp_path)
    assert (result.best_epoch, result.epochs) == (0, 4)
    assert not (tmp_path / BEST).exists()


@pytest.mark.parametrize("augmentation", ["none", "light", "thesis"])
@pytest.mark.parametrize("kind", ["cosine", "restarts", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_crashed_run_resumes_to_the_same_bits(
    tmp_path: Path, augmentation: Any, kind: Any, optimizer: Any
) -> None:
    data = spots()
    settings = replace(
        QUICK,
        augmentation=augmentation,
        schedule=Schedule(kind, warmup_epochs=0.5, restart_epochs=2),
    )
    whole, broken = task(optimizer=optimizer), task(kind=CrashingTask, optimizer=optimizer)
    wanted = fit(whole, data, settings, tmp_path / "whole")
    broken.crash_at = 15
    with pytest.raises(Crash):
        fit(broken, data, settings, tmp_path / "broken")
    # With other weights and generators at the start: only the checkpoint counts.
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    again = task(seed=5, optimizer=optimizer)
    found = fit(again, data, settings, tmp_path / "broken", resume=True)
    assert equal_weights(whole.model, again.model)
    assert [(line["epoch"], line["loss"], line["lr"]) for line in found.history] == [
        (line["epoch"], line["loss"], line["lr"]) for line in wanted.history
    ]


class Slow(DenseTask):
    """Waits after each step, so that a signal arrives within an epoch."""

    wait_s = 0.0

    def after_step(self, step: int) -> None:
        time.sleep(self.wait_s)


def train(folder: Path, wait_s: float) -> None:
    """Train in a folder, from where an earlier process ended; weights are saved beside it."""
    slow = Slow(Net(), lr=3e-3)
    slow.wait_s = wait_s
    settings = TrainSettings(epochs=5, batch_size=16, augmentation="light", threads=1)
    fit(slow, spots(), settings, folder, resume=True)
    save_file(slow.model.state_dict(), folder.with_suffix(".safetensors"))


def start(folder: Path, wait_s: float) -> Running:
    """Train in a process of its own."""
    return warm_processes.start(train, folder, wait_s, log=folder)


@pytest.fixture(scope="module")
def uninterrupted_weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("uninterrupted") / "whole"
    whole = start(folder, 0)
    assert whole.wait() == 0, whole.errors()
    return folder.with_suffix(".safetensors").read_bytes()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_kill_and_ctrl_c_lose_at_most_one_epoch(
    tmp_path: Path, sign: signal.Signals, uninterrupted_weights: bytes
) -> None:
    broken = start(tmp_path / "broken", 0.1)
    history = tmp_path / "broken" / "history.jsonl"
    broken.wait_until(lambda: history.is_file() and len(history.read_text().splitlines()) >= 2)
    # Inside the third epoch, or while a checkpoint is written.
    time.sleep(0.25)
    broken.kill(sign)
    assert broken.wait() in (-sign, 1, 130)
    if sign == signal.SIGINT:
        printed = broken.errors()
        assert "whole epochs are kept in" in printed
        assert "--resume continues" in printed
    assert not (tmp_path / "broken.safetensors").exists()
    whole_epochs = torch.load(tmp_path / "broken" / CHECKPOINT, weights_only=True)["epoch"]
    assert whole_epochs >= 1
    again = start(tmp_path / "broken", 0)
    assert again.wait() == 0
    assert (tmp_path / "broken.safetensors").read_bytes() == uninterrupted_weights
    epochs = [json.loads(line)["epoch"] for line in history.read_text().splitlines()]
    assert epochs == [1, 2, 3, 4, 5]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, again = task(), task(seed=3)
    result = fit(first, spots(), QUICK, tmp_path)
    stamp = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    assert fit(again, spots(), QUICK, tmp_path, resume=True) == result
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == stamp
    assert equal_weights(first.model, again.model)


def test_without_resume_training_starts_from_scratch(tmp_path: Path) -> None:
    fit(task(seed=3), spots(), QUICK, tmp_path)
    first, again = task(), task()
    fit(first, spots(), QUICK, tmp_path / "other")
    fit(again, spots(), QUICK, tmp_path)
    assert equal_weights(first.model, again.model)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4


def test_the_history_of_other_phases_stays(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    append_history(history, {"phase": "masks", "epoch": 1, "loss": 1.0})
    append_history(history, {"phase": "finetune", "epoch": 1, "loss": 1.0})
    with history.open("a") as stream:
        stream.write('{"phase": "finet')
    fit(task(phase="finetune"), spots(), replace(QUICK, epochs=2), tmp_path / "t", history=history)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        ("masks", 1),
        ("finetune", 1),
        ("finetune", 2),
    ]
    assert "lr" in lines[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size = 16, now 8"),
        ({"seed": 9}, "seed = 7, now 9"),
        ({"epochs": 9}, "epochs = 4, now 9"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fit(task(), spots(), QUICK, tmp_path)
    with pytest.raises(
        InputError, match=f"{message}; resume with the same settings, or start again"
    ):
        fit(task(), spots(), replace(QUICK, **change), tmp_path, resume=True)
    fit(task(), spots(), replace(QUICK, threads=1), tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"checkpoint\.pt: not a readable checkpoint .*; delete it to start this phase again",
    ) as error:
        fit(task(), spots(), QUICK, tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"task": Trap()}, tmp_path / CHECKPOINT)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        fit(task(), spots(), QUICK, tmp_path, resume=True)
    assert not (tmp_path / "trapped").exists()


def test_training_stops_by_patience_or_by_the_task(tmp_path: Path) -> None:
    class Stopping(DenseTask):
        def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
            return EpochEnd(score=-float(epoch), stop="enough" if epoch == stop_at else None)

    stop_at = 99
    patient = replace(QUICK, epochs=9, patience_epochs=2)
    result = fit(task(kind=Stopping), spots(), patient, tmp_path / "a")
    assert (result.epochs, result.best_epoch) == (3, 1)
    assert result.stopped == "no better validation top-1 for 2 epochs"
    # A stopped phase stays stopped.
    assert fit(task(kind=Stopping), spots(), patient, tmp_path / "a", resume=True).epochs == 3
    stop_at = 2
    result = fit(task(kind=Stopping), spots(), QUICK, tmp_path / "b")
    assert (result.epochs, result.stopped) == (2, "enough")


def test_a_loss_that_is_not_finite_is_reported_with_the_step(tmp_path: Path) -> None:
    class Diverging(DenseTask):
        steps = 0

        def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            self.steps += 1
            return super().loss(images * (float("inf") if self.steps == 9 else 1.0), targets)

    with pytest.raises(
        InputError,
        match=r"baseline: the loss became nan at step 8 \(epoch 2\) with learning rate .*; "
        r"lower the learning rate",
    ):
        fit(task(kind=Diverging), spots(), QUICK, tmp_path)
    # The epoch before is complete, and training can be resumed.
    assert fit(task(), spots(), QUICK, tmp_path, resume=True).epochs == 4


def test_a_model_rebuilt_smaller_gets_its_new_optimizer(tmp_path: Path) -> None:
    class Shrinking(DenseTask):
        def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
            if epoch != 1:
                return EpochEnd()
            self._replace(8)
            return EpochEnd(optimizer=self.optimizer())

        def load_state(self, state: dict[str, Any]) -> None:
            width = state["model"]["layers.1.weight"].shape[0]
            self._replace(width)
            super().load_state(state)

        def _replace(self, width: int) -> None:
            layers: Any = self.model.layers
            layers[1], layers[4] = torch.nn.Linear(64, width), torch.nn.Linear(width, 3)

    data, shrinking = spots(192), task(kind=Shrinking)
    result = fit(shrinking, data, replace(QUICK, epochs=10), tmp_path)
    assert shrinking.model.layers[1].weight.shape == (8, 64)
    # The new parameters learn at the rate of the schedule.
    assert result.history[-1]["loss"] < result.history[1]["loss"]
    rates = [line["lr"] for line in result.history]
    assert rates == sorted(rates, reverse=True)
    (tmp_path / "copy").mkdir()
    again = task(kind=Shrinking)
    fit(again, data, replace(QUICK, epochs=10), tmp_path, resume=True)
    assert equal_weights(shrinking.model, again.model)


def test_the_callers_generators_and_settings_are_restored(tmp_path: Path) -> None:
    # Before the generators are seeded, since a new network draws weights from them.
    made, data = task(), spots()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(3), np.random.rand(3), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    fit(made, data, replace(QUICK, matmul_precision="medium", threads=1), tmp_path)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == (precision, threads)


def test_without_a_terminal_each_epoch_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(
        task(metrics={"params": 1500.0, "params_dense": 3000.0}),
        spots(),
        replace(QUICK, epochs=2, quiet=False),
        tmp_path,
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("training 2/2  loss ")
    for word in ("train ", "val ", "1.50 k params (50 %)", "images/s", "loader "):
        assert word in lines[1]


def test_invalid_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size = 0"):
        TrainSettings(epochs=1, batch_size=0)
    with pytest.raises(InputError, match="choose one of none, flip, erasing, light, thesis"):
        fit(task(), spots(), replace(QUICK, augmentation="heavy"), tmp_path)  # type: ignore[arg-type]
