"""OpenVINO: `.xml` (with its `.bin`) and `.onnx` files, on the processor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing

REQUIREMENT = Requirement("openvino", "openvino")
DEVICE = "CPU"
# Limits of oneDNN, which others in the process obey. OpenVINO contains a oneDNN of its own and
# chooses nodes by the processor's instructions, without these limits: with one of them it finds no
# implementation (DNNL_MAX_CPU_ISA=AVX2 on a processor with AVX-512), or crashes.
ONEDNN_LIMITS = ("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")


def without_telemetry() -> None:
    """Keep OpenVINO and nncf, which are imported next, from reporting that over the network.

    Their package `openvino_telemetry` sends an event for each import and conversion, unless a file
    in the home directory declines (https://github.com/openvinotoolkit/telemetry). It does so in a
    thread that forks, beside what is measured; under qemu the fork may never return. Without the
    package both use a stub of their own. A program that has it loaded keeps it.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def openvino_contained() -> Iterator[None]:
    """Hide `ONEDNN_LIMITS` from OpenVINO as it compiles a model, and keep the signal stack.

    With its first model a `Core` gives the thread another stack for the handlers of signals
    (openvino pull request 11894), and unmaps it at its end. Of two that end in the order in which
    they began, the second one restores the stack of the first, which is gone: Ctrl-C, or the end of
    a worker process, then kills the process without a message. Two engines show it:

        engines[0].load(), engines[1].load(); del engines[0]; del engines[0]
        signal.signal(SIGUSR1, print); os.kill(os.getpid(), SIGUSR1)

    A `Core` restores nothing where its stack is no longer in use.
    """
    hidden = {name: os.environ.pop(name) for name in ONEDNN_LIMITS if name in os.environ}
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    before = _SignalStack()
    if library is not None:
        library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if library is not None:
            library.sigaltstack(ctypes.byref(before), None)
        os.environ.update(hidden)


class OpenVinoEngine(Engine):
    """A compiled model and one inference request.

    The session contains properties such as INFERENCE_PRECISION_HINT.
    """

    runtime = "openvino"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        without_telemetry()
        try:
            import openvino
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        self.module = openvino
        self.version = str(openvino.__version__).split("-")[0]

    def load(self) -> None:
        """Open the model; see `Engine.load`."""
        path = self.require_file()
        wanted = self._properties()
        try:
            with openvino_contained():
                self.compiled = self._compiled(path, wanted)
        except EngineError:
            raise
        except Exception as error:
            raise self.cannot_load(error) from None
        if len(self.compiled.inputs) != 1:
            raise EngineError(
                f"the model has {len(self.compiled.inputs)} inputs; "
                "an image classifier with one is measured"
            )
        only = self.compiled.inputs[0]
        dtype = only.get_element_type().to_dtype().name
        self.set_input([int(size) for size in only.shape], dtype, only.get_any_name())
        outputs = [output.get_any_name() for output in self.compiled.outputs]
        self.output_names = self.set_outputs(outputs)
        self._check_precision(wanted)
        self.provider = ",".join(self.compiled.get_property("EXECUTION_DEVICES"))
        self.request = self.compiled.create_infer_request()
        self.bound: Any = None
        self.positions = [outputs.index(name) for name in self.output_names]

    def _compiled(self, path: str, wanted: Json) -> Any:
        core = self.module.Core()
        model = core.read_model(path)
        if model.is_dynamic():
            only = model.inputs[0]
            shape = [
                size.get_length() if size.is_static else None for size in only.get_partial_shape()
            ]
            self.set_input(shape, name=only.get_any_name())
            model.reshape(self.input_shape)
        return core.compile_model(model, DEVICE, wanted)

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        self._run(images)
        return self.request.get_output_tensor(self.positions[0]).data.copy()

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        self._run(images)
        return {
            name: self.request.get_output_tensor(position).data.copy()
            for name, position in zip(self.output_names, self.positions)
        }

    def _run(self, images: Any) -> None:
        # The request reads the images in place. Binding costs 2 % of DeiT-T, so the same array is
        # bound once. The next call overwrites the output, so it is copied.
        if images is not self.bound:
            self.request.set_input_tensor(
                self.module.Tensor(images, shared_memory=images.flags.writeable)
            )
            self.bound = images
        self.request.infer()

    def profile(self, images: Any, count: int) -> list[Json]:
        """Time each operator; see `Engine.profile`."""
        # Counters slow every call, so the profile uses a second compiled model.
        with openvino_contained():
            compiled = self.module.Core().compile_model(
                str(self.job["model"]), DEVICE, {**self._properties(), "PERF_COUNT": True}
            )
        request = compiled.create_infer_request()
        shapes = {}
        for node in compiled.get_runtime_model().get_ordered_ops():
            shapes[node.get_friendly_name()] = [
                [int(size) for size in output.shape]
                for output in node.outputs()
                if output.partial_shape.is_static
            ]
        rows: dict[str, Json] = {}
        for number in range(count + 2):
            request.infer({0: images})
            if number < 2:
                continue
            for info in request.profiling_info:
                if "EXECUTED" not in str(info.status):
                    continue
                row = rows.setdefault(
                    info.node_name,
                    {
                        "node": info.node_name,
                        "operator": info.node_type,
                        "provider": info.exec_type,
                        "output_shapes": shapes.get(info.node_name, []),
                        "calls": 0,
                        "seconds": 0.0,
                    },
                )
                row["calls"] += 1
                row["seconds"] += info.real_time.total_seconds() / count
        return sorted(rows.values(), key=lambda row: -float(row["seconds"]))

    def _properties(self) -> Json:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": int(self.job.get("threads", 1)),
            # The runner pins the process; a runtime that pins its threads too would leave the
            # process's CPUs.
            "ENABLE_CPU_PINNING": False,
            # By default OpenVINO computes in bfloat16 where the processor supports it.
            "INFERENCE_PRECISION_HINT": "f32",
            **(self.job.get("session") or {}),
        }

    def _check_precision(self, wanted: Json) -> None:
        """Raise EngineError if the model runs in another precision than requested."""
        names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        hint = self.compiled.get_property("INFERENCE_PRECISION_HINT")
        name = hint.to_string() if hasattr(hint, "to_string") else str(hint)
        found, requested = names.get(name, name), wanted["INFERENCE_PRECISION_HINT"]
        if found != requested:
            raise EngineError(
                f"OpenVINO runs the model in {found}, and {requested} was requested; "
                "this processor has no such unit"
            )


ENGINE = OpenVinoEngine
