"""TVM: `model.so` as `vitrim export --runtime tvm` compiled it.

A model with a static execution plan (session: entry = program) needs numpy only, and no part of
TVM. Any other model runs in TVM's virtual machine, which needs apache-tvm-ffi and libtvm_runtime.so
on the device.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from .compiled_program import CompiledProgram
from .engine import Engine, EngineError, Json, Requirement, one_line
from .tvm_virtual_machine import VirtualMachine, import_ffi, load_runtime, runtime_version

# What a model with a static plan needs; a model for the virtual machine reports what else it needs
# when it is opened.
REQUIREMENT = Requirement("numpy", "numpy")
DEVICES = ("cpu", "cuda")
# The first part of the name of the kernels that write the places of chosen patches.
CHOICE_KERNEL = "choose_patches"


class TvmEngine(Engine):
    """A compiled network.

    It reads these keys of the session: entry (program or machine), device (cpu or cuda), triple and
    compiler; and of the job inputs (bucket: the number of patches that every image keeps).
    """

    runtime = "tvm"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        session = job.get("session") or {}
        self.device = str(session.get("device", "cpu"))
        if self.device not in DEVICES:
            raise EngineError(
                f"session: device {self.device!r} is unknown to this engine; "
                f"export for {' or '.join(DEVICES)}"
            )
        self.has_plan = session.get("entry") == "program"
        self.ffi = None
        self.version = str(session.get("compiler", ""))
        if not self.has_plan:
            self.ffi = import_ffi()
            load_runtime(self.ffi, str(job["model"]), self.device)
            self.version = self.version or runtime_version(self.ffi)
        self.provider = "CPU" if self.device == "cpu" else self.device.upper()

    def load(self) -> None:
        """Open the library; see `Engine.load`."""
        self.set_input()
        if self.input_type != "float32":
            raise EngineError(
                f"input {self.input_name!r} is {self.input_type}; a compiled model takes float32"
            )
        path = self.require_file()
        self._check_processor(path)
        threads = int(self.job.get("threads", 1))
        try:
            self.model: Any = (
                CompiledProgram(path, self.input_shape, threads, self.outputs)
                if self.has_plan
                else VirtualMachine(
                    self.ffi,
                    path,
                    self.input_shape,
                    threads,
                    self.device,
                    spinning=bool(self.job.get("spinning")),
                    outputs=[str(entry["name"]) for entry in self.outputs],
                )
            )
            self.output_name = next(iter(self.model.outputs))
            self.forced = int((self.job.get("inputs") or {}).get("bucket") or 0)
            if isinstance(self.model, CompiledProgram):
                self.model.force(self.forced)
        except EngineError:
            raise
        except Exception as error:
            raise self.cannot_load(error) from None

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        return self.infer_outputs(images)[self.output_name]

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        if list(images.shape) != self.input_shape:
            raise EngineError(
                f"input {self.input_name!r} takes {self.input_shape}, got {list(images.shape)}; "
                "this model has fixed shapes"
            )
        try:
            found: Json = self.model.infer_outputs(images)
            return found
        except Exception as error:
            raise EngineError(f"tvm {self.version}: the model stopped: {one_line(error)}") from None

    def infer_chosen(self, images: Any) -> tuple[Any, int]:
        """Run the model in the image's own bucket; see `Engine.infer_chosen`."""
        if not self.has_plan:
            raise EngineError("a model for TVM's virtual machine has no buckets")
        self.model.force(0)
        logits = self.infer(images)
        kept = self.model.kept
        self.model.force(self.forced)
        if not kept:
            raise EngineError("the model has no buckets")
        return logits, kept

    def infer_choices(self, images: Any) -> list[Any]:
        """Run the model and read its choices; see `Engine.infer_choices`."""
        import numpy

        if not self.has_plan:
            raise EngineError("a model for TVM's virtual machine does not show what it selects")
        return [
            numpy.frombuffer(content, numpy.int32).reshape(len(images), -1).astype(numpy.int64)
            for name, content in self.model.watch(images)
            if CHOICE_KERNEL in name
        ]

    def profile(self, images: Any, count: int) -> list[Json]:
        """Time each kernel; see `Engine.profile`."""
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
                "this model was compiled into a single function, whose kernels cannot be timed one "
                "by one; profile the onnxruntime artifact"
            )
        return sorted(rows, key=lambda row: -float(row["seconds"]))

    def arena_bytes(self) -> int | None:
        """The planned memory of a model with a static plan."""
        return self.model.arena_bytes if self.has_plan else None

    def _check_processor(self, path: str) -> None:
        """Raise EngineError for another processor's code, which the loader refuses obscurely."""
        triple = str((self.job.get("session") or {}).get("triple", ""))
        machine = platform.machine().lower()
        here = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
        if triple and triple.split("-")[0] != here:
            raise EngineError(
                f"{os.path.basename(path)} was compiled for {triple}, and this machine is {here}; "
                "run it there, or export for this one"
            )


ENGINE = TvmEngine


def operator_of(kernel: str) -> str:
    """A kernel's name without its number: `dense_3` is a `dense`."""
    return kernel.rstrip("0123456789").rstrip("_") or kernel
