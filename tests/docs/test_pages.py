"""README, CONTRIBUTING and docs/: what they print works, and what they name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def test_the_readme_has_at_most_900_words() -> None:
    assert len(text_of("README.md").split()) <= 900


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = code_blocks(text_of("README.md"), "python")
    # timm's smallest test network instead of a real one, measured shortly: the same calls.
    for text, quick in (("deit_tiny_patch16_224", "test_vit"), ("s=1)", "s=1, time_limit_s=0.2)")):
        assert text in code
        code = code.replace(text, quick)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "p50_s" in capsys.readouterr().out
    assert (tmp_path / "small-int8" / "manifest.json").is_file()


def test_the_python_of_the_page_on_backbones_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = code_blocks(text_of("docs/backbones.md"), "python")
    code = code.replace("vit_tiny_patch16_224", "test_vit")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "backbones.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "small-10-classes" / "architecture.json").is_file()


def test_the_converter_in_contributing_can_be_registered() -> None:
    (code,) = code_blocks(text_of("CONTRIBUTING.md"), "python")
    scope: dict[str, Any] = {
        "__name__": "vitrim.compress.lift.mylib_mlp",
        "__package__": "vitrim.compress.lift",
    }
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    assert callable(scope["mlp"])


def test_the_readme_lists_the_extras_of_the_package() -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    section = text_of("README.md").split("## Extras")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m\s+((?:benchmarks|docs)[\w.]*\w)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    targets = re.findall(r"^([\w\-]+):", text_of("Makefile"), flags=re.MULTILINE)
    for target in re.findall(r"(?:`|^)make\s+([a-z\-]+)", text, flags=re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_of_printed_commands_exist(page: Path) -> None:
    known = options_by_command()
    lines = re.findall(r"^ *(vitrim [^\n]*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)
        name = next((n for n in known if words[: len(n)] == list(n)), None)
        if name is None and words[1:2] == ["study"]:
            # The word run may be left out.
            name = ("vitrim", "study", "run")
        if name is None:
            # Prose that happens to begin with the program's name.
            assert not any(word.startswith("--") for word in words), line
            continue
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in known[name], line


@cache
def options_by_command() -> dict[tuple[str, ...], set[str]]:
    import typer
    from vitrim.cli import app

    found: dict[tuple[str, ...], set[str]] = {}

    def visit(group: Any, prefix: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                visit(command, (*prefix, name))
                continue
            options = {
                option
                for parameter in command.params
                for option in (*parameter.opts, *parameter.secondary_opts)
            }
            found[(*prefix, name)] = {*options, "--help"}

    visit(typer.main.get_command(app), ("vitrim",))
    return found


def test_no_file_cites_notes_that_are_not_in_the_repository() -> None:
    pattern = re.compile(r"\bMETHODS [A-E]\b|\b(?:TOKENS|METHODS|DESIGN)\.md\b")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if files.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in files.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".h", ".cpp", ".c") and path.is_file():
            text = path.read_text(encoding="utf-8")
            found += [f"{name}: {match[0]}" for match in pattern.finditer(text)]
    assert [line for line in found if not line.startswith("tests/docs/")] == []
