"""Structured pruning of Vision Transformers, with measured latency on the target device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported at first use, so that measuring on a device needs no torch.
_MODULES = {
    "StructuredMask": ".compress.masks.mask",
    "masked": ".compress.masks.masked",
    "compact": ".compress.surgery.compactor",
    "resized": ".compress.surgery.image_size",
    "lift": ".compress.lift",
    "save": ".compress.lift",
    "load": ".compress.network.files",
    "export": ".export.exporter",
    "measure": ".bench.local.measure",
    "InputError": ".core.errors",
    "UnsupportedModel": ".core.errors",
}
__all__ = [
    "InputError",
    "StructuredMask",
    "UnsupportedModel",
    "compact",
    "export",
    "lift",
    "load",
    "masked",
    "measure",
    "resized",
    "save",
]

if TYPE_CHECKING:
    from .bench.local.measure import measure
    from .compress.lift import lift, save
    from .compress.masks.mask import StructuredMask
    from .compress.masks.masked import masked
    from .compress.network.files import load
    from .compress.surgery.compactor import compact
    from .compress.surgery.image_size import resized
    from .core.errors import InputError, UnsupportedModel
    from .export.exporter import export


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        # Set after the import: importing a submodule of the same name (vitrim.export) sets the
        # attribute to that module.
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vitrim' has no attribute {name!r}")
