"""Writes report.md and report.html from a run folder, or from measurements alone; each file is
whole or absent.
"""

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
    """Write report.md and report.html into a run folder (the layout of `vitrim run`); returns their
    paths.

    Errors: InputError naming the file and the key of a malformed input; nothing is written then.
    """
    return _write(load_run(run_folder), Path(run_folder))


def render_measurements(sources: Iterable[Path | str], out: Path | str) -> list[Path]:
    """Write report.json, report.md and report.html to the folder `out` from measurement files,
    folders of them and run folders, of any devices.
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
    # Both are made before the first is written, so that a failure leaves the old pair.
    view = overview(run)
    pages = {"report.md": render_markdown(run, view), "report.html": render_html(run, view)}
    for name, content in pages.items():
        replace_file(folder / name, content)
    return [folder / name for name in pages]
