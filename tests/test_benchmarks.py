"""The benchmarks: every module imports, and every command that a page names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from source_tree import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if path.name != "__init__.py"
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_benchmark_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("vitrim", "benchmarks"):
            raise
        pytest.skip(f"{error.name} is not installed: pip install 'vitrim[benchmarks]'")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    names = re.findall(r"python -m (benchmarks[\w.]+)", page.read_text(encoding="utf-8"))
    known = {*MODULES, *(name.removesuffix(".__main__") for name in MODULES)}
    assert [name for name in names if name.rstrip(".") not in known] == []
