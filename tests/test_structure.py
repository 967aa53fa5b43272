"""The order of the packages, the size of the modules, their documentation and their language."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import source_tree
from source_tree import ROOT, package_files, public_functions

# What each package may import, beside itself. The command line may import all of them.
MAY_IMPORT = {
    "core": set[str](),
    "runtimes": set[str](),
    "targets": {"core"},
    "compress": {"core", "targets"},
    "export": {"core", "targets", "compress", "runtimes"},
    "bench": {"core", "targets", "export.artifact", "export.manifest", "runtimes"},
    "pipeline": {"core", "targets", "compress", "runtimes", "export", "bench"},
}
# Inside `compress` an import goes to the left.
COMPRESS_ORDER = [
    "data",
    "network",
    "lift",
    "masks",
    "surgery",
    "oneshot",
    "tokens",
    "latency",
    "train",
]
# Two of the same rank: neither imports the other.
COMPRESS_RANK = {name: max(0, place - 1) for place, name in enumerate(COMPRESS_ORDER)}
SMALL_LINES, SMALL_SHARE, LARGEST_LINES = 50, 0.12, 450
MANY_PARAMETERS = 4
# Technical English has a term for each: returns, reports, raises, requested, unknown, package.
UNTECHNICAL = """
    tell tells telling told untold say says saying said ask asks asked asking unasked
    hear hears heard hearing stranger strangers door doors house houses room rooms
"""
UNTECHNICAL_WORDS, FEW = set(UNTECHNICAL.split()), 20


def _inner(module: str) -> str:
    return module.removeprefix("vitrim").removeprefix(".")


def _within(module: str, allowed: str) -> bool:
    """Whether a module is the allowed one, inside it, or the package around it."""
    return f"{module}.".startswith(f"{allowed}.") or f"{allowed}.".startswith(f"{module}.")


def test_the_root_holds_three_python_files() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "__init__.py",
        "__main__.py",
        "cli.py",
    ]


def test_the_imports_form_no_circle() -> None:
    graph = {module: source_tree.imports(module) for module in package_files()}
    assert [" -> ".join(circle) for circle in source_tree.circles(graph)] == []


def test_imports_inside_functions_count() -> None:
    # It waits there, because torch takes seconds to import.
    assert "vitrim.pipeline.run" in source_tree.imports("vitrim.commands.run")


def test_a_circle_is_found_once_and_named() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set[str](), "e": {"a"}}
    assert source_tree.circles(graph) == [["a", "b", "c", "a"]]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_each_package_imports_only_those_below_it(package: str) -> None:
    allowed = {package, *MAY_IMPORT[package]}
    # The root holds the version and the names that users import, loaded on first use.
    wrong = [
        f"{module} imports {other}"
        for module in package_files()
        if _inner(module).split(".")[0] == package
        for other in sorted(source_tree.imports(module))
        if _inner(other) and not any(_within(_inner(other), name) for name in allowed)
    ]
    assert wrong == []


def test_inside_compress_the_imports_go_one_way() -> None:
    wrong = []
    for module in package_files():
        here = module.removeprefix("vitrim.compress.").split(".")[0]
        if not module.startswith("vitrim.compress."):
            continue
        assert here in COMPRESS_RANK, f"{module}: a folder that the order does not name"
        for other in source_tree.imports(module):
            there = other.removeprefix("vitrim.compress.").split(".")[0]
            if not other.startswith("vitrim.compress.") or there == here:
                continue
            if COMPRESS_RANK[there] >= COMPRESS_RANK[here]:
                wrong.append(f"{module} imports {other}")
    assert sorted(wrong) == []


def _line_counts() -> dict[str, int]:
    return {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in package_files().values()
    }


def test_few_modules_are_small() -> None:
    counts = _line_counts()
    small = sorted(name for name, lines in counts.items() if lines < SMALL_LINES)
    assert len(small) < SMALL_SHARE * len(counts), small


def test_no_module_is_large() -> None:
    assert [(name, lines) for name, lines in _line_counts().items() if lines > LARGEST_LINES] == []


def _documents_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "Args:" in (ast.get_docstring(function) or "")


@pytest.mark.parametrize("package", [*sorted(MAY_IMPORT), "commands"])
def test_functions_of_many_parameters_document_them(package: str) -> None:
    missing = [
        f"{name}({len(source_tree.parameters(function))} parameters)"
        for module in package_files()
        if _inner(module).split(".")[0] == package
        for name, function in public_functions(module)
        if len(source_tree.parameters(function)) >= MANY_PARAMETERS
        and not _documents_arguments(function)
        and not _is_override(function)
    ]
    assert missing == []


def _is_override(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("override" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_every_exported_name_documents_its_arguments() -> None:
    vitrim = importlib.import_module("vitrim")
    missing = []
    for name in vitrim.__all__:
        value = getattr(vitrim, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        text = inspect.getdoc(value) or ""
        if "Args:" not in text and "Attributes:" not in text:
            missing.append(name)
    assert missing == []


def _untechnical_words(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for line, word in source_tree.words(path)
        if word in UNTECHNICAL_WORDS
    ]


def test_the_language_is_technical() -> None:
    found = [
        place
        for path in source_tree.all_python_files()
        if path != Path(__file__).resolve()
        for place in _untechnical_words(path)
    ]
    assert len(found) < FEW, "\n".join(found)
