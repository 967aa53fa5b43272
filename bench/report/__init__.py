"""The report of a run: a table, pictures and the truth about how they were measured, as Markdown
and one self-contained HTML page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Report": ".model",
    "Run": ".run",
    "load_run": ".run",
    "render": ".writing",
    "render_measurements": ".writing",
    "write_picture": ".picture",
}
__all__ = ["Report", "Run", "load_run", "render", "render_measurements", "write_picture"]

if TYPE_CHECKING:
    from .model import Report
    from .picture import write_picture
    from .run import Run, load_run
    from .writing import render, render_measurements


# No function here shares its name with a module: importing the module would put it in the
# function's place. Lazy, so that `python -m vitrim.bench.report.picture` does not find its own
# module imported already.
def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
