"""A compiled network in TVM's virtual machine.

It needs apache-tvm-ffi and libtvm_runtime.so, but not the compiler. The library is searched beside
the model, in the folders of TVM_LIBRARY_PATH, and in an installed apache-tvm.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .engine import EngineError, Requirement, missing, one_line

NEEDED = Requirement("tvm_ffi", "apache-tvm apache-tvm-ffi")
LIBRARY = "libtvm_runtime.so"
# Large weights, where they are not part of the compiled code.
WEIGHTS = "weights.bin"
WEIGHTS_SCHEMA = "vitrim.weights/1"
WEIGHT_TYPES = ("float32", "float16", "int8", "uint8", "int32", "int64")
# Loaded after the runtime, for models that were compiled for the device.
DEVICE_LIBRARIES = {"cuda": "libtvm_runtime_cuda.so"}
# DLPack's numbers; TVM's virtual machine needs a CPU in addition to any other device.
DEVICES = {"cpu": 1, "cuda": 2}
POOLED = 2
# The alignment that TVM's generated code assumes.
ALIGNMENT_BYTES = 64
_libraries: list[Any] = []


class VirtualMachine:
    """A Relax executable; large weights are mapped from their file.

    Args:
        ffi: The module `tvm_ffi`.
        path: The library of the executable.
        shape: The shape of the images.
        threads: Size of the runtime's thread pool.
        device: cpu or cuda.
        spinning: Let idle threads of the pool spin.
        outputs: Names of the outputs; empty for the logits alone.

    Raises:
        EngineError: The machine lacks the device, or the weights' file is missing or malformed.
    """

    def __init__(
        self,
        ffi: Any,
        path: str,
        shape: list[int],
        threads: int,
        device: str,
        *,
        spinning: bool,
        outputs: Sequence[str] = (),
    ) -> None:
        if device != "cpu" and not has_device(ffi, device):
            raise EngineError(
                f"{os.path.basename(path)} was compiled for {device}, "
                "and this machine has no such device; run it on one that has"
            )
        set_threads(threads, spinning=spinning)
        self.ffi, self.device, self.path = ffi, device, os.path.abspath(path)
        self.outputs = list(outputs) or ["logits"]
        self.machine = start_machine(ffi.load_module(self.path), device)
        self.main = self.machine["main"]
        count = int(self.machine["get_function_arity"]("main")) - 1
        weights = os.path.join(os.path.dirname(self.path), WEIGHTS)
        arrays = map_weights(weights, count) if count else []
        self.weights = [
            ffi.from_dlpack(array) if device == "cpu" else to_device(ffi, array, device)
            for array in arrays
        ]
        self._buffer = aligned_zeros(shape)

    def infer(self, images: Any) -> Any:
        """Logits (batch, classes) float32, or the first output, of images float32."""
        return next(iter(self.infer_outputs(images).values()))

    def infer_outputs(self, images: Any) -> dict[str, Any]:
        """Each output by its name, float32, of images float32."""
        import numpy

        found = self.main(self._tensor(images), *self.weights)
        # A function with one result does not return a tuple.
        results = [found] if len(self.outputs) == 1 else list(found)
        return {
            name: numpy.asarray(to_numpy(self.ffi, result, self.device))
            for name, result in zip(self.outputs, results)
        }

    def profile(self, images: Any, count: int) -> list[tuple[str, str, int, float]]:
        """(node, kernel, calls, seconds of all calls) of each kernel."""
        from time import perf_counter

        started: list[float] = []
        found: dict[str, list[float]] = {}

        def record(function: Any, symbol: str, before: bool, *_: Any) -> int:
            if before:
                started.append(perf_counter())
            else:
                found.setdefault(symbol, []).append(perf_counter() - started.pop())
            return 0

        # An instrument cannot be removed, so another machine is instrumented.
        machine = start_machine(self.ffi.load_module(self.path), self.device)
        machine["set_instrument"](self.ffi.convert(record))
        for number in range(count + 2):
            if number == 2:
                found.clear()
            machine["main"](self._tensor(images), *self.weights)
        return [
            (symbol, symbol, len(seconds), sum(seconds))
            for symbol, seconds in found.items()
            if not symbol.startswith("vm.builtin.")
        ]

    def _tensor(self, images: Any) -> Any:
        """The images in memory that the device reads; copied where they are not aligned there."""
        if self.device != "cpu":
            return to_device(self.ffi, images, self.device)
        if (
            images.ctypes.data % ALIGNMENT_BYTES
            or not images.flags.c_contiguous
            or not images.flags.writeable
        ):
            self._buffer[...] = images
            images = self._buffer
        return self.ffi.from_dlpack(images)


def set_threads(threads: int, *, spinning: bool) -> None:
    """Set the environment variables of the runtime's thread pool, one for the whole process."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    # The pool would bind its threads to the first CPUs, whatever the process's affinity.
    os.environ["TVM_BIND_THREADS"] = "0"
    if not spinning:
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")


def import_ffi() -> Any:
    """Import `tvm_ffi`, but not torch, which it imports to exchange tensors.

    Raises:
        EngineError: It is not installed.
    """
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    try:
        with hidden("torch"):
            import tvm_ffi  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except (ImportError, OSError) as error:
        raise missing("tvm", error, NEEDED) from None
    return tvm_ffi


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Make `import module` fail inside the block, unless the module is already imported."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def library_folders(model: str) -> list[str]:
    """The folders in which the runtime's library is searched, in order."""
    folders = [os.path.dirname(os.path.abspath(model))]
    folders += [
        folder for folder in os.environ.get("TVM_LIBRARY_PATH", "").split(os.pathsep) if folder
    ]
    found = importlib.util.find_spec("tvm")
    for folder in (found.submodule_search_locations or []) if found else []:
        folders.append(os.path.join(folder, "lib"))
    return folders


def load_runtime(ffi: Any, model: str, device: str = "cpu") -> str:
    """Load libtvm_runtime.so, and the device's library where it has one.

    Args:
        ffi: The module `tvm_ffi`.
        model: The path of the compiled model.
        device: cpu or cuda.

    Returns:
        The path of libtvm_runtime.so.

    Raises:
        EngineError: A library is in none of the folders, which the message lists.
    """
    folders = library_folders(model)
    runtime = ""
    for name in [LIBRARY, *([DEVICE_LIBRARIES[device]] if device in DEVICE_LIBRARIES else [])]:
        for path in (os.path.join(folder, name) for folder in folders):
            if os.path.isfile(path):
                break
        else:
            raise EngineError(
                f"{name} is in none of {', '.join(folders)}; put it beside the model, "
                f"or install it with `python3 -m pip install {NEEDED.install}`"
            )
        runtime = runtime or path
        # Where tvm is imported the library is loaded; a second copy would register all functions
        # again.
        loaded = ffi.get_global_func("runtime.NumThreads", allow_missing=True) is not None
        if name == LIBRARY and loaded:
            continue
        try:
            _libraries.append(ctypes.CDLL(path, ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise EngineError(
                f"{path}: cannot be loaded ({one_line(error)}); "
                "use the library of this apache-tvm-ffi's release and machine"
            ) from None
    return runtime


def runtime_version(ffi: Any) -> str:
    """The version of apache-tvm where it is installed, else that of apache-tvm-ffi."""
    from importlib import metadata

    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        return f"ffi {ffi.__version__}"


def start_machine(module: Any, device: str) -> Any:
    """The virtual machine of a loaded module, with its allocators."""
    machine = module["vm_load_executable"]()
    devices = [DEVICES[device], 0, POOLED]
    machine["vm_initialization"](
        *devices, *([] if device == "cpu" else [DEVICES["cpu"], 0, POOLED])
    )
    return machine


def has_device(ffi: Any, device: str) -> bool:
    """Whether the runtime finds such a device."""
    query = ffi.get_global_func("runtime.GetDeviceAttr", allow_missing=True)
    try:
        # Attribute 0: whether it exists.
        return query is None or bool(query(DEVICES[device], 0, 0))
    except Exception:
        return False


def map_weights(path: str, count: int) -> list[Any]:
    """Map the tensors of a `weights.bin` into memory.

    Args:
        path: The file.
        count: How many tensors the model takes.

    Returns:
        One array a tensor, in the file's order.

    Raises:
        EngineError: The file is missing or malformed, or has another number of tensors.
    """
    import numpy

    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise EngineError(
            f"{path}: no such file, and the model needs {count} weights from it; "
            "copy the whole artifact"
        )
    try:
        with open(path, "rb") as stream:
            head = stream.readline(1 << 24)
        table = json.loads(head)
        rows = table["tensors"]
        if table["schema"] != WEIGHTS_SCHEMA or len(rows) != count:
            raise ValueError(
                f"schema {table['schema']!r} with {len(rows)} tensors, "
                f"expected {WEIGHTS_SCHEMA!r} with {count}"
            )
        # Copy on write: never written to, but a tensor to exchange must not be read-only.
        whole = numpy.memmap(path, dtype=numpy.uint8, mode="c")
        found = []
        for row in rows:
            if row["type"] not in WEIGHT_TYPES:
                raise ValueError(f"type {row['type']!r}")
            first = len(head) + int(row["offset"])
            last = first + int(row["bytes"])
            if not len(head) <= first <= last <= len(whole):
                raise ValueError("a tensor is outside the file")
            shape = [int(size) for size in row["shape"]]
            found.append(whole[first:last].view(row["type"]).reshape(shape))
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{name}: not a complete file of weights ({one_line(error)}); "
            "copy the whole artifact again"
        ) from None
    return found


def aligned_zeros(shape: list[int]) -> Any:
    """An array of zeros, float32, at an aligned address."""
    import numpy

    count = 4
    for size in shape:
        count *= size
    buffer = numpy.zeros(count + ALIGNMENT_BYTES, dtype=numpy.uint8)
    first = -buffer.ctypes.data % ALIGNMENT_BYTES
    return buffer[first : first + count].view(numpy.float32).reshape(shape)


def to_device(ffi: Any, images: Any, device: str) -> Any:
    """A copy of an array in a device's memory."""
    tensor = ffi.get_global_func("runtime.TVMTensorAllocWithScope")(
        ffi.Shape(images.shape), ffi.dtype("float32"), ffi.device(DEVICES[device], 0), None
    )
    ffi.get_global_func("runtime.TVMTensorCopyFromBytes")(
        tensor, images.ctypes.data_as(ctypes.c_void_p), images.nbytes
    )
    return tensor


def to_numpy(ffi: Any, tensor: Any, device: str) -> Any:
    """The logits as an array, copied from any device but the CPU."""
    import numpy

    if hasattr(tensor, "__len__") and not hasattr(tensor, "shape"):
        tensor = tensor[0]
    if device == "cpu":
        return numpy.from_dlpack(tensor)
    found = numpy.empty(tuple(tensor.shape), dtype=numpy.float32)
    ffi.get_global_func("runtime.TVMTensorCopyToBytes")(
        tensor, found.ctypes.data_as(ctypes.c_void_p), found.nbytes
    )
    return found
