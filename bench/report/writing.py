"""Writing the report files: report.md and report.html, and report.json of measurements alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_file
from .html import render_html
from .markdown import render_markdown
from .overview import overview
from .run import Run, load_run, load_sources


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
        InputError: A file is damaged, or `out` is a file; nothing is written then.
    """
    run = load_sources(sources)
    out = Path(out)
    if out.is_file():
        raise InputError(f"{out}: a file is in the way of the report's folder; name another folder")
    path = out / "report.json"
    written = _write(run, out)
    replace_file(path, json.dumps(run.report.to_dict(), indent=1) + "\n")
    return [path, *written]


def _write(run: Run, folder: Path) -> list[Path]:
    # Both are rendered before the first is written, so that an error keeps the old files.
    view = overview(run)
    pages = {"report.md": render_markdown(run, view), "report.html": render_html(run, view)}
    for name, content in pages.items():
        replace_file(folder / name, content)
    return [folder / name for name in pages]
