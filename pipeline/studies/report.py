"""The report of a study: study.html, study.md, their pictures, and an article in LaTeX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...bench.report.markdown import WRITTEN_BY_VITRIM, safe
from ...bench.report.model import Report
from ...bench.report.writing import PAGE, PICTURE
from ...core.storage import replace_file, require_output_file
from .article_text import Figure
from .claims import TOKENS, TOLERANCE
from .grids import Entry, Grid, grids
from .magnitude_claims import SPARSITY as WEIGHT_SPARSITY
from .page import by_section, headline, lead, render_page
from .pictures import ACCURACY, Picture, cost_pictures
from .summary import Summary, summarise
from .table import RUNS, StudyTable
from .token_figures import FIGURES_FILE

PAGE_FILE, TEXT_FILE = "study.html", "study.md"


def write_report(folder: Path | str, *, latex: bool = False) -> list[str]:
    """Write the report of a study into its folder; the study may be running.

    Args:
        folder: The study folder.
        latex: Also write latex/, and its PDF where a TeX is installed.

    Returns:
        The paths of the written files, and with `latex` a line where there is no TeX.

    Raises:
        InputError: The folder contains no study, or a file of these names that vitrim did not
            write.
    """
    folder = Path(folder)
    summary = summarise(StudyTable(folder))
    machine = machine_of(summary, folder)
    pictures = cost_pictures(summary)
    drawn: dict[Figure, bytes] = {}
    if WEIGHT_SPARSITY in summary.axes:
        from .mask_pictures import masks_figure, shown_masks, shown_picture

        masks = shown_masks(summary, folder)
        if masks is not None:
            pictures.append(shown_picture(masks))
            drawn |= masks_figure(masks) if latex else {}
    if {TOKENS, TOLERANCE} & set(summary.axes) or (folder / FIGURES_FILE).is_file():
        from .token_pictures import token_charts

        charts = token_charts(summary, folder)
        pictures += [chart.picture for chart in charts]
        drawn |= dict(chart.figure for chart in charts) if latex else {}
    pages = {
        PAGE_FILE: render_page(summary, machine, pictures),
        TEXT_FILE: render_markdown(summary, machine, pictures),
    }
    for name in pages:
        require_output_file(folder / name, PAGE, overwrite=True)
    for picture in pictures:
        replace_file(folder / picture.file, picture.svg, PICTURE)
    for name, content in pages.items():
        replace_file(folder / name, content, PAGE)
    written = [str(folder / name) for name in pages]
    if latex:
        from .article import write_article

        written += write_article(summary, folder, machine, drawn)
    return written


def machine_of(summary: Summary, folder: Path) -> str | None:
    """The machine and the threads of the first measured run; None if none is."""
    for row in summary.done:
        path = folder / RUNS / str(row["id"]) / "report.json"
        try:
            report = Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        for model in report.models.values():
            for artifact in model.artifacts:
                measured = artifact.measurement
                if measured is not None:
                    where = measured.environment.cpu_model or measured.environment.architecture
                    threads = f"{measured.threads} thread{'s' * (measured.threads > 1)}"
                    return f"{where or 'an unnamed processor'}, {threads}, batch {measured.batch}"
    return None


def render_markdown(summary: Summary, machine: str | None, pictures: Sequence[Picture]) -> str:
    """study.md.

    Args:
        summary: The study.
        machine: Where latencies were measured.
        pictures: The pictures beside it.

    Returns:
        Markdown.
    """
    parts = [f"# {safe(summary.name)}", f"**{safe(headline(summary))}**"]
    parts += map(safe, lead(summary, machine))
    for title, _, shown in by_section(pictures):
        parts += [f"## {title}"] if title != ACCURACY else []
        for each in shown:
            parts += [f"![{safe(each.alt)}]({each.file})", f"*{safe(each.caption)}*"]
    for grid in grids(summary):
        parts += [f"## {grid.title}", grid.remark, _table(grid)]
    return "\n\n".join([*parts, WRITTEN_BY_VITRIM]) + "\n"


def _table(grid: Grid) -> str:
    sides = [":--" if place < grid.texts else "--:" for place in range(len(grid.heads))]
    lines = [
        f"| {' | '.join(map(safe, grid.heads))} |",
        f"|{'|'.join(sides)}|",
        *(f"| {' | '.join(map(_cell, line))} |" for line in grid.lines),
    ]
    return "\n".join(lines)


def _cell(entry: Entry) -> str:
    if entry.links:
        return " ".join(_link(text, run) for text, run in entry.links)
    return safe(entry.text) if entry.run is None else _link(entry.text, entry.run)


def _link(text: str, run: str) -> str:
    return f"[{safe(text)}](runs/{run}/report.html)" if text else ""
