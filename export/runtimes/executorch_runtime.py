"""ExecuTorch: `model.pte`. int8 has weights in eight bits, a scale a channel, and inputs quantized as they come."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..artifact import Precision
from ..forms import Form
from .conversion import convert_apart, lacking_here_or_there
from .runtime import Source, Written

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


class ExecuTorch:
    """Converts the torch module in a process of its own, in this Python or in the one that VITRIM_PYTHON_EXECUTORCH names."""

    name = "executorch"
    extra = "executorch"
    precisions: tuple[str, ...] = PRECISIONS
    form: Form | None = None

    def missing(self) -> str | None:
        return lacking_here_or_there(self.name, self.extra, "executorch")

    def write(self, source: Source, folder: Path) -> Written:
        if source.batch == "dynamic":
            raise InputError("runtime executorch: holds one batch size; export with batch 1 or another number")
        if source.options:
            raise InputError(f"runtime executorch: has no options, and {', '.join(sorted(source.options))} was given; leave it out")
        told = convert_apart(self.name, "convert_executorch.py", source, folder)
        return Written("model.pte", versions=told["versions"])


RUNTIME = ExecuTorch()
