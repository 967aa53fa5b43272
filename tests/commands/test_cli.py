"""The command line: help, exit codes, and the line of an unexpected error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from vitrim import __version__
from vitrim.cli import call
from vitrim.targets.catalog import load_target
from vitrim.targets.detect import detect_host, missing_features
from vitrim.targets.instruction_sets import CPU_FEATURES

COMMANDS = [
    "run",
    "train",
    "compress",
    "compact",
    "export",
    "bench",
    "report",
    "compare",
    "study",
    "targets",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([command, "--help"]) == 0
    assert f"vitrim {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"vitrim {__version__}\n"


def test_keys_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    from vitrim.pipeline.recipe import Recipe
    from vitrim.pipeline.recipe_keys import all_keys

    assert call(["run", "--keys"]) == 0
    out = capsys.readouterr().out
    for key, field in all_keys(Recipe):
        assert key.rpartition(".")[2] in out
        assert field.description is None or field.description.split(";")[0] in out


def test_an_unknown_command_or_option_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(["trim"]) == 2
    assert "trim" in capsys.readouterr().err
    assert call(["run", "--speed"]) == 2
    assert "--speed" in capsys.readouterr().err


def test_doctor_has_one_line_for_each_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert all(line.startswith(("ok", "missing", "broken")) for line in lines)


def test_doctor_finds_mismatched_builds_of_torch_and_torchvision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.metadata

    from vitrim.commands.doctor import examine

    versions = {"torch": "2.15.0+cpu", "torchvision": "0.29.2"}
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or real(name)
    )
    found = next(finding for finding in examine() if finding.name == "torch and torchvision")
    assert found.state == "broken"
    assert "install both from one index" in found.detail


def test_targets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["targets", "list"]) == 0
    assert "x86-64" in capsys.readouterr().out
    assert call(["targets", "show", "x86-64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "x86-64"
    assert call(["targets", "detect"]) == 0
    assert capsys.readouterr().out.startswith("host: ")


def test_the_processor_and_the_targets_that_run_here_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    v3 = load_target("x86-64-v3")
    if missing_features(v3) or detect_host().architecture != "x86_64":
        pytest.skip("this processor has no AVX2")
    monkeypatch.setenv(CPU_FEATURES, " ".join(v3.features))
    call(["doctor"])
    assert (
        "processor: avx2 vectors, int8 weights of seven bits, since its products saturate; "
        "runs code for host, x86-64, x86-64-v3\n"
    ) in capsys.readouterr().out
    assert call(["targets", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    able = [line.split()[0] for line in lines if line.rstrip().endswith("yes")]
    assert able == ["x86-64", "x86-64-v3"]
    assert call(["targets", "show", "x86-64-v4-vnni"]) == 0
    assert "this processor has no avx512f, " in capsys.readouterr().out


def test_ctrl_c_prints_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrim.commands.run.load_recipe", interrupted)
    assert call(["run", "my recipe.toml", "--overwrite", "--seed", "7"]) == 130
    assert (
        capsys.readouterr().err
        == "vitrim: interrupted; resume with: vitrim run 'my recipe.toml' --seed 7 --resume\n"
    )


def test_an_unexpected_error_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("seven\nlines")

    monkeypatch.setattr("vitrim.commands.run.load_recipe", broken)
    assert call(["run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ZeroDivisionError: seven" in lines[0]
    assert "VITRIM_TRACEBACK=1" in lines[0]


@pytest.mark.parametrize("module", ["vitrim", "vitrim.cli"])
def test_the_process_exits_with_the_code(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "run", "absent.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vitrim: absent.toml: no such recipe")


def test_python_m_vitrim_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitrim", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"vitrim {__version__}\n")
