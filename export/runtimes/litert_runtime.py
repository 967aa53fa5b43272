"""LiteRt: `model.tflite`. int8 has weights in eight bits, a scale a channel, and inputs quantized as they come."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..artifact import Precision
from ..forms import Form
from .conversion import convert_apart, lacking_here_or_there
from .runtime import Source, Written

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


class LiteRt:
    """Converts the torch module in a process of its own, in this Python or in the one that VITRIM_PYTHON_LITERT names."""

    name = "litert"
    extra = "litert"
    precisions: tuple[str, ...] = PRECISIONS
    form: Form | None = None

    def missing(self) -> str | None:
        return lacking_here_or_there(self.name, self.extra, "litert_torch")

    def write(self, source: Source, folder: Path) -> Written:
        if source.batch == "dynamic":
            raise InputError("runtime litert: holds one batch size; export with batch 1 or another number")
        if source.options:
            raise InputError(f"runtime litert: has no options, and {', '.join(sorted(source.options))} was given; leave it out")
        told = convert_apart(self.name, "convert_litert.py", source, folder)
        return Written("model.tflite", versions=told["versions"])


RUNTIME = LiteRt()
