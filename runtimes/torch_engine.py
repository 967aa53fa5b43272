"""PyTorch itself, as a row to compare with: `model.safetensors` with `architecture.json` beside it,
eager or through torch.compile.

The one engine that needs vitrim: a saved model is data, and only vitrim knows the module that it
belongs to.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing, one_line

REQUIREMENT = Requirement("torch", "vitrim")


class TorchEngine(Engine):
    """A module in eval mode. The session's `compile` is 0 or 1.

    With job["device"] "cuda" it runs on a GPU: copies (true: they are timed) and cuda_graph (a
    recorded graph is replayed) as for onnxruntime.
    """

    runtime = "torch"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import torch

            # Before the floor is read, since a program with torch in it has these too.
            self.files = importlib.import_module("vitrim.compress.network.files")
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
        # Weights that cannot change may be packed and folded; without this torch.compile takes them
        # as inputs.
        self.device = str(self.job.get("device") or "cpu")
        if self.device != "cpu":
            if not self.torch.cuda.is_available():
                raise EngineError(
                    f"this torch {self.version} reaches no GPU; install a CUDA build on a machine with one, or measure on the processor"
                )
            model = model.to(self.device)
            self.provider, self.copies_timed = (
                self.torch.cuda.get_device_name(),
                bool(self.job.get("copies", True)),
            )
        self.model = self.torch.compile(model, options={"freezing": True}) if compiled else model

    def infer(self, images: Any) -> Any:
        # Freezing wants no_grad, and refuses tensors of inference_mode. Fetching the answer waits
        # for a GPU.
        with self.torch.no_grad():
            return self.model(self.torch.from_numpy(images).to(self.device)).cpu().numpy()

    def timed_call(self, images: Any) -> Callable[[], Any]:
        if self.device == "cpu":
            return super().timed_call(images)
        torch, host = self.torch, self.torch.from_numpy(images)
        there = host.to(self.device)
        work = self._recorded(there) if self.job.get("cuda_graph") else self._launched(there)

        def alone() -> None:
            work()
            torch.cuda.synchronize()

        def with_copies() -> Any:
            there.copy_(host)
            return work().cpu()

        return with_copies if self.copies_timed else alone

    def _launched(self, there: Any) -> Callable[[], Any]:
        def work() -> Any:
            with self.torch.no_grad():
                return self.model(there)

        return work

    def _recorded(self, there: Any) -> Callable[[], Any]:
        torch = self.torch
        # What is allocated once (workspaces, autotuning) must not be recorded, so a few calls go
        # before, on a stream of their own as torch asks.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), torch.no_grad():
            for _ in range(3):
                self.model(there)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            answer = self.model(there)

        def work() -> Any:
            graph.replay()
            return answer

        return work

    def device_memory_peak_bytes(self) -> int | None:
        return None if self.device == "cpu" else int(self.torch.cuda.max_memory_reserved())


ENGINE = TorchEngine
