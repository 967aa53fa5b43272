"""TVM: `model.so` as `vitrim export --runtime tvm` compiled it.

A straight program (session: entry = program) needs numpy and nothing else, no part of TVM either.
What could not be made one is called by TVM's virtual machine, which needs apache-tvm-ffi and
libtvm_runtime.so on the device.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from .compiled_program import CompiledProgram
from .engine import Engine, EngineError, Json, Requirement, one_line
from .tvm_machine import Machine, import_ffi, load_runtime, runtime_version

# All that a straight program asks for; a model for the virtual machine says what else it needs when
# it is opened.
REQUIREMENT = Requirement("numpy", "numpy")
DEVICES = ("cpu", "cuda")


class TvmEngine(Engine):
    """Of the job's session it reads entry (program or machine), device (cpu or cuda), triple, and
    compiler.
    """

    runtime = "tvm"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        session = job.get("session") or {}
        self.device = str(session.get("device", "cpu"))
        if self.device not in DEVICES:
            raise EngineError(
                f"session: device {self.device!r} is none that this engine drives; export for {' or '.join(DEVICES)}"
            )
        self.straight = session.get("entry") == "program"
        self.ffi = None
        self.version = str(session.get("compiler", ""))
        if not self.straight:
            self.ffi = import_ffi()
            load_runtime(self.ffi, str(job["model"]), self.device)
            self.version = self.version or runtime_version(self.ffi)
        self.provider = "CPU" if self.device == "cpu" else self.device.upper()

    def load(self) -> None:
        self.take_input()
        if self.input_type != "float32":
            raise EngineError(
                f"input {self.input_name!r} is {self.input_type}; a compiled model takes float32"
            )
        path = self.require_file()
        self._refuse_foreign(path)
        threads = int(self.job.get("threads", 1))
        try:
            if self.straight:
                self.model: Any = CompiledProgram(path, self.input_shape, threads)
            else:
                self.model = Machine(
                    self.ffi,
                    path,
                    self.input_shape,
                    threads,
                    self.device,
                    spinning=bool(self.job.get("spinning")),
                )
        except EngineError:
            raise
        except Exception as error:
            raise self.cannot_load(error) from None

    def infer(self, images: Any) -> Any:
        if list(images.shape) != self.input_shape:
            raise EngineError(
                f"input {self.input_name!r} takes {self.input_shape}, got {list(images.shape)}; this model has fixed shapes"
            )
        try:
            return self.model.infer(images)
        except Exception as error:
            raise EngineError(f"tvm {self.version}: the model stopped: {one_line(error)}") from None

    def profile(self, images: Any, count: int) -> list[Json]:
        rows = [
            {
                "node": node,
                "operator": operator_of(kernel),
                "provider": self.provider,
                "output_shapes": [],
                "calls": calls,
                "seconds": seconds / count,
            }
            for node, kernel, calls, seconds in self.model.profile(images, count)
        ]
        if not rows:
            raise EngineError(
                "this model was compiled into a single function, so its kernels cannot be told apart; profile the onnxruntime artifact"
            )
        return sorted(rows, key=lambda row: -float(row["seconds"]))

    def arena_bytes(self) -> int | None:
        return self.model.arena_bytes if self.straight else None

    def _refuse_foreign(self, path: str) -> None:
        """Errors: EngineError for machine code of another processor, which the loader would refuse
        in words that help nobody.
        """
        triple = str((self.job.get("session") or {}).get("triple", ""))
        here = {"arm64": "aarch64", "amd64": "x86_64"}.get(
            platform.machine().lower(), platform.machine().lower()
        )
        if triple and triple.split("-")[0] != here:
            raise EngineError(
                f"{os.path.basename(path)} was compiled for {triple}, and this machine is {here}; run it there, or export for this one"
            )


ENGINE = TvmEngine


def operator_of(kernel: str) -> str:
    """A kernel's name without the number that tells it from its like: `dense_3` is a `dense`."""
    return kernel.rstrip("0123456789").rstrip("_") or kernel
