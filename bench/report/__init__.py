"""The report of a run, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
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


# Imported at first use, so that `python -m vitrim.bench.report.picture` does not import its own
# module twice. No function shares its name with a module, which would replace it.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
