"""PyTorch itself, as a row to compare with: `model.safetensors` with `architecture.json` beside it, eager or through torch.compile.

The one engine that needs vitrim: a saved model is data, and only vitrim knows the module that it belongs to.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing, one_line

REQUIREMENT = Requirement("torch", "vitrim")


class TorchEngine(Engine):
    """A module in eval mode. The session's `compile` is 0 or 1."""

    runtime = "torch"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import torch

            # Before the floor is read, since a program with torch in it has these too.
            self.files = importlib.import_module("vitrim.compress.files")
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        self.torch = torch
        self.version = str(torch.__version__).split("+")[0]
        torch.set_num_threads(int(job.get("threads", 1)))

    def load(self) -> None:
        folder = os.path.dirname(self.require_file())
        self.take_input()
        try:
            model = self.files.load(folder)
        except Exception as error:
            raise EngineError(one_line(error)) from None
        compiled = (self.job.get("session") or {}).get("compile") == "1"
        # Weights that cannot change may be packed and folded; without this torch.compile takes them as inputs.
        self.model = self.torch.compile(model, options={"freezing": True}) if compiled else model

    def infer(self, images: Any) -> Any:
        # Freezing wants no_grad, and refuses tensors of inference_mode.
        with self.torch.no_grad():
            return self.model(self.torch.from_numpy(images)).numpy()


ENGINE = TorchEngine
