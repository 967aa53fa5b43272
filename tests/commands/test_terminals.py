"""Every command in terminals that lack characters, and paths that begin with `~`."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import vitrim
from photo_folder import CLASSES, write_photos, write_recipe
from source_tree import ROOT
from tiny_models import tiny_vit
from vitrim.cli import call
from vitrim.compress.lift import lift
from vitrim.core.console import echo, show, spelled_out
from vitrim.export.artifact import Artifact
from vitrim.pipeline.recipe import load_recipe

# The first has no characters beyond ASCII in names of files either; the second refuses to write
# what it lacks, and the third is like it with more characters.
TERMINALS = {
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}
NAME = "modèle→×"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a mask, an artifact, photos and a recipe, with names beyond Latin-1."""
    folder = tmp_path_factory.mktemp("made")
    model = lift(tiny_vit(num_classes=3))
    vitrim.save(model, folder / NAME)
    vitrim.StructuredMask.random(model, 0.5, "residual", 0).save(folder / "mask.safetensors")
    vitrim.export(model, folder / "artifact", labels=["chat", "été", "→"])
    photos = write_photos(folder / "photos")
    for part in ("train", "test"):
        (photos / part / CLASSES[0]).rename(photos / part / "été→")
    write_recipe(folder / "rezept→.toml", photos, "[bench]\ntime_limit_s = 1.0\n", masks_epochs=1)
    return folder


# Runs the commands of one process, one after the other, and writes a line after each.
COMMANDS = """
import os, sys
from vitrim.cli import call
words = sys.argv[1:]
while words:
    end = words.index(";")
    code = call(words[:end])
    words = words[end + 1 :]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.write(stream.fileno(), b"<ended: %d>" % code)
"""
ENDED = re.compile(r"<ended: (\d+)>")


def start(made: Path, terminal: str, *command: str) -> tuple[int, str, str]:
    """Run Python in a terminal; the exit code and what it wrote, decoded as that terminal does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUTF8"}
    done = subprocess.run(
        [sys.executable, *map(os.fsencode, command)],
        cwd=made,
        env={**environment, "PYTHONPATH": str(ROOT.parent), **TERMINALS[terminal]},
        capture_output=True,
        check=False,
    )
    encoding = "latin-1" if terminal == "latin-1" else "ascii"
    output, errors = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert "Traceback" not in errors, errors
    return done.returncode, output, errors


def run(made: Path, terminal: str, *commands: list[str], codes: Sequence[int] = ()) -> list[str]:
    """What each command wrote, output before errors; all succeed, or end with the codes."""
    words = [word for command in commands for word in (*command, ";")]
    code, output, errors = start(made, terminal, "-c", COMMANDS, *words)
    assert code == 0, errors
    texts = [each + more for each, more in zip(*map(ENDED.split, (output, errors)), strict=True)]
    found = [int(code) for code in ENDED.findall(errors)]
    assert found == list(codes or [0] * len(commands)), errors
    return texts[:-1:2]


@pytest.mark.parametrize("terminal", TERMINALS)
def test_help_of_every_command(made: Path, terminal: str) -> None:
    code, output, _ = start(made, terminal, "-m", "vitrim", "--version")
    assert code == 0
    assert output.startswith("vitrim ")
    names = ("", "bench", "run", "train", "compress", "compact", "export", "report", "compare")
    commands = [[*name.split(), "--help"] for name in names]
    texts = run(made, terminal, *commands, ["run", "--keys"])
    assert all("Usage" in text for text in texts[:-1])
    assert "N[,N...]" in texts[1]


@pytest.mark.parametrize("terminal", ["C", "ascii"])
def test_the_commands_of_a_saved_model(made: Path, terminal: str, tmp_path: Path) -> None:
    *_, absent = texts = run(
        made,
        terminal,
        ["compact", NAME, "--keep-ratio", "0.5", "--explain", "--out", str(tmp_path / "out")],
        ["targets", "list"],
        ["targets", "show", "host"],
        ["targets", "check", NAME],
        ["doctor"],
        ["compact", "→absent.pth", "--keep-ratio", "0.5"],
        codes=[0, 0, 0, 0, 0, 2],
    )
    assert "saved: " in texts[0]
    assert absent.startswith("vitrim: ->absent.pth: " if terminal != "C" else "vitrim: ")


@pytest.mark.parametrize("terminal", ["ascii"])
def test_the_commands_of_an_artifact(made: Path, terminal: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(made / "artifact", tmp_path / name)
    artifacts = [f"{tmp_path}/one", f"{tmp_path}/two"]
    measured = f"{tmp_path}/measured"
    _, _, bench, compared, _ = run(
        made,
        terminal,
        ["export", NAME, "--data", "imagefolder:photos", "--out", f"{tmp_path}/a→"],
        ["export", "--verify", "artifact"],
        ["bench", *artifacts, "--time-limit", "0.2", "-q", "--profile", "--out", measured],
        ["compare", measured],
        ["report", measured, "--out", f"{tmp_path}/rapport→"],
    )
    assert Artifact.load(tmp_path / "a→").manifest.labels == ("bee", "fly", "été→")
    assert "time by operator" in bench
    assert "time ratio" in compared
    assert (tmp_path / "rapport→" / "report.html").is_file()


@pytest.mark.parametrize("terminal", ["C"])
def test_a_whole_run(made: Path, terminal: str, tmp_path: Path) -> None:
    (text,) = run(made, terminal, ["run", "rezept→.toml", "--out", f"{tmp_path}/run"])
    assert "report: " in text
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_a_terminal_lacks_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (
        ("ascii", "2 +- 1 u -> 3 x 10-7 ... caf? ? ?\n"),
        ("latin-1", "2 ± 1 µ -> 3 × 10-7 ... café ? ?\n"),
        ("utf-8", "2 ± 1 µ → 3 × 10⁻⁷ … café 中 ?\n"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        with spelled_out():
            echo("2 ± 1 µ → 3 × 10⁻⁷ … café 中 \udce9")
        stream.seek(0)
        assert stream.buffer.read().decode(encoding) == expected
        assert stream.errors == "strict"


def test_brackets_in_names_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show("saved: runs/[bold]/a[/b]")
    assert capsys.readouterr().out == "saved: runs/[bold]/a[/b]\n"


# ---- ~ ----


@pytest.fixture
def at_home(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that `~` stands for, and that is not the current one."""
    home = tmp_path / "home"
    shutil.copytree(made, home)
    (home / NAME).rename(home / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "~/model", "--out", "~/out"],
        ["export", "~/model", "--out=~/out", "--data", "imagefolder:~/photos"],
        ["compact", "~/model", "--mask=~/mask.safetensors", "--out=~/out"],
        ["compact", "--checkpoint=~/model", "--keep-ratio", "0.5", "--out", "~/out"],
    ],
)
def test_a_tilde_in_path_options_is_the_home_folder(at_home: Path, arguments: list[str]) -> None:
    assert call(arguments) == 0
    assert len(list((at_home / "out").iterdir())) >= 2
    assert os.listdir() == []


def test_a_tilde_in_targets_reports_and_checks(
    at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "targets" / "rpi4.toml", at_home / "mine.toml")
    for arguments in (
        ["targets", "show", "~/mine.toml"],
        ["targets", "check", "--target=~/mine.toml", "~/model"],
        ["export", "--verify", "~/artifact"],
    ):
        assert call(arguments) == 0, capsys.readouterr()
    assert call(["report", "~/absent"]) == 2
    assert f"{at_home}/absent: no such file" in capsys.readouterr().err


def test_a_tilde_in_a_recipe(at_home: Path) -> None:
    shutil.copy(ROOT / "targets" / "rpi4.toml", at_home / "mine.toml")
    (at_home / "mine-too.toml").write_text("masks = {params = 0.5}\n")
    recipe = load_recipe(
        at_home / "mine-too.toml",
        [
            "model.checkpoint=~/model",
            "data.name=imagefolder:~/photos",
            "export.target=~/mine.toml",
            'report.estimate_for=["~/mine.toml"]',
        ],
    )
    assert recipe.model.checkpoint == f"{at_home}/model"
    assert recipe.export.target == f"{at_home}/mine.toml"
    assert recipe.report.estimate_for == (f"{at_home}/mine.toml",)
    assert recipe.inputs()["the data set"] == at_home / "photos"


def test_a_file_whose_name_begins_with_a_tilde(tmp_path: Path, made: Path) -> None:
    code = "from vitrim.cli import _expanded as e; print(e('~'), e('--out=~'), e('--x'), e('a~'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": "/h"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["/h", "--out=/h", "--x", "a~"]
