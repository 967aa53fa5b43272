"""latex/ of a study: a two-column article and its figures; its PDF where a TeX is installed."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...core.console import status
from ...core.errors import InputError
from ...core.storage import replace_file
from ...core.written_kinds import FileKind
from ..recipe import Recipe
from .article_runs import runs_table
from .article_text import MAIN, Figure, cost_figures, figures, numbers, table
from .bibliography import bibliography
from .grids import Grid, grids
from .pictures import Cost, costs, quality_title, series
from .summary import Summary, number, pareto

FOLDER, GENERATED, MAIN_FILE = "latex", "generated", "main.tex"
TABLES = ("findings", "means", "fronts", "beside", "failures", "stopped")
COLUMN_INCHES = 3.25
COMPILE_LIMIT_S = 120.0
# Okabe and Ito 2008, "Color Universal Design".
COLOURS = ("#0b6fb8", "#d0570a", "#0b8466", "#a8447f", "#8a6d00", "#7b8190")
MARKERS = ("D", "s", "^", "o", "v", "P")


def _is_ours(path: Path) -> bool:
    return path.parent.name == GENERATED and path.parent.parent.name == FOLDER


PART = FileKind("a part of a study's article", _is_ours)


def write_article(
    summary: Summary, folder: Path, machine: str | None, more: Mapping[Figure, bytes]
) -> list[str]:
    """Write latex/ of a study, and compile it where pdflatex is installed.

    Args:
        summary: The study.
        folder: The study folder.
        machine: Where latencies were measured.
        more: Figures beside those of accuracy and cost, with their PDF.

    Returns:
        The paths of main.tex, and of main.pdf or a line with the reason why there is none.

    Raises:
        InputError: No run is finished, or a file cannot be written.
    """
    if not summary.done:
        raise InputError(
            f"{folder}: no run is finished, so there is nothing to write an article of"
        )
    place, base = folder / FOLDER, _base_recipe(summary)
    by_id = {grid.id: grid for grid in grids(summary)}
    drawn = {
        figure: pdf(partial(_draw, summary=summary, cost=cost), 0.72)
        for figure, cost in zip(cost_figures(summary), costs(summary), strict=True)
    }
    drawn |= more
    texts = {
        "numbers.tex": numbers(summary, base, machine, list(drawn)),
        "figures.tex": figures(list(drawn)),
        "runs.tex": runs_table(summary),
        **{f"{name}.tex": _table(by_id.get(name), name) for name in TABLES},
    }
    cited = "".join((MAIN, *texts.values()))
    parts: dict[str, str | bytes] = {
        **texts,
        "references.bib": bibliography(cited, summary.facts.get("bibtex", "")),
        **{f"{figure.file}.pdf": content for figure, content in drawn.items()},
    }
    for name, content in parts.items():
        replace_file(place / GENERATED / name, content, PART)
    main = place / MAIN_FILE
    if not main.exists():
        replace_file(main, MAIN)
    return [str(main), compiled(place)]


def _base_recipe(summary: Summary) -> Recipe | None:
    """The recipe of the first run; None if it is damaged."""
    with contextlib.suppress(ValueError):
        return Recipe.model_validate(tomllib.loads(summary.facts.get("base", "")))
    return None


def _table(grid: Grid | None, name: str) -> str:
    return (
        "% Written by vitrim: this study has no such table.\n"
        if grid is None
        else table(grid, name)
    )


def pdf(draw: Callable[[Any], None], aspect: float) -> bytes:
    """A figure of one column's width as a PDF.

    Args:
        draw: Draws on matplotlib's axes.
        aspect: Height over width.

    Returns:
        The bytes of the file; equal for equal drawings.
    """
    import matplotlib
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure as Sheet

    with matplotlib.rc_context({"pdf.fonttype": 42, "font.size": 8, "font.family": "serif"}):
        sheet = Sheet(figsize=(COLUMN_INCHES, aspect * COLUMN_INCHES), layout="constrained")
        FigureCanvasPdf(sheet)
        draw(sheet.add_subplot())
        file = io.BytesIO()
        sheet.savefig(file, format="pdf", metadata={"CreationDate": None})
    return file.getvalue()


def _draw(axes: Any, summary: Summary, cost: Cost) -> None:
    """Accuracy against a cost."""
    for seed in summary.fronts[cost.column]:
        rows = [row for row in summary.done if row["seed"] == seed]
        front = pareto(rows, cost.column, summary.quality)
        values = [number(row[cost.column]) / cost.unit for row in front]
        heights = [100 * number(row[summary.quality]) for row in front]
        axes.step(values, heights, where="post", color="0.6", linewidth=0.7, linestyle="--")
    for place, each in enumerate(series(summary, cost.axis)):
        rows = [row for row in each.rows if row[cost.column] is not None]
        rows = [row for row in rows if row[summary.quality] is not None]
        axes.plot(
            [number(row[cost.column]) / cost.unit for row in rows],
            [100 * number(row[summary.quality]) for row in rows],
            linestyle="none",
            marker=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            markersize=3.5,
            label=each.name.replace("$", r"\$"),
        )
    axes.set_xlim(left=0.0)
    axes.set_xlabel(cost.title)
    axes.set_ylabel(f"{quality_title(summary)}, %")
    axes.grid(color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if cost.axis is not None:
        axes.legend(title=cost.axis, fontsize=6, title_fontsize=6, frameon=False)


def compiled(place: Path) -> str:
    """Compile main.tex; the path of its PDF, or a line with the reason why there is none."""
    main = place / MAIN_FILE
    if shutil.which("pdflatex") is None or shutil.which("bibtex") is None:
        return (
            f"{main}: no PDF, since pdflatex and bibtex are not installed (Debian: "
            "texlive-latex-recommended); on another machine: pdflatex main && bibtex main && "
            "pdflatex main && pdflatex main"
        )
    status("compiling main.tex")
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main"]
    for command in (latex, ["bibtex", "main"], latex, latex):
        try:
            done = subprocess.run(
                command,
                cwd=place,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=COMPILE_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{main}: no PDF, since {command[0]} took over {COMPILE_LIMIT_S:.0f} s"
        if done.returncode:
            lines = done.stdout.decode("utf-8", "replace").splitlines()
            first = next((line for line in lines if line.startswith("!")), "see main.log")
            return f"{main}: no PDF, since {command[0]} failed: {first}"
    return str(main.with_suffix(".pdf"))
