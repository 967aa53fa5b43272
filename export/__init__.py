"""Export of a compact model to artifacts for edge runtimes, each verified against the model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported on first use: reading an artifact needs neither torch nor onnx.
_MODULES = {
    "Artifact": ".artifact",
    "Manifest": ".manifest",
    "verify": ".artifact",
    "verify_folder": ".artifact",
    "open_session": ".sessions",
    "export": ".exporter",
    "export_graph": ".graphs.imported_graph",
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
    from .artifact import Artifact, verify, verify_folder
    from .exporter import export
    from .graphs.imported_graph import export_graph
    from .manifest import Manifest
    from .parity import ParityError
    from .sessions import open_session


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vitrim.export' has no attribute {name!r}")
