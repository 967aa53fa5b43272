"""PyTorch as a baseline: the saved model, eager or through torch.compile.

The engine imports vitrim and torch, so the artifact is for comparison, not for deployment.
"""

from __future__ import annotations

from pathlib import Path

from ...compress.network.files import ARCHITECTURE, WEIGHTS, save
from ...core.errors import InputError
from ..forms import Form
from ..manifest import Precision, tool_versions
from .limits import UNREAD_MODELS, Limit
from .runtime import RuntimeFiles, Source

PRECISIONS: tuple[Precision, ...] = ("fp32",)


class Torch:
    """Writes `model.safetensors` and `architecture.json`.

    Options: compile=1 runs the model through torch.compile.
    """

    name = "torch"
    extra = "test"
    precisions: tuple[str, ...] = PRECISIONS
    options: tuple[str, ...] = ("compile",)
    dynamic_batch = True
    form: Form | None = None
    limits: tuple[Limit, ...] = (UNREAD_MODELS,)

    def missing(self) -> str | None:
        """None: torch is a dependency of vitrim."""
        return None

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Save the model; see `Runtime.write`."""
        if source.options.get("compile", "0") not in ("0", "1"):
            raise InputError(f"option compile={source.options['compile']}: use 0 or 1")
        save(source.inference_model(self.name), folder / "saved")
        for name in (ARCHITECTURE, WEIGHTS):
            (folder / "saved" / name).rename(folder / name)
        (folder / "saved").rmdir()
        session = {"compile": source.options.get("compile", "0")}
        return RuntimeFiles(
            WEIGHTS, ((ARCHITECTURE, "weights"),), session=session, versions=tool_versions("torch")
        )


RUNTIME = Torch()
