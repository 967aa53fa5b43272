"""Write the generated reference pages: `python -m docs.generate`, or `--check` to find stale ones.

`cli.md` and `api.md` are generated whole. In other pages the text between the two comments

    <!-- generated: NAME -->
    <!-- end of generated -->

is replaced: NAME is `recipe keys`, `runtime limits`, `shipped cost tables`, or the path of a result
file under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from vitrim.export.runtimes import runtime_named, runtime_names
from vitrim.export.runtimes.runtime import limits_of
from vitrim.pipeline.recipe import Recipe
from vitrim.pipeline.recipe_keys import key_reference
from vitrim.targets.cost_table import CostTable
from vitrim.targets.shipped_tables import FOLDER

from .api_page import api_page
from .cli_page import cli_page
from .markdown import table
from .result_tables import result_table

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PART = re.compile(
    r"(?P<begin><!-- generated: (?P<name>[^\n]+) -->\n).*?(?P<end><!-- end of generated -->)",
    re.DOTALL,
)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with generated text: its path, and what it should contain."""
    yield DOCS / "cli.md", cli_page()
    yield DOCS / "api.md", api_page()
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if PART.search(text):
            yield path, PART.sub(_filled, text)


def _filled(match: re.Match[str]) -> str:
    name = match["name"]
    written = {
        "recipe keys": recipe_keys,
        "runtime limits": runtime_limits,
        "shipped cost tables": shipped_tables,
    }.get(name)
    text = result_table(ROOT / name) if written is None else written()
    return f"{match['begin']}\n{text.strip()}\n\n{match['end']}"


def recipe_keys() -> str:
    """One table for each table of a recipe: key, default, meaning."""
    parts = []
    for section in key_reference(Recipe):
        cells = [(f"`{key.name}`", f"`{key.default}`", key.meaning) for key in section.keys]
        title = f"### `[{section.name}]`" if section.name else "### Top level"
        meaning = [" ".join(section.meaning.split())] if section.name else []
        parts += [title, *meaning, table(("key", "default", "meaning"), cells)]
    return "\n\n".join(parts)


def runtime_limits() -> str:
    """One table: what each runtime cannot do, from the limits that an export checks."""
    cells = [
        (f"`{name}`", limit.what, limit.instead)
        for name in runtime_names()
        for limit in limits_of(runtime_named(name))
    ]
    return table(("runtime", "cannot do", "instead"), cells)


def shipped_tables() -> str:
    """One table: the cost tables of the package, and how well they predict."""
    cells = []
    for path in sorted(FOLDER.glob("*.json")):
        costs = CostTable.load(path)
        sizes = [point.network for point in costs.points]
        largest = f"{max(each.tokens for each in sizes)} x {max(each.embed for each in sizes)}"
        what = (costs.target, costs.runtime, costs.precision, str(costs.threads), largest)
        errors = [
            f"{100 * found.median:.1f} %, {100 * found.p95:.1f} % ({found.count})"
            for found in (costs.held_out, costs.whole)
            if found is not None
        ]
        excess = "" if costs.excess is None else f"{100 * costs.excess:.1f} %"
        cells.append((*what, costs.environment["cpu_model"], *errors, excess))
    header = (
        "target", "runtime", "precision", "threads", "tokens x channels, at most", "measured on",
        "held out: median, 95th percentile (networks)", "whole networks",
        "excess of the solver's",
    )  # fmt: skip
    return table(header, cells)


def main() -> int:
    """Write the pages, or with `--check` list those that differ; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, list stale pages")
    check = parser.parse_args().check
    stale = [
        (path, text)
        for path, text in pages()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is stale; write it again with `make docs-reference`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"written: {name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
