"""The generated pages: up to date, complete, and independent of the terminal."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import vitrim
from vitrim.pipeline.recipe import Recipe
from vitrim.pipeline.recipe_keys import all_keys

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def markdown() -> ModuleType:
    return importlib.import_module("vitrim.docs.markdown")


def generate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "docs.generate", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_generated_pages_are_up_to_date_at_any_terminal_width_and_colour() -> None:
    done = generate("--check", COLUMNS="37", FORCE_COLOR="1", TERM="xterm-256color", LINES="10")
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_and_option_is_documented() -> None:
    import typer
    from vitrim.cli import app

    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    commands = list(_commands(typer.main.get_command(app), "vitrim"))
    assert len(commands) >= 14
    for name, command in commands:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:  # type: ignore[attr-defined]
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in section, (name, parameter.opts)


def _commands(group: object, prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        full = f"{prefix} {name}"
        found += _commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return found


def test_every_exported_name_is_documented_with_its_arguments() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in vitrim.__all__:
        assert f"\n### vitrim.{name}\n" in text
    export = text.split("\n### vitrim.export\n")[1].split("\n### ")[0]
    for argument in ("target", "precision", "images"):
        assert re.search(rf"^    {argument}: ", export, re.MULTILINE)


def test_every_recipe_key_is_documented() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for key, _ in all_keys(Recipe):
        assert f"`{key.rpartition('.')[2]}`" in text or f"`[{key}]`" in text, key


def test_a_docstring_becomes_paragraphs_and_lists(markdown: ModuleType) -> None:
    document = markdown.parse_docstring(
        """Cut a model
        to size.

        More text.

        Args:
            model: A model, on
                two lines.
            *names: Others | more.
        Returns:
            A smaller one.

        Raises:
            InputError: It does not fit.
        """
    )
    assert document.text == "Cut a model to size.\n\nMore text."
    text = markdown.sections_text(document, {"model": "nn.Module", "names": "str"})
    assert text.split("\n\n") == [
        "**Arguments**",
        "- `model` (`nn.Module`): A model, on two lines.\n- `*names` (`str`): Others | more.",
        "**Returns**",
        "A smaller one.",
        "**Raises**",
        "- `InputError`: It does not fit.",
    ]


def test_a_table_escapes_bars_and_joins_lines(markdown: ModuleType) -> None:
    assert markdown.table(("a", "b"), [("x|y", "two\n  lines")]) == (
        "| a | b |\n|---|---|\n| x\\|y | two lines |"
    )
