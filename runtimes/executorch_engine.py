"""ExecuTorch: `.pte` files, with what XNNPACK takes on XNNPACK and the rest on ExecuTorch's own
kernels.
"""

from __future__ import annotations

from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing

REQUIREMENT = Requirement("executorch", "executorch")


class ExecuTorchEngine(Engine):
    """The method `forward` of a program. ExecuTorch's Python needs torch, whose memory is below the
    floor.
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
        path = self.require_file()
        threads = int(self.job.get("threads", 1))
        self.torch.set_num_threads(threads)
        # The pool is made at the first use, with a thread a core.
        self.library._unsafe_reset_threadpool(threads)
        if self.library._threadpool_get_thread_count() != threads:
            raise EngineError(
                f"ExecuTorch took {self.library._threadpool_get_thread_count()} threads, and {threads} were asked for; give another number"
            )
        try:
            self.method = self.runtimes.get().load_program(path).load_method("forward")
        except Exception as error:
            raise self.cannot_load(error) from None
        told = self.method.metadata.input_tensor_meta(0)
        self.take_input([int(size) for size in told.sizes()])

    def infer(self, images: Any) -> Any:
        return self.method.execute([self.torch.from_numpy(images)])[0].numpy()


ENGINE = ExecuTorchEngine
