"""`vitrim.export` and every other public name, whatever was imported before and in which order."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import vitrim
from source_tree import ROOT, package_files

# Statements that import submodules, some of which have the name of a public function.
IMPORTS = [
    "import vitrim.export",
    "import vitrim.export.artifact",
    "import vitrim.export.artifact as module; assert module.Artifact",
    "from vitrim.export import exporter",
    "from vitrim.export import export_graph; assert callable(export_graph)",
    "from vitrim.export import Artifact, export; assert callable(export)",
    "from vitrim.export.artifact import Artifact",
    "import vitrim.cli",
    "from vitrim.cli import call; call(['--version'])",
    "import importlib; importlib.import_module('vitrim.export.manifest')",
    "from vitrim import *",
    "import vitrim.bench.local.measure, vitrim.pipeline.run",
]
# Runs the orders of one process, each with modules of vitrim that are imported anew.
CHECK = """
import sys
from functools import cache
from importlib.machinery import SourceFileLoader
from types import ModuleType

# Python's own loader, which compiles each file once even where no compiled files are written.
SourceFileLoader.get_code = cache(SourceFileLoader.get_code)

def imported_anew():
    for name in [name for name in sys.modules if name.partition(".")[0] == "vitrim"]:
        del sys.modules[name]
    import vitrim
    return vitrim

for order in {orders!r}:
    vitrim = imported_anew()
    for statement in order:
        exec(statement, {{}})
        for name in vitrim.__all__:
            value = vars(vitrim).get(name, vitrim)  # vitrim: not loaded yet
            assert value is vitrim or not isinstance(value, ModuleType), (order, statement, name)
    for name, module in vitrim._MODULES.items():
        value = getattr(vitrim, name)
        assert value is getattr(sys.modules["vitrim" + module], name), (order, name)
    assert vitrim.export.artifact is sys.modules["vitrim.export.artifact"], order
    assert vitrim.export.Artifact is vitrim.export.artifact.Artifact, order
    import vitrim.export.stage_line
    assert vitrim.export.stage_line is sys.modules["vitrim.export.stage_line"], order
print("all orders")
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def rotations(items: list[str]) -> list[list[str]]:
    return [items[start:] + items[:start] for start in range(len(items))]


NAMES = [f"from vitrim import {name}; assert callable({name})" for name in vitrim.__all__]


@pytest.mark.parametrize(
    "orders",
    [
        pytest.param(rotations(NAMES), id="each-name-first"),
        pytest.param(rotations(NAMES[::-1])[::4], id="backwards"),
        pytest.param([[first, *NAMES] for first in IMPORTS], id="modules-first"),
        pytest.param([[NAMES[5], *order] for order in rotations(IMPORTS)], id="modules-later"),
    ],
)
def test_no_module_takes_the_place_of_a_public_name(orders: list[list[str]]) -> None:
    assert run(CHECK.format(orders=orders)) == "all orders"


def test_a_public_name_can_be_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    original = vitrim.export
    with monkeypatch.context() as patch:
        patch.setattr(vitrim, "export", print)
        assert vitrim.export is print  # type: ignore[comparison-overlap]
    assert vitrim.export is original


def test_the_artifact_module_is_imported_under_a_short_name_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import vitrim.export.artifact as module; print(module.Artifact.__name__)"
    )
    assert run(code) == "Artifact"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vitrim' has no attribute 'expert'"):
        vitrim.expert  # noqa: B018


def test_no_inner_package_exports_a_name_that_one_of_its_modules_has() -> None:
    modules = package_files()
    packages = [name for name, path in modules.items() if path.name == "__init__.py"]
    shadowed = [
        f"{package}.{name}"
        for package in packages
        if package != "vitrim"
        for name in getattr(importlib.import_module(package), "__all__", ())
        if f"{package}.{name}" in modules
    ]
    assert len(packages) > 20
    assert shadowed == []
