"""Training in several processes (gloo on the CPU), started by accelerate as users do."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from vitrim.cli import call
from vitrim.compress.data.splits import Split
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.network.files import load
from vitrim.compress.train.evaluate import evaluate
from vitrim.compress.train.processes import Processes, join_processes
from vitrim.core.errors import InputError
from warm_processes import Running, start_vitrim

pytest.importorskip("accelerate", reason="accelerate is not installed (vitrim[distributed])")

RECIPE = """
[data]
name = "quickstart"
limit = 128

[model.overrides]
img_size = 28
patch_size = 7
in_chans = 1
embed_dim = 32
depth = 2
num_heads = 2
num_classes = 10

[baseline]
epochs = 1
warmup_epochs = 0
augmentation = "none"

[masks]
params = 0.4
epochs = 30
lr = 1e-3
augmentation = "none"
round_to = 1

[finetune]
epochs = 1
augmentation = "none"

[train]
batch_size = 32
device = "cpu"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process."""
    folder = recipe.parent / "alone"
    assert call(["compress", str(recipe), "--out", str(folder), "--quiet"]) == 0
    return folder


def start(recipe: Path, folder: Path, *options: str) -> Running:
    """Start two processes that train in a folder."""
    arguments = ["compress", recipe, "--out", folder, "--processes", "2", "--quiet", *options]
    return start_vitrim(*arguments, log=folder.with_name(f"{folder.name}-{len(options)}"))


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(recipe: Path) -> tuple[Path, Running, list[psutil.Process]]:
    """The folder of two processes, one of which was killed; the launcher; the two."""
    folder = recipe.parent / "killed"
    launcher = start(recipe, folder)
    launcher.wait_until(lambda: (folder / "history.jsonl").is_file() and len(history(folder)) >= 3)
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    os.kill(max(children, key=lambda child: child.pid).pid, signal.SIGKILL)
    launcher.wait()
    assert 3 <= len(history(folder)) < 31
    return folder, launcher, children


@pytest.fixture(scope="module")
def resumed(recipe: Path, killed: tuple[Path, Running, list[psutil.Process]]) -> Running:
    """Two processes that completed that run."""
    folder = killed[0]
    launcher = start(recipe, folder, "--resume", "--json-progress")
    assert launcher.wait() == 0, launcher.errors()
    assert len(history(folder)) == 31
    return launcher


def test_a_killed_process_ends_the_others_with_one_line(
    killed: tuple[Path, Running, list[psutil.Process]],
) -> None:
    _, launcher, children = killed
    errors = launcher.errors()
    assert launcher.poll() == 1
    lines = [line for line in errors.splitlines() if line.startswith("vitrim:")]
    assert len(lines) == 1
    assert "ended (SIGKILL), and the others were stopped; continue with: vitrim" in lines[0]
    assert lines[0].endswith("--resume")
    assert "Traceback" not in errors
    assert not any(child.is_running() for child in children)


def test_two_processes_learn_the_masks_of_one_although_they_were_killed(
    alone: Path, killed: tuple[Path, Running, list[psutil.Process]], resumed: Running
) -> None:
    folder = killed[0]
    # To the unit: sums over two halves of a batch are rounded in another order, and no choice of
    # this run is that close.
    assert (folder / "mask.safetensors").read_bytes() == (alone / "mask.safetensors").read_bytes()
    one, two = history(alone), history(folder)
    assert [line["params"] for line in two] == [line["params"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    # Validation images are counted once, although 1,500 are shared.
    assert two[0]["val_top1"] == one[0]["val_top1"]
    images = torch.rand(8, 1, 28, 28)
    outputs = [load(each / "cut")(images) for each in (alone, folder)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-2)
    # One process writes the lines of --json-progress.
    epochs = [json.loads(line)["epoch"] for line in resumed.output().splitlines()]
    assert epochs == [line["epoch"] for line in two[-len(epochs) :]]
    assert len(epochs) > 1


@pytest.mark.usefixtures("resumed")
def test_a_run_of_two_processes_continues_in_one(
    recipe: Path, killed: tuple[Path, Running, list[psutil.Process]]
) -> None:
    folder = killed[0]
    options = ["--resume", "--quiet", "--set", "train.threads=1"]
    assert call(["compress", str(recipe), "--out", str(folder), *options]) == 0
    # Its steps were complete, and none is repeated.
    assert len(history(folder)) == 31


def test_two_processes_learn_the_token_sets_of_one(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    sizes = (
        'macs = 0.4\ntokens = "learned"\nepochs = 8\n'
        'fixed = ["embed", "qk", "v", "ffn"]\n'
        "attention_overhead_macs = 0.0\nffn_overhead_macs = 0.0"
    )
    path.write_text(RECIPE.replace("params = 0.4\nepochs = 30", sizes))
    two = start(path, tmp_path / "two")
    assert call(["compress", str(path), "--out", str(tmp_path / "one"), "--quiet"]) == 0
    assert two.wait() == 0, two.errors()
    masks = [tmp_path / name / "mask.safetensors" for name in ("one", "two")]
    assert masks[0].read_bytes() == masks[1].read_bytes()
    assert int(StructuredMask.load(masks[0]).kept["token"]["blocks.0.ffn"].sum()) < 17


def test_an_error_of_the_processes_is_one_line(recipe: Path, alone: Path) -> None:
    launcher = start(recipe, alone)
    assert launcher.wait() == 2
    errors = launcher.errors()
    assert errors.count("\n") == 1
    assert errors.startswith(f"vitrim: {alone}: the output folder contains an earlier run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "train.batch_size = 32 and 32 training images cannot be divided"),
        (["--processes", "64"], "among 64 processes; choose a batch_size that is a multiple"),
        (["--processes", "2", "--set", "train.device=cuda"], 'train.device = "cuda": torch'),
    ],
)
def test_processes_that_cannot_train_are_refused(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(["run", str(recipe), "--out", str(tmp_path / "run"), *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_accelerate_the_command_that_installs_it_is_named(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    options = ["--out", str(tmp_path / "run"), "--processes", "2"]
    assert call(["run", str(recipe), *options]) == 2
    assert capsys.readouterr().err == (
        "vitrim: --processes needs accelerate, which is not installed; "
        "pip install 'vitrim[distributed]'\n"
    )
    # Started by a launcher of another installation.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="several processes needs accelerate"):
        join_processes("cpu")


class Shared(Processes):
    """A process whose partners' sums are given."""

    def __init__(self, rank: int, count: int, others: float) -> None:
        self.rank, self.count, self.others = rank, count, others

    def sum(self, values: Any) -> list[float]:
        return [value + self.others for value in values]

    def from_main(self, value: Any) -> Any:
        return "the state of the main process"


@pytest.mark.parametrize("count", [2, 3, 5, 100])
def test_shared_validation_counts_each_image_once(count: int) -> None:
    from training_material import Net, spots

    model, data = Net().eval(), spots()
    seen: list[int] = []
    real = Split.select

    def counted(self: Split, indices: Any) -> Split:
        seen.extend(map(int, indices))
        return real(self, indices)

    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "select", counted)
        for rank in range(count):
            found = evaluate(model, data.val, processes=Shared(rank, count, 0.0))
            shares.append(found * len(data.val) / 100.0)
    assert seen == list(range(len(data.val)))
    others = sum(shares) - shares[0]
    whole = evaluate(model, data.val, processes=Shared(0, count, round(others)))
    assert whole == evaluate(model, data.val)


def test_processes_that_disagree_are_stopped() -> None:
    with pytest.raises(InputError, match="process 1: its masks differ from those of the main"):
        Shared(1, 2, 0.0).require_equal("another state", "masks")
