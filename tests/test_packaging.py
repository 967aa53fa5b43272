"""The package as it is shipped: its folders, its data, its dependencies, what its start imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from source_tree import ROOT, package_files

# What a device runs, where torch is not installed.
TORCH_FREE = [
    "vitrim.cli",
    "vitrim.bench.local.measure",
    "vitrim.bench.report.writing",
    "vitrim.targets.profile",
    "vitrim.targets.check",
    "vitrim.export.artifact",
]


def test_the_list_of_packages_is_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {
        ".".join(("vitrim", *path.relative_to(ROOT).parent.parts))
        for path in package_files().values()
    }
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_package_has_an_init_file() -> None:
    assert [
        str(path.parent)
        for path in package_files().values()
        if not (path.parent / "__init__.py").is_file()
    ] == []


def test_the_recipes_and_data_are_packed() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["package-data"]
    shipped = {
        path
        for package, globs in packed.items()
        for pattern in globs
        for path in _folder(package).glob(pattern)
    }
    # Python files are packed by the list of packages; pages for developers are not needed.
    not_data = {".py", ".pyc", ".md", ".txt", ".lock", ""}
    top = {path.relative_to(ROOT).parts[0] for path in package_files().values()} - {"__init__.py"}
    needed = {
        path
        for folder in [*top, "recipes"]
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in not_data
    }
    assert sorted(str(path.relative_to(ROOT)) for path in needed - shipped) == []


def _folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_device_needs_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = ("torch", "timm", "onnx", "onnxruntime", "matplotlib", "datasets")
    code = f"import sys, vitrim.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert done.stdout.strip() == "[]"


# Folders of a person or a machine reveal the author; hosts that packages come from go stale.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(?:home|Users|work|mnt)/\w|/tmp/\w|C:\\Users|--(?:extra-)?index-url|--find-links|"
    r"\b(?:py[p]i\.org|files\.python[h]osted\.org|download\.py[t]orch\.org|"
    r"deb\.[d]ebian\.org|archive\.[u]buntu\.com|ghcr\.[i]o|docker\.[i]o)\b"
)


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    found = []
    for name in filter(None, tracked):
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{name}:{number}: {match[0]}"
            for number, line in enumerate(lines, 1)
            if (match := FORBIDDEN.search(line))
        ]
    assert found == []


def test_the_constraints_cover_every_dependency() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    items, extras = (
        settings["dependencies"] + settings["optional-dependencies"]["test"],
        settings["optional-dependencies"],
    )
    # An extra may name others of ours: vitrim[tvm,ncnn].
    included = [re.fullmatch(r"vitrim\[([\w,]+)\]", item) for item in items]
    items = [item for item in items if not item.startswith("vitrim[")]
    items += [
        item for match in included if match for name in match[1].split(",") for item in extras[name]
    ]
    wanted = {re.split(r"[<>=\[;~! ]", item)[0] for item in items}
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9\-]+==[\w.]+", line) for line in lines)
    assert {line.split("==")[0] for line in lines} >= wanted
