"""Structured pruning of Vision Transformers, with measured latency on the target device."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported at first use, so that measuring on a device needs no torch.
_MODULES = {
    "StructuredMask": ".compress.masks.mask",
    "WeightMask": ".compress.masks.weight_mask",
    "masked": ".compress.masks.masked",
    "compact": ".compress.surgery.compactor",
    "resized": ".compress.surgery.image_size",
    "rotate": ".compress.oneshot.rotation",
    "compensate": ".compress.oneshot.compensation",
    "trim": ".compress.oneshot.trim",
    "TrimOptions": ".compress.oneshot.prediction",
    "choose_tokens": ".compress.tokens.choose",
    "bucketed": ".compress.tokens.buckets",
    "Buckets": ".compress.tokens.bucket_rules",
    "BucketedModel": ".compress.tokens.buckets",
    "load_bucketed": ".compress.tokens.buckets",
    "chosen_tokens": ".compress.tokens.select",
    "select_tokens": ".compress.tokens.select",
    "merged_tokens": ".compress.tokens.merging.merged",
    "MergingOptions": ".compress.tokens.merging.merged",
    "solve": ".compress.latency.solve",
    "SolveOptions": ".compress.latency.solution",
    "CostTable": ".targets.cost_table",
    "slim_patches": ".compress.tokens.patch_slimming",
    "SlimmingOptions": ".compress.tokens.patch_slimming",
    "lift": ".compress.lift",
    "save": ".compress.lift",
    "load": ".compress.network.files",
    "export": ".export.exporter",
    "measure": ".bench.local.measure",
    "InputError": ".core.errors",
    "UnsupportedModel": ".core.errors",
}
__all__ = [
    "BucketedModel",
    "Buckets",
    "CostTable",
    "InputError",
    "MergingOptions",
    "SlimmingOptions",
    "SolveOptions",
    "StructuredMask",
    "TrimOptions",
    "UnsupportedModel",
    "WeightMask",
    "bucketed",
    "choose_tokens",
    "chosen_tokens",
    "compact",
    "compensate",
    "export",
    "lift",
    "load",
    "load_bucketed",
    "masked",
    "measure",
    "merged_tokens",
    "resized",
    "rotate",
    "save",
    "select_tokens",
    "slim_patches",
    "solve",
    "trim",
]

if TYPE_CHECKING:
    from .bench.local.measure import measure
    from .compress.latency.solution import SolveOptions
    from .compress.latency.solve import solve
    from .compress.lift import lift, save
    from .compress.masks.mask import StructuredMask
    from .compress.masks.masked import masked
    from .compress.masks.weight_mask import WeightMask
    from .compress.network.files import load
    from .compress.oneshot.compensation import compensate
    from .compress.oneshot.prediction import TrimOptions
    from .compress.oneshot.rotation import rotate
    from .compress.oneshot.trim import trim
    from .compress.surgery.compactor import compact
    from .compress.surgery.image_size import resized
    from .compress.tokens.bucket_rules import Buckets
    from .compress.tokens.buckets import BucketedModel, bucketed, load_bucketed
    from .compress.tokens.choose import choose_tokens
    from .compress.tokens.merging.merged import MergingOptions, merged_tokens
    from .compress.tokens.patch_slimming import SlimmingOptions, slim_patches
    from .compress.tokens.select import chosen_tokens, select_tokens
    from .core.errors import InputError, UnsupportedModel
    from .export.exporter import export
    from .targets.cost_table import CostTable


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vitrim' has no attribute {name!r}")
    package = sys.modules.get(f"{__name__}.{name}")
    try:
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    except ImportError as error:
        if package is None:
            raise
        # `import vitrim.export.artifact as artifact` then finds the package by itself, so that a
        # device without torch can use it.
        raise AttributeError(f"vitrim.{name}: {error}") from error
    package = sys.modules.get(f"{__name__}.{name}")
    if package is not None:
        for exported in vars(package).get("__all__", ()):
            getattr(package, exported)
        # The function has the attributes of the package with its name, also of modules that are
        # imported later: `vitrim.export.artifact`, `vitrim.export.Artifact`.
        value.__dict__ = vars(package)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The class of this module, in which no submodule takes the place of a public name.

    Importing `vitrim.export` would bind that name to the package, in place of the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
