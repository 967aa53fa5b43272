"""Turning a compact model into artifacts that edge runtimes run, each proven equal."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use: reading an artifact needs neither torch nor onnx.
_HOMES = {
    "Artifact": ".artifact",
    "Manifest": ".artifact",
    "verify": ".artifact",
    "verify_folder": ".artifact",
    "open_session": ".sessions",
    "export": ".exporter",
    "export_graph": ".graphs.given_graph",
    "ParityError": ".parity",
}
__all__ = [
    "Artifact",
    "Manifest",
    "ParityError",
    "export",
    "export_graph",
    "open_session",
    "verify",
    "verify_folder",
]

if TYPE_CHECKING:
    from .artifact import Artifact, Manifest, verify, verify_folder
    from .exporter import export
    from .graphs.given_graph import export_graph
    from .parity import ParityError
    from .sessions import open_session


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vitrim.export' has no attribute {name!r}")
