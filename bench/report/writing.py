"""Writing the report files: report.md and report.html, and report.json of measurements alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_file, require_output_file, require_separate
from ...core.written_kinds import FileKind, has_schema, json_kind, json_object
from .html import render_html
from .markdown import WRITTEN_BY_VITRIM, render_markdown
from .model import SCHEMA
from .overview import overview
from .run import Run, load_run, load_sources

NAMES = ("report.json", "report.md", "report.html")
GENERATOR = 'name="generator" content="vitrim"'
# Written by `vitrim run` beside its report.
RUN_FILES = ("steps.json", "kept.json", "history.jsonl")


def _is_page(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    beside = json_object(path.with_name(NAMES[0]))
    return GENERATOR in text or WRITTEN_BY_VITRIM in text or has_schema(beside, SCHEMA)


def _is_picture(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    return text.startswith("<svg") and 'class="plot"' in text and "--ink:" in text


REPORT = json_kind("a report", SCHEMA)
PAGE = FileKind("a report", _is_page)
PICTURE = FileKind("a picture of a report", _is_picture)


def render(run_folder: Path | str) -> list[Path]:
    """Write report.md and report.html into a run folder.

    Args:
        run_folder: A folder that `vitrim run` wrote.

    Returns:
        The paths of the two files.

    Raises:
        InputError: A file of the run is damaged; nothing is written then.
    """
    return _write(load_run(run_folder), Path(run_folder))


def render_measurements(sources: Iterable[Path | str], out: Path | str) -> list[Path]:
    """Write report.json, report.md and report.html from measurements, of any devices.

    Args:
        sources: Measurement files, folders of them, and run folders.
        out: Folder for the report.

    Returns:
        The paths of the three files.

    Raises:
        InputError: A file is damaged, `out` overlaps a source, or it contains a run or a report
            that vitrim did not write; nothing is written then.
    """
    sources, out = [Path(source) for source in sources], Path(out)
    for source in sources:
        require_separate(out, {"the source": source})
    if any((out / name).is_file() for name in RUN_FILES):
        raise InputError(
            f"{out}: contains a run, and its report would be lost; name another folder"
        )
    path = out / NAMES[0]
    require_output_file(path, REPORT, overwrite=True)
    run = load_sources(sources)
    written = _write(run, out)
    replace_file(path, json.dumps(run.report.to_dict(), indent=1) + "\n", REPORT)
    return [path, *written]


def _write(run: Run, folder: Path) -> list[Path]:
    # Both are rendered before the first is written, so that an error keeps the old files.
    view = overview(run)
    _, *names = NAMES
    paths = [folder / name for name in names]
    for path in paths:
        require_output_file(path, PAGE, overwrite=True)
    pages = (render_markdown(run, view), render_html(run, view))
    for path, content in zip(paths, pages, strict=True):
        replace_file(path, content, PAGE)
    return paths
