"""ONNX Runtime: `.onnx` and `.ort` files."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing

REQUIREMENT = Requirement("onnxruntime", "onnxruntime")
CPU_PROVIDER = "CPUExecutionProvider"
# Providers with their own memory: images and logits are bound there, so that copies happen only
# where they are to be timed.
DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "cuda",
}
# The option that replays a recorded CUDA graph instead of launching each kernel.
GRAPH_OPTIONS = {
    "CUDAExecutionProvider": "enable_cuda_graph",
    "TensorrtExecutionProvider": "trt_cuda_graph_enable",
}
# The output of a model with buckets: how many patches an image kept.
KEPT = "kept"
# One inference with logging on, for the arena's lines in the log.
ARENA_SCRIPT = """
import json, sys
import numpy, onnxruntime
job = json.loads(sys.argv[1])
onnxruntime.set_default_logger_severity(1)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
for key, value in job["session"].items():
    options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
session.run(None, {job["input"]: numpy.zeros(job["shape"], job["type"])})
"""
NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}


class OnnxRuntimeEngine(Engine):
    """An inference session.

    It also reads these keys of the job: providers, provider_options ({provider: {key: text}}),
    arena, spinning, session (config entries), inputs (int64 values of optional inputs, by name; not
    on a GPU); on a GPU device ("cuda", by default from the
    provider), copies (whether they are timed) and cuda_graph (replay a recorded graph).
    """

    runtime = "onnxruntime"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import onnxruntime  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        self.module = onnxruntime
        self.version = onnxruntime.__version__

    def load(self) -> None:
        """Open the model; see `Engine.load`."""
        options = self._options()
        providers = list(self.job.get("providers") or [CPU_PROVIDER])
        assigns = providers != [CPU_PROVIDER]
        if assigns:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.device_floor_bytes = device_memory_used_bytes() if providers[0] in DEVICES else None
        self.session = self._open(options, graph=bool(self.job.get("cuda_graph")))
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(entry.name for entry in inputs)
            raise EngineError(
                f"the model has {len(inputs)} inputs ({names}); "
                "an image classifier with one is measured"
            )
        only = inputs[0]
        if only.type not in NUMPY_TYPES:
            raise EngineError(
                f"input {only.name!r} is a {only.type}; it can be one of {', '.join(NUMPY_TYPES)}"
            )
        self.set_input(only.shape, NUMPY_TYPES[only.type], only.name)
        self.optional = self._optional_inputs()
        outputs = [output.name for output in self.session.get_outputs()]
        self.output_names = self.set_outputs(outputs)
        self.provider_nodes = nodes = nodes_by_provider(self.session) if assigns else None
        self.provider = (
            max(nodes, key=nodes.__getitem__) if nodes else self.session.get_providers()[0]
        )
        self.device = self.job.get("device") or DEVICES.get(self.provider)
        self.bound: Any = None
        if self.device:
            self.copies_timed = bool(self.job.get("copies", True))

    def _optional_inputs(self) -> Json:
        import numpy

        given = self.job.get("inputs") or {}
        return {name: numpy.array(value, numpy.int64) for name, value in given.items()}

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        return self._run(images)[0]

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        return dict(zip(self.output_names, self._run(images)))

    def infer_chosen(self, images: Any) -> tuple[Any, int]:
        """Run the model in the image's own bucket; see `Engine.infer_chosen`."""
        if KEPT not in [output.name for output in self.session.get_outputs()]:
            raise EngineError(
                f"the model has no output {KEPT!r} with the number of patches that an image kept; "
                "export it again"
            )
        logits, kept = self.session.run([self.output_name, KEPT], {self.input_name: images})
        return logits, int(kept[0])

    def _run(self, images: Any) -> list[Any]:
        """All outputs, in the order of `output_names`."""
        if not self.device:
            try:
                feeds = {self.input_name: images, **self.optional}
                found: list[Any] = self.session.run(self.output_names, feeds)
                return found
            except Exception as error:
                name = os.path.basename(str(self.job["model"]))
                raise EngineError(
                    f"{name}: onnxruntime {self.version} cannot run it: {runtime_reason(error)}"
                ) from None
        if self.bound is None:
            self._bind(images)
        self.device_images.update_inplace(images)
        self.session.run_with_iobinding(self.bound)
        # Copying the outputs to the host waits for the device.
        return [value.numpy() for value in self.device_outputs]

    def timed_call(self, images: Any) -> Callable[[], Any]:
        """The function to time; see `Engine.timed_call`."""
        if not self.device or self.copies_timed:
            return super().timed_call(images)
        if self.bound is None:
            self._bind(images)
        self.device_images.update_inplace(images)
        run, bound = self.session.run_with_iobinding, self.bound

        def call() -> None:
            run(bound)
            bound.synchronize_outputs()

        return call

    def _bind(self, images: Any) -> None:
        # A recorded graph reads and writes at the addresses that it was recorded with, so both
        # buffers are allocated once.
        values = self.module.OrtValue
        outputs = {output.name: output for output in self.session.get_outputs()}
        self.device_images = values.ortvalue_from_numpy(images, self.device, 0)
        self.bound = self.session.io_binding()
        self.bound.bind_ortvalue_input(self.input_name, self.device_images)
        self.device_outputs = []
        for name in self.output_names:
            output = outputs[name]
            shape = [size if isinstance(size, int) else images.shape[0] for size in output.shape]
            value = values.ortvalue_from_shape_and_type(
                shape, NUMPY_TYPES[output.type], self.device, 0
            )
            self.device_outputs.append(value)
            self.bound.bind_ortvalue_output(name, value)

    def device_memory_peak_bytes(self) -> int | None:
        """The peak of GPU memory."""
        # The runtime's arenas on the device never shrink, so the present use is the peak.
        floor = self.device_floor_bytes
        now = None if floor is None else device_memory_used_bytes()
        return None if now is None or floor is None else max(0, now - floor)

    def arena_bytes(self) -> int | None:
        """The arena's bytes, weights included.

        None without an arena, where memory is short, or on a GPU, whose engine would have to be
        built a second time.
        """
        if not self.job.get("arena", True) or self.device or not memory_for_second_process():
            return None
        # Python's onnxruntime shows no allocator statistics (the C API does since 1.23,
        # AllocatorGetStats), but the arena logs its allocations. Another process, because logging
        # has to be on from the start, and a second session here would count as the model's memory.
        task = {
            "model": self.job["model"],
            "threads": int(self.job.get("threads", 1)),
            "session": dict(self.job.get("session") or {}),
            "shape": self.input_shape,
            "type": self.input_type,
            "input": self.input_name,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-c", ARENA_SCRIPT, json.dumps(task)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=120,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return arena_bytes(done.stderr.decode(errors="replace"))

    def profile(self, images: Any, count: int) -> list[Json]:
        """Time each operator; see `Engine.profile`."""
        # A second session: profiling cannot be switched on later, and slows the session down.
        folder = tempfile.mkdtemp(prefix="vitrim-profile-")
        try:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(folder, "trace")
            session = self._open(options)
            for _ in range(count + 2):
                session.run(self.output_names, {self.input_name: images, **self.optional})
            with open(session.end_profiling()) as stream:
                return operator_rows(json.load(stream), count)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _options(self) -> Any:
        job = self.job
        options = self.module.SessionOptions()
        options.intra_op_num_threads = int(job.get("threads", 1))
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = bool(job.get("arena", True))
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if job.get("spinning") else "0"
        )
        if job.get("spinning"):
            # Threads spin inside a call, not after it: models that are measured alternately would
            # slow each other down.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in (job.get("session") or {}).items():
            options.add_session_config_entry(key, value)
        return options

    def _open(self, options: Any, graph: bool = False) -> Any:
        providers = list(self.job.get("providers") or [CPU_PROVIDER])
        available = self.module.get_available_providers()
        for provider in providers:
            if provider not in available:
                raise EngineError(
                    f"this onnxruntime {self.version} has no {provider} "
                    f"(it has {', '.join(available)}); install the onnxruntime build "
                    "for that device, or request a provider that it has"
                )
        path = self.require_file()
        given = self.job.get("provider_options") or {}
        settings = [dict(given.get(provider) or {}) for provider in providers]
        for provider, wanted in zip(providers, settings):
            if graph and provider in GRAPH_OPTIONS:
                wanted[GRAPH_OPTIONS[provider]] = "1"
        try:
            return self.module.InferenceSession(
                path, options, providers=providers, provider_options=settings
            )
        except Exception as error:
            raise self.cannot_load(EngineError(runtime_reason(error))) from None


ENGINE = OnnxRuntimeEngine


def runtime_reason(error: BaseException) -> str:
    """What onnxruntime reports in an error, without its code, source files and C++ signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    text = re.sub(r"^Load model from \S+(?: failed:)? ?", "", text)
    while found := re.search(r"(?:\S*/)?\w+\.(?:cc|cpp|h|hpp):\d+ ", text):
        text = text[: found.start()] + _without_signature(text[found.end() :])
    if len(text) > 300:
        # The cause is at the end of some messages, and at the beginning of others.
        text = f"{text[:190]} ... {text[-100:]}"
    return text.rstrip(" .") or type(error).__name__


def _without_signature(text: str) -> str:
    """A text without the C++ function, with or without its parameters, that it starts with."""
    bare = re.match(r"~?\w+ ", text)
    full = re.match(r"[^().]*::[^(]*\(", text) or re.match(r"(?:[\w:<>&*]+ )+[\w:]+\(", text)
    if full is None:
        return text[bare.end() :] if bare else text
    depth = 1
    for place in range(full.end(), len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return re.sub(r"^ ?(?:const )?(?:\[with [^\]]*\] ?)?", "", text[place + 1 :])
    return text


def nodes_by_provider(session: Any) -> dict[str, int] | None:
    """How many nodes run on each execution provider; None where onnxruntime does not report it."""
    try:
        counts: dict[str, int] = {}
        for subgraph in session.get_provider_graph_assignment_info():
            counts[subgraph.ep_name] = counts.get(subgraph.ep_name, 0) + len(subgraph.get_nodes())
        return counts or None
    except Exception:
        return None


def memory_for_second_process(
    status: str = "/proc/self/status", meminfo: str = "/proc/meminfo"
) -> bool:
    """Whether twice this process's memory is free; True where the system does not report it.

    Args:
        status: The file with this process's resident memory.
        meminfo: The file with the system's available memory.
    """
    kilobytes = {}
    for path, key in ((status, "VmRSS:"), (meminfo, "MemAvailable:")):
        try:
            with open(path) as stream:
                kilobytes[key] = next(
                    int(line.split()[1]) for line in stream if line.startswith(key)
                )
        except (OSError, StopIteration, ValueError, IndexError):
            return True
    return kilobytes["MemAvailable:"] > 2 * kilobytes["VmRSS:"]


def arena_bytes(log: str) -> int | None:
    """The bytes that the CPU arena holds at the end of a log; None if the log has no arena."""
    name, held = "", None
    for line in log.splitlines():
        if found := re.search(r"BFCArena for (\w+)", line):
            name = found[1]
        if name != "Cpu":
            continue
        if found := re.search(r"Reserving memory in BFCArena for Cpu size: (\d+)", line):
            held = (held or 0) + int(found[1])
        elif found := re.search(r"Total allocated bytes: (\d+)", line):
            # This total includes what was reserved before it.
            held = int(found[1])
    return held


def operator_rows(trace: list[Json], count: int) -> list[Json]:
    """One row an operator from a trace, without its warm-up runs.

    Args:
        trace: The events of the trace.
        count: How many runs count, the last ones.

    Returns:
        Rows as of `Engine.profile`, the slowest operator first.
    """
    found: dict[str, list[Json]] = {}
    for event in trace:
        if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time"):
            found.setdefault(event["name"][: -len("_kernel_time")], []).append(event)
    rows = []
    for node, events in found.items():
        kept = events[-count:]
        args = kept[0].get("args", {})
        # The median: one interruption on a busy machine takes longer than all calls of an operator.
        spent = sorted(event["dur"] for event in kept)
        middle = (spent[(len(spent) - 1) // 2] + spent[len(spent) // 2]) / 2
        rows.append(
            {
                "node": node,
                "operator": args.get("op_name", "?"),
                "provider": args.get("provider", "?"),
                "output_shapes": [
                    list(shape)
                    for entry in args.get("output_type_shape", [])
                    for shape in entry.values()
                ],
                "calls": len(kept),
                "seconds": middle * len(kept) * 1e-6 / count,
            }
        )
    return sorted(rows, key=lambda row: -float(row["seconds"]))


class _MemoryInfo(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def device_memory_used_bytes(index: int = 0) -> int | None:
    """Memory of an NVIDIA GPU in use by all programs, as the driver counts it.

    The difference of two readings is what was allocated between them.

    Args:
        index: The GPU's number.

    Returns:
        Bytes, or None without such a GPU.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, info = ctypes.c_void_p(), _MemoryInfo()
    if (
        library.nvmlInit_v2() != 0
        or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0
        or library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(info)) != 0
    ):
        return None
    return int(info.used)
