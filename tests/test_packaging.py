"""The package as it is shipped: its list of folders, its imports, and what no tracked file may
hold.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGES = {"tests", "benchmarks", "build", "dist", "runs", "recipes"}
# What a device runs, where torch is not installed.
TORCH_FREE = [
    "vitrim.cli",
    "vitrim.bench.local.measure",
    "vitrim.bench.report.writing",
    "vitrim.targets.profile",
    "vitrim.targets.check",
    "vitrim.export.artifact",
]


def python_files() -> dict[str, Path]:
    """Module name -> file, for everything in the package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in NOT_PACKAGES or any(
            part.startswith(".") or part.endswith(".egg-info") for part in parts
        ):
            continue
        names = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(("vitrim", *names))] = path
    return found


def imports_at_the_top(module: str, path: Path, known: set[str]) -> set[str]:
    """Modules of ours that importing `module` imports; imports within functions and for type
    checkers do not count.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                base = package.split(".")
                base = base[: len(base) - node.level + 1] if node.level else []
                target = ".".join([*base, *(node.module.split(".") if node.module else [])])
                # `from . import part` needs the part; the package around it is being imported
                # already.
                inner = {f"{target}.{alias.name}" for alias in node.names} & known
                found.update(inner if len(inner) == len(node.names) else {*inner, target} & known)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names if alias.name in known)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit([*node.body, *node.orelse])
            elif isinstance(node, ast.Try | ast.With):
                visit(node.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    # A submodule's import runs its package first, but a package that is being imported already is
    # not waited for.
    return found - {module}


def test_the_list_of_packages_is_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {
        ".".join(("vitrim", *path.relative_to(ROOT).parent.parts))
        for path in python_files().values()
    }
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_package_has_an_init_file() -> None:
    assert [
        str(path.parent)
        for path in python_files().values()
        if not (path.parent / "__init__.py").is_file()
    ] == []


def test_the_recipes_and_data_are_packed() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["package-data"]
    patterns = [
        path
        for package, globs in packed.items()
        for glob in globs
        for path in _folder(package).glob(glob)
    ]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    code = {".py", ".md", ".txt", ".lock", ""}
    rooms = ("bench/", "commands/", "compress/", "export/", "recipes/", "targets/")
    needed = [
        ROOT / name for name in tracked if name.startswith(rooms) and Path(name).suffix not in code
    ]
    assert [
        str(path.relative_to(ROOT)) for path in needed if path.exists() and path not in patterns
    ] == []


def _folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def test_the_imports_form_no_circle() -> None:
    files = python_files()
    graph = {module: imports_at_the_top(module, path, set(files)) for module, path in files.items()}
    state: dict[str, int] = {}
    trail: list[str] = []

    def walk(module: str) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, (
            f"circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        )
        state[module] = 1
        trail.append(module)
        for other in sorted(graph[module]):
            walk(other)
        trail.pop()
        state[module] = 2

    for module in sorted(graph):
        walk(module)


@pytest.mark.parametrize(
    ("room", "may"),
    [
        ("targets", {"targets"}),
        ("compress", {"compress", "targets"}),
        ("export", {"export", "compress", "runtimes", "targets"}),
        ("bench", {"bench", "export.artifact", "runtimes", "targets"}),
        ("runtimes", {"runtimes"}),
    ],
)
def test_each_room_imports_only_what_it_may(room: str, may: set[str]) -> None:
    files = python_files()
    rooms = {"targets", "compress", "export", "bench", "runtimes", "commands"}
    wrong = []
    for module, path in files.items():
        if module.split(".")[1:2] != [room]:
            continue
        for other in imports_at_the_top(module, path, set(files)):
            inner = other.removeprefix("vitrim.")
            # The package of an allowed module comes with it.
            fine = any(
                inner == allowed
                or inner.startswith(f"{allowed}.")
                or allowed.startswith(f"{inner}.")
                for allowed in may
            )
            if inner.split(".")[0] in rooms and not fine:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_device_needs_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = "import sys, vitrim.cli; print([name for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'matplotlib', 'datasets') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert done.stdout.strip() == "[]"


# A person's or a machine's folders, and the hosts that packages come from: the first tells about
# the author, the second goes stale.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(?:home|Users|work|mnt)/\w|/tmp/\w|C:\\Users|--(?:extra-)?index-url|--find-links|"
    r"\b(?:py[p]i\.org|files\.python[h]osted\.org|download\.py[t]orch\.org|deb\.[d]ebian\.org|archive\.[u]buntu\.com|ghcr\.[i]o|docker\.[i]o)\b"
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
    own = [re.fullmatch(r"vitrim\[([\w,]+)\]", item) for item in items]
    items = [item for item in items if not item.startswith("vitrim[")]
    items += [
        item for match in own if match for name in match[1].split(",") for item in extras[name]
    ]
    wanted = {re.split(r"[<>=\[;~! ]", item)[0] for item in items}
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9\-]+==[\w.]+", line) for line in lines)
    assert {line.split("==")[0] for line in lines} >= wanted
