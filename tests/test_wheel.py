"""The wheel: it is built from a copy, installed alone, and runs the chain from another folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from source_tree import OUTSIDE, ROOT

if importlib.util.find_spec("build") is None:
    pytest.skip("build is not installed: pip install 'vitrim[test]'", allow_module_level=True)

# Seconds instead of minutes: few images, no fine-tuning, one precision.
TINY = [
    "data.limit=128",
    "masks.images=64",
    "finetune.epochs=0",
    "train.threads=1",
    'export.precisions=["fp32"]',
    "bench.time_limit_s=0.5",
    "bench.top1_images=64",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, which is built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    # Folders of earlier builds would be packed again: modules that have moved since, too.
    unpacked = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", *(OUTSIDE - {"recipes"}))
    shutil.copytree(ROOT, folder / "source", ignore=unpacked)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(
        command, cwd=folder / "source", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which finds everything else in this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A folder that a .pth file names is searched last, and its own .pth files, with which an
    # editable vitrim is installed, are not read.
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet"]
    subprocess.run(
        [*command, "--no-deps", "--no-index", "--ignore-installed", str(wheel)],
        capture_output=True,
        check=True,
    )
    return folder


def _run(environment: Path, program: str, *arguments: str, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_contains_every_data_file(wheel: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {
        str(Path(package.replace(".", "/")) / path.relative_to(folder))
        for package, patterns in settings["tool"]["setuptools"]["package-data"].items()
        for folder in [ROOT.joinpath(*package.split(".")[1:])]
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert len(needed) > 50
    assert needed - packed == set()
    assert not [name for name in packed if name.startswith(("vitrim/tests", "vitrim/benchmarks"))]


def test_the_wheel_is_what_is_imported(environment: Path, tmp_path: Path) -> None:
    code = "import vitrim, vitrim.cli, vitrim.compress.surgery; print(vitrim.__file__)"
    place = Path(_run(environment, "python", "-c", code, cwd=tmp_path).strip())
    assert place.is_relative_to(environment)
    assert _run(environment, "python", "-m", "vitrim", "--version", cwd=tmp_path).startswith(
        "vitrim "
    )


def test_the_installed_program_runs_the_whole_chain(environment: Path, tmp_path: Path) -> None:
    sets = [word for key in TINY for word in ("--set", key)]
    table = _run(environment, "vitrim", "run", *sets, cwd=tmp_path)
    assert "compact fp32" in table
    report = json.loads((tmp_path / "runs" / "quickstart" / "report.json").read_text())
    assert list(report["models"]) == ["baseline", "compact"]
