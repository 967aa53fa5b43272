"""PyTorch as a baseline: `model.safetensors` with `architecture.json`, eager or torch.compile.

The one engine that needs vitrim, which builds the module from a saved architecture.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing, one_line

REQUIREMENT = Requirement("torch", "vitrim")


class TorchEngine(Engine):
    """A module in eval mode; the session's `compile` is 0 or 1.

    With job["device"] "cuda" it runs on a GPU; copies and cuda_graph as for onnxruntime.
    """

    runtime = "torch"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import torch

            # Imported before the memory floor is read: every program with torch has these too.
            self.files = importlib.import_module("vitrim.compress.network.files")
            self.dense = importlib.import_module("vitrim.compress.network.named_outputs")
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        self.torch = torch
        self.version = str(torch.__version__).split("+")[0]
        torch.set_num_threads(int(job.get("threads", 1)))

    def load(self) -> None:
        """Open the model; see `Engine.load`."""
        folder = os.path.dirname(self.require_file())
        self.set_input()
        try:
            model = self.files.load(folder)
            names = [str(entry["name"]) for entry in self.outputs]
            self.output_name = names[0] if names else self.output_name
            if names:
                model = self.dense.NamedOutputs(model, names).eval()
        except Exception as error:
            raise EngineError(one_line(error)) from None
        compiled = (self.job.get("session") or {}).get("compile") == "1"
        self.device = str(self.job.get("device") or "cpu")
        if self.device != "cpu":
            if not self.torch.cuda.is_available():
                raise EngineError(
                    f"this torch {self.version} reaches no GPU; "
                    "install a CUDA build on a machine with one, or measure on the processor"
                )
            model = model.to(self.device)
            self.provider = self.torch.cuda.get_device_name()
            self.copies_timed = bool(self.job.get("copies", True))
        # Freezing packs and folds constant weights; otherwise torch.compile takes them as inputs.
        self.model = self.torch.compile(model, options={"freezing": True}) if compiled else model

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        return self._run(images)[0]

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        names = [str(entry["name"]) for entry in self.outputs] or [self.output_name]
        return dict(zip(names, self._run(images)))

    def _run(self, images: Any) -> list[Any]:
        # Freezing needs no_grad, and refuses tensors of inference_mode. Copying the outputs to the
        # host waits for the GPU.
        with self.torch.no_grad():
            found = self.model(self.torch.from_numpy(images).to(self.device))
        return [value.cpu().numpy() for value in (found if self.outputs else [found])]

    def timed_call(self, images: Any) -> Callable[[], Any]:
        """The function to time; see `Engine.timed_call`."""
        if self.device == "cpu":
            return super().timed_call(images)
        torch, host = self.torch, self.torch.from_numpy(images)
        on_device = host.to(self.device)
        forward = (
            self._graph_forward(on_device)
            if self.job.get("cuda_graph")
            else self._eager_forward(on_device)
        )

        def without_copies() -> None:
            forward()
            torch.cuda.synchronize()

        def with_copies() -> Any:
            on_device.copy_(host)
            found = forward()
            return [value.cpu() for value in found] if self.outputs else found.cpu()

        return with_copies if self.copies_timed else without_copies

    def _eager_forward(self, images: Any) -> Callable[[], Any]:
        def forward() -> Any:
            with self.torch.no_grad():
                return self.model(images)

        return forward

    def _graph_forward(self, images: Any) -> Callable[[], Any]:
        """Replay a CUDA graph that reads `images` at their present address."""
        torch = self.torch
        # One-time allocations (workspaces, autotuning) must not be recorded; torch requires the
        # warm-up calls on a side stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                self.model(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            logits = self.model(images)

        def forward() -> Any:
            graph.replay()
            return logits

        return forward

    def device_memory_peak_bytes(self) -> int | None:
        """The peak of GPU memory."""
        return None if self.device == "cpu" else int(self.torch.cuda.max_memory_reserved())


ENGINE = TorchEngine
