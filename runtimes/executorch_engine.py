"""ExecuTorch: `.pte` files, on XNNPACK where it has the operator, else on ExecuTorch's kernels."""

from __future__ import annotations

from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing

REQUIREMENT = Requirement("executorch", "executorch")


class ExecuTorchEngine(Engine):
    """The method `forward` of a program.

    ExecuTorch's Python imports torch, whose memory therefore counts to the floor.
    """

    runtime = "executorch"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import torch
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        from importlib import metadata

        self.torch, self.library, self.runtimes = torch, portable_lib, Runtime
        self.version = metadata.version("executorch")

    def load(self) -> None:
        """Open the model; see `Engine.load`."""
        path = self.require_file()
        threads = int(self.job.get("threads", 1))
        self.torch.set_num_threads(threads)
        # The pool is created at its first use, with a thread a core.
        self.library._unsafe_reset_threadpool(threads)
        found = self.library._threadpool_get_thread_count()
        if found != threads:
            raise EngineError(
                f"ExecuTorch uses {found} threads, and {threads} were requested; "
                "give another number"
            )
        try:
            self.method = self.runtimes.get().load_program(path).load_method("forward")
        except Exception as error:
            raise self.cannot_load(error) from None
        sizes = self.method.metadata.input_tensor_meta(0).sizes()
        self.set_input([int(size) for size in sizes])
        names = [str(entry["name"]) for entry in self.outputs]
        self.output_name = names[0] if names else self.output_name

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        return self.method.execute([self.torch.from_numpy(images)])[0].numpy()

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        if not self.outputs:
            return super().infer_outputs(images)
        found = self.method.execute([self.torch.from_numpy(images)])
        if len(found) != len(self.outputs):
            raise EngineError(
                f"the program has {len(found)} outputs, {len(self.outputs)} were requested; "
                "export again"
            )
        return {str(entry["name"]): value.numpy() for entry, value in zip(self.outputs, found)}


ENGINE = ExecuTorchEngine
