"""The package's source files: module names, imports and docstrings, read without running them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folders at the root that are no part of the package.
OUTSIDE = {"tests", "benchmarks", "build", "dist", "runs", "recipes", "docs", "shared", "site"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _inside(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return not any(part.startswith(".") or part.endswith(".egg-info") for part in parts)


@cache
def package_files() -> dict[str, Path]:
    """Module name -> file, for every Python file of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in OUTSIDE or not _inside(path):
            continue
        found[".".join(("vitrim", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def all_python_files() -> list[Path]:
    """Every Python file of the repository: the package, its tests and its benchmarks."""
    folders = [ROOT / name for name in ("tests", "benchmarks", "docs")]
    others = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [*package_files().values(), *others]


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports anywhere, inside functions too.

    Imports for type checkers do not count: they never run.
    """
    files = package_files()
    path = files[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _running_nodes(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from . import part` needs the part: the package around it is being imported already.
            parts = {f"{target}.{alias.name}" for alias in node.names} & set(files)
            found.update(parts if len(parts) == len(node.names) else {*parts, target})
    return (found & set(files)) - {module}


def _running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _running_nodes(other)
            continue
        yield child
        yield from _running_nodes(child)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each set of modules that import each other, as the names along it."""
    reached = {module: _reachable(graph, module) for module in graph}
    found, seen = [], set[str]()
    for module in sorted(graph):
        if module in seen or module not in reached[module]:
            continue
        members = {other for other in reached[module] if module in reached[other]}
        seen |= members
        found.append(_way_back(graph, module))
    return found


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set[str](), list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(graph[module])
    return found


def _way_back(graph: dict[str, set[str]], start: str) -> list[str]:
    """The shortest path from a module to itself."""
    paths = [[start]]
    while paths:
        path = paths.pop(0)
        for module in sorted(graph[path[-1]]):
            if module == start:
                return [*path, start]
            if module not in path:
                paths.append([*path, module])
    raise AssertionError(f"{start} is on no circle")


def public_functions(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every public function and method of a module, with its qualified name."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS) and not child.name.startswith("_"):
                yield f"{name}.{child.name}", child
            elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from visit(child, f"{name}.{child.name}")

    for name, function in visit(tree(package_files()[module]), module):
        assert isinstance(function, FUNCTIONS)
        yield name, function


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The named parameters, without `self` and `cls`."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, word in lower case) of a file; identifiers are split at underscores and capitals."""
    with io.StringIO(path.read_text(encoding="utf-8")) as text:
        for token in tokenize.generate_tokens(text.readline):
            for number, line in enumerate(token.string.split("\n"), token.start[0]):
                for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", line):
                    yield number, word.lower()
