"""Markdown from plain values: tables, and docstrings in the Google style."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SECTIONS = (
    "Args",
    "Attributes",
    "Returns",
    "Yields",
    "Raises",
    "References",
    "Example",
    "Examples",
    "Note",
    "Notes",
)
# Sections whose entries are `name: text`.
ENTRIES = ("Args", "Attributes", "Raises")
TITLES = {"Args": "Arguments"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    lines = [_row(header), f"|{'---|' * len(header)}", *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    # Cells before the escape: one line each.
    return (
        "".join(f"| {' '.join(cell.split()).replace('|', chr(92) + '|')} " for cell in cells) + "|"
    )


@dataclass
class Docstring:
    """A parsed docstring: its prose, and the indented text of each section by name."""

    text: str
    sections: dict[str, str] = field(default_factory=dict)


def parse_docstring(raw: str | None) -> Docstring:
    """Split a Google-style docstring into its prose and its sections."""
    name, parts = "", {"": list[str]()}
    for line in inspect.cleandoc(raw or "").splitlines():
        match = re.fullmatch(r"(\w+):", line)
        if match and match[1] in SECTIONS:
            name = match[1]
            parts[name] = []
        elif name and line and not line[0].isspace():
            # An unindented line ends a section.
            name = ""
            parts[""] += ["", line]
        else:
            parts[name].append(line)
    texts = {name: inspect.cleandoc("\n".join(["", *lines])) for name, lines in parts.items()}
    return Docstring(reflow(texts.pop("")), texts)


def reflow(text: str) -> str:
    """Join the lines of each paragraph; indented paragraphs become code blocks."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            parts.append("```\n" + inspect.cleandoc("\n" + paragraph) + "\n```")
        elif any(re.match(r"\s*(-|\d+\.) ", line) for line in lines):
            parts.append("\n".join(lines))
        else:
            parts.append(" ".join(paragraph.split()))
    return "\n\n".join(part for part in parts if part)


def entries(text: str) -> list[tuple[str, str]]:
    """(name, text) of each `name: text` entry of a section; continuation lines are indented."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = re.match(r"(\*{0,2}[\w., /*`]+?)(?: \([^)]*\))?:(?:\s+|$)(.*)", line)
        if match and not line[0].isspace():
            found.append((match[1].strip("`"), [match[2]]))
        elif found:
            found[-1][1].append(line)
    return [(name, " ".join(" ".join(lines).split())) for name, lines in found]


def sections_text(document: Docstring, types: Mapping[str, str]) -> str:
    """The sections of a docstring as Markdown; `types` are the annotations of the arguments."""
    parts = []
    for name, text in document.sections.items():
        title = f"**{TITLES.get(name, name)}**"
        if name in ENTRIES:
            lines = []
            for entry, meaning in entries(text):
                kind = types.get(entry.lstrip("*"), "") if name != "Raises" else ""
                lines.append(f"- `{entry}`{f' (`{kind}`)' if kind else ''}: {meaning}")
            parts.append(f"{title}\n\n" + "\n".join(lines))
        elif name in ("Example", "Examples"):
            parts.append(f"{title}\n\n```python\n{text}\n```")
        else:
            parts.append(f"{title}\n\n{reflow(text)}")
    return "\n\n".join(parts)
