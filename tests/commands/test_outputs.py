"""What every command writes and never touches: inputs, files of others, folders of another kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_samples
import bundle_sample
import pytest
import report_sample
import torch
import vitrim
from photo_folder import write_photos, write_recipe
from tiny_models import tiny_vit
from vitrim.bench.results.measurement import Measurement
from vitrim.cli import call
from vitrim.compress.lift import lift
from vitrim.export import bundle as bundle_module
from vitrim.export.artifact import Artifact
from vitrim.pipeline.run_folder import LEDGER, RunFolder
from vitrim.targets.catalog import FOLDER

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved model, a mask, an artifact, a checkpoint and photos."""
    folder = tmp_path_factory.mktemp("made")
    model = lift(tiny_vit())
    vitrim.save(model, folder / "model")
    vitrim.StructuredMask.random(model, 0.5, "residual", 0).save(folder / "mask.safetensors")
    vitrim.export(model, folder / "artifact")
    shutil.copy(folder / "artifact" / "model.onnx", folder / "graph.onnx")
    torch.save(tiny_vit().state_dict(), folder / "weights.pth")
    write_photos(folder / "photos")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `project/` with a copy of everything, and a file of the user."""
    shutil.copytree(made, tmp_path / "project")
    (tmp_path / "project" / "thesis.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every path with what identifies the file that is there."""
    found: dict[str, tuple[int, int] | None] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = None if path.is_dir() else (status.st_ino, status.st_mtime_ns)
    return found


@pytest.fixture
def refused(work: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with 2 and one line, and must leave the disk as it was."""

    def check(*arguments: str | Path) -> str:
        capsys.readouterr()
        before = contents(work)
        code = call([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, ""), captured
        assert contents(work) == before
        (line,) = captured.err.splitlines()
        return line.removeprefix("vitrim: ")

    return check


def done(*arguments: str | Path) -> None:
    assert call([str(argument) for argument in arguments]) == 0


EXPORT = "export project/model"
COMPACT = "compact project/model --keep-ratio 0.5"


@pytest.mark.parametrize(
    ("command", "out", "relation"),
    [
        (EXPORT, "project", "contains the model"),
        (EXPORT, "project/model", "is the model"),
        (EXPORT, "project/model/small", "lies in the model"),
        (EXPORT, "link", "is the model"),
        (f"{EXPORT} --runtime all", "project", "contains the model"),
        (f"{EXPORT} --data imagefolder:project/photos", "project/photos", "is the data set"),
        (f"{EXPORT} --data imagefolder:project/photos", "project/photos/x", "lies in the data set"),
        (f"{EXPORT} --target project/mine.toml", "project", "contains the model"),
        ("export project/graph.onnx", "project", "contains the model"),
        ("export project/graph.onnx", ".", "contains the model"),
        (f"{EXPORT} --out b --bundle", "b", "is the artifact"),
        (f"{EXPORT} --out b --bundle", "b/cpp", "lies in the artifact"),
        (f"{EXPORT} --out b --bundle", "project/model", "is the model"),
        (COMPACT, "project/model", "is the model"),
        (COMPACT, "project", "contains the model"),
        ("compact project/model --mask project/mask.safetensors", "project", "contains the"),
        ("compact project/weights.pth --model vit_tiny_patch16_224", "project", "contains the"),
        ("bench project/artifact", "project/artifact", "is the artifact"),
        ("bench project/artifact", "project/artifact/x", "lies in the artifact"),
        ("bench project/artifact", "project", "contains the artifact"),
    ],
)
def test_an_output_that_overlaps_an_input_is_refused(
    work: Path, refused: Refused, command: str, out: str, relation: str
) -> None:
    (work / "link").symlink_to("project/model")
    shutil.copy(FOLDER / "rpi4.toml", work / "project" / "mine.toml")
    last = [] if command.endswith("--bundle") else ["--out"]
    for overwrite in ([], ["--overwrite"]):
        line = refused(*command.split(), *last, out, *overwrite)
        assert line.startswith(f"{out}: the output {relation}"), line
        assert line.endswith("name another place for the output")


@pytest.mark.parametrize(
    "command",
    [
        EXPORT,
        f"{EXPORT} --runtime all",
        "export project/graph.onnx",
        COMPACT,
        "run recipe.toml",
        "train recipe.toml",
        "compress recipe.toml",
    ],
)
@pytest.mark.parametrize("there", ["thesis", "model", "artifact", "almost a run", "json"])
def test_a_folder_of_another_kind_is_never_replaced(
    work: Path, refused: Refused, command: str, there: str
) -> None:
    write_recipe(work / "recipe.toml", work / "project" / "photos")
    (work / "out").mkdir()
    if there == "thesis":
        (work / "out" / "thesis.txt").write_text("precious")
    elif there == "almost a run":
        (work / "out" / LEDGER).write_text("{}")
        (work / "out" / "recipe.toml").write_text("precious")
    elif there == "json":
        for name in ("manifest.json", "architecture.json", LEDGER, "data.json"):
            (work / "out" / name).write_text('{"schema": "mine/1", "seal": "x"}')
    else:
        shutil.copytree(work / "project" / there, work / "out", dirs_exist_ok=True)
    own = {"model": "compact", "artifact": "export"}.get(there) == command.split()[0]
    if own and "all" not in command:
        line = refused(*command.split(), "--out", "out")
        assert line.endswith("pass --overwrite to replace it")
        return
    line = refused(*command.split(), "--out", "out", "--overwrite")
    assert line.startswith("out: the output folder is not empty and is not a"), line
    assert line.endswith("so it is not replaced; name another folder")


def test_a_file_of_the_user_in_an_earlier_result_is_kept(work: Path, refused: Refused) -> None:
    for command, result in ((EXPORT, "artifact"), (COMPACT, "model")):
        shutil.copytree(work / "project" / result, work / result)
        (work / result / "notes.md").write_text("precious")
        line = refused(*command.split(), "--out", result, "--overwrite")
        assert line == (
            f"{result}: vitrim did not write notes.md in this folder, so it is not replaced; "
            "move that file elsewhere, or name another folder"
        )
        (work / result / "notes.md").unlink()
        done(*command.split(), "--out", result, "--overwrite")


def test_overwriting_replaces_all_files_of_an_earlier_result(work: Path) -> None:
    done(*EXPORT.split(), "--out", "out", "--ort-format")
    done(*EXPORT.split(), "--out", "out", "--overwrite")
    assert sorted(os.listdir("out")) == ["manifest.json", "model.onnx"]
    Artifact.load("out")
    done(*COMPACT.split(), "--out", "small")
    done("compact", "small", "--out", "clean")
    done(*COMPACT.split(), "--out", "clean", "--overwrite")
    assert vitrim.load("clean").architecture == vitrim.load("small").architecture
    assert sorted(os.listdir(work)) == ["clean", "out", "project", "small"]


@pytest.mark.parametrize("command", [EXPORT, COMPACT])
def test_an_empty_folder_that_cannot_be_renamed_is_written_in_place(
    work: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "real").mkdir()
    (work / "link").symlink_to("real")
    done(*command.split(), "--out", "link")
    (work / "here").mkdir()
    monkeypatch.chdir("here")
    done(*command.replace("project", "../project").split(), "--out", ".")
    assert sorted(os.listdir()) == sorted(os.listdir(work / "real"))
    done(*command.replace("project", "../project").split(), "--out", ".", "--overwrite")
    assert sorted(os.listdir(work)) == ["here", "link", "project", "real"]
    assert os.path.samefile(".", work / "here")


@pytest.mark.parametrize("command", [EXPORT, COMPACT, "run recipe.toml", "bench project/artifact"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "file: a file is in the way of the output folder; name another folder"),
        ("file/x", "a file is in the way of the output folder; name another folder"),
        ("a" * 300, "File name too long"),
        ("loop", "symbolic links"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(
    work: Path, refused: Refused, command: str, out: str, words: str
) -> None:
    write_recipe(work / "recipe.toml", work / "project" / "photos")
    (work / "file").write_text("precious")
    (work / "loop").symlink_to("loop")
    assert words in refused(*command.split(), "--out", out)


# ---- runs ----


def test_a_run_does_not_overwrite_what_its_recipe_names(work: Path, refused: Refused) -> None:
    photos = work / "project" / "photos"
    write_recipe(work / "project" / "recipe.toml", photos)
    run = ["run", "project/recipe.toml", "--overwrite"]
    for out, relation in (
        ("project", "contains the data set"),
        ("project/photos/run", "lies in the data set"),
        ("project/recipe.toml", "is the recipe"),
    ):
        assert f"the output {relation} that is read" in refused(*run, "--out", out)
    checkpoint = ["--set", "model.checkpoint=project/model"]
    line = refused(*run, *checkpoint, "--out", "project/model")
    assert "the output is the checkpoint that is read" in line


def a_run(folder: Path) -> RunFolder:
    """A run folder with a saved model, an artifact and what a run writes around them."""
    run = RunFolder.open(folder, resume=False, overwrite=False)
    model = lift(tiny_vit())
    for name in ("baseline", "cut", "compact"):
        vitrim.save(model, folder / name)
    vitrim.export(model, folder / "artifacts" / "compact-fp32")
    Measurement.model_validate(report_sample.measurements()["compact-int8"]).save(
        folder / "measurements" / "compact-int8.json"
    )
    for name in ("recipe.toml", "history.jsonl", "report.html", "training/masks/checkpoint.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return run


def test_overwriting_a_run_deletes_the_run_and_nothing_else(work: Path) -> None:
    a_run(work / "run")
    inode = (work / "run").stat().st_ino
    RunFolder.open(work / "run", resume=False, overwrite=True)
    assert os.listdir("run") == [LEDGER]
    assert (work / "run").stat().st_ino == inode


@pytest.mark.parametrize(
    "name",
    ["notes.md", "baseline/notes.md", "artifacts/compact-fp32/x", "measurements/mine.json", "x/y"],
)
def test_a_run_with_a_file_of_the_user_is_not_deleted(
    work: Path, refused: Refused, name: str
) -> None:
    write_recipe(work / "recipe.toml", work / "project" / "photos")
    a_run(work / "run")
    (work / "run" / name).parent.mkdir(exist_ok=True)
    (work / "run" / name).write_text("precious")
    line = refused("run", "recipe.toml", "--out", "run", "--overwrite")
    assert line.startswith(f"run: vitrim did not write {name} in this folder"), line


def test_a_step_that_would_replace_a_file_of_the_user_does_not_begin(work: Path) -> None:
    run = a_run(work / "run")
    (work / "run" / "baseline" / "notes.md").write_text("precious")
    with pytest.raises(vitrim.InputError, match=r"notes\.md: vitrim did not write this file"):
        run.step("baseline", "a", ["baseline"], lambda _: pytest.fail("began"), lambda: None)
    (work / "run" / "measurements" / "notes.md").write_text("precious")
    run.step("bench", "a", ["measurements"], lambda _: None, lambda: None)


def test_a_damaged_ledger_is_still_one_of_a_run(work: Path) -> None:
    a_run(work / "run")
    (work / "run" / "data.json").write_text('{"schema": "vitrim.data/1"}')
    (work / "run" / LEDGER).write_text("{")
    RunFolder.open(work / "run", resume=False, overwrite=True)
    assert os.listdir("run") == [LEDGER]


# ---- single files ----


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the artifacts whose measurement began, none of which takes time."""
    begun: list[str] = []

    def measure(where: Any, paths: dict[str, Path], *_: Any, **__: Any) -> dict[str, Measurement]:
        begun.extend(paths)
        return {name: bench_samples.measurement(name=name) for name in paths}

    monkeypatch.setattr("vitrim.bench.remote.measure.measure_at", measure)
    return begun


def test_bench_replaces_only_measurements(
    work: Path, refused: Refused, measured: list[str]
) -> None:
    bench = ["bench", "project/artifact", "--out", "out"]
    done(*bench)
    (work / "out" / "thesis.txt").write_text("precious")
    assert "exists already; --overwrite replaces it" in refused(*bench)
    done(*bench, "--overwrite")
    (work / "out" / "artifact.json").write_text('{"text": "precious"}')
    line = refused(*bench, "--overwrite")
    assert line.startswith("out/artifact.json: vitrim did not write this file (it is not a measur")
    assert len(measured) == 2


def test_a_cost_table_replaces_only_a_cost_table(work: Path, refused: Refused) -> None:
    bench = ["bench", "--overwrite", "--cost-table"]
    assert "it is not a cost table" in refused(*bench, "project/thesis.txt")
    assert "a folder; name a file" in refused(*bench, "project")
    assert "not a regular file" in refused(*bench, "/dev/null")
    assert "a file is in the way" in refused(*bench, "project/thesis.txt/x.json")
    assert "File name too long" in refused(*bench, "a" * 300)


def test_a_mask_replaces_only_a_mask(work: Path) -> None:
    mask = vitrim.StructuredMask.load("project/mask.safetensors")
    mask.save("project/mask.safetensors")
    for name in ("project/model/model.safetensors", "project/thesis.txt"):
        before = Path(name).read_bytes()
        with pytest.raises(vitrim.InputError, match="vitrim did not write this file"):
            mask.save(name)
        assert Path(name).read_bytes() == before


# ---- the functions of the package ----


def test_functions_follow_the_same_rules(work: Path) -> None:
    model = vitrim.load("project/model")
    vitrim.save(model, "project/model", overwrite=True)
    for write in (
        lambda: vitrim.save(model, "project", overwrite=True),
        lambda: vitrim.save(model, "project/artifact", overwrite=True),
        lambda: vitrim.export(model, "project", overwrite=True),
        lambda: vitrim.export(model, "project/model", overwrite=True),
    ):
        before = contents(work)
        with pytest.raises(vitrim.InputError, match=r"is not a[n ].* that vitrim wrote"):
            write()
        assert contents(work) == before
    artifact = bundle_sample.artifact_in(work / "packed")
    for folder in ("packed", "packed/cpp", "."):
        with pytest.raises(vitrim.InputError, match=r"the output (is|lies in|contains) the artif"):
            bundle_module.bundle(artifact, folder, overwrite=True)
    with pytest.raises(vitrim.InputError, match="is not a bundle that vitrim wrote"):
        bundle_module.bundle(artifact, "project", overwrite=True)
    for _ in range(2):
        bundle_module.bundle(artifact, "cpp", overwrite=True)
    (work / "cpp" / "build").mkdir()
    (work / "cpp" / "build" / "example.o").write_text("")
    with pytest.raises(vitrim.InputError, match=r"did not write build/example\.o"):
        bundle_module.bundle(artifact, "cpp", overwrite=True)


def test_a_run_may_be_completed_by_later_commands(work: Path) -> None:
    """A model exported into its run, and a picture of it, belong to the run."""
    a_run(work / "run")
    done("export", "run/compact", "--out", "run/mine")
    record = json.loads((work / "run" / LEDGER).read_text())
    assert record["schema"] == "vitrim.steps/1"
    RunFolder.check(work / "run", resume=False, overwrite=True)
