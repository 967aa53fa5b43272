"""What the schedule hands on: a Relax module and how it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.relax import VMExecutable
    from tvm.target import Target
    from tvm.transform import Pass

Route = Literal["kernels", "front-end", "default"]


@dataclass(frozen=True)
class Built:
    """A network in Relax, with weights inside, whose function `main` takes images (batch, C, H, W)
    float32 and gives logits (batch, classes).

    route: `kernels` (ours throughout), `front-end` (through ONNX, then our schedule), `default`
    (through ONNX, TVM's own pipeline). notes: one line each, for people. threads: what the parallel
    loops were cut for; 1 means that there are none.
    """

    module: IRModule
    target: Target
    pipeline: Pass
    route: Route
    threads: int
    notes: tuple[str, ...] = ()

    def compile(self, *, system_lib: bool = False) -> VMExecutable:
        """Machine code: `.export_library(path)` writes it. `system_lib`: for a static library,
        whose functions register when the program starts.
        """
        import tvm
        from tvm import relax

        with tvm.transform.PassContext(opt_level=3):
            executable: VMExecutable = relax.build(
                self.module, target=self.target, relax_pipeline=self.pipeline, system_lib=system_lib
            )
        return executable
