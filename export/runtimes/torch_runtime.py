"""PyTorch itself: the saved model, which needs vitrim and torch where it runs. A row to compare
with, not something to ship.
"""

from __future__ import annotations

from pathlib import Path

from ...compress.network.files import ARCHITECTURE, WEIGHTS, save
from ...core.errors import InputError
from ..artifact import Precision
from ..forms import Form
from ..versions import tool_versions
from .runtime import Source, Written
from .saved_source import for_inference

PRECISIONS: tuple[Precision, ...] = ("fp32",)


class Torch:
    """Writes `model.safetensors` and `architecture.json`. option compile=1: run through
    torch.compile.
    """

    name = "torch"
    extra = "test"
    precisions: tuple[str, ...] = PRECISIONS
    dynamic_batch = True
    form: Form | None = None

    def missing(self) -> str | None:
        return None

    def write(self, source: Source, folder: Path) -> Written:
        unknown = set(source.options) - {"compile"}
        if unknown or source.options.get("compile", "0") not in ("0", "1"):
            raise InputError("runtime torch: its one option is compile, 0 or 1; leave others out")
        save(for_inference(source, self.name), folder / "saved")
        for name in (ARCHITECTURE, WEIGHTS):
            (folder / "saved" / name).rename(folder / name)
        (folder / "saved").rmdir()
        session = {"compile": source.options.get("compile", "0")}
        return Written(
            WEIGHTS, ((ARCHITECTURE, "weights"),), session=session, versions=tool_versions("torch")
        )


RUNTIME = Torch()
