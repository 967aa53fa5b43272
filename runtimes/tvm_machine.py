"""A compiled network in TVM's virtual machine: apache-tvm-ffi and libtvm_runtime.so, never the
compiler, so that a device is measured as it is.

The library lies beside the model, in a folder that TVM_LIBRARY_PATH names, or in an installed
apache-tvm.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from .engine import EngineError, Requirement, missing, one_line

NEEDED = Requirement("tvm_ffi", "apache-tvm apache-tvm-ffi")
LIBRARY = "libtvm_runtime.so"
# Large weights, where the compiled code does not hold them itself.
WEIGHTS = "weights.bin"
WEIGHTS_SCHEMA = "vitrim.weights/1"
WEIGHT_TYPES = ("float32", "float16", "int8", "uint8", "int32", "int64")
# Beside the runtime, for models that were compiled for such a device.
DEVICE_LIBRARIES = {"cuda": "libtvm_runtime_cuda.so"}
# As DLPack numbers them; TVM's virtual machine wants a CPU besides any other device.
DEVICES = {"cpu": 1, "cuda": 2}
POOLED = 2
# What TVM's generated code may take for granted of a pointer.
ALIGNMENT_BYTES = 64
_libraries: list[Any] = []


class Machine:
    """A Relax executable, its weights mapped from their file where it has them outside."""

    def __init__(
        self, ffi: Any, path: str, shape: list[int], threads: int, device: str, *, spinning: bool
    ) -> None:
        name = os.path.basename(path)
        if device != "cpu" and not device_there(ffi, device):
            raise EngineError(
                f"{name} was compiled for {device}, and this machine has no such device; run it where one is"
            )
        set_threads(threads, spinning=spinning)
        self.ffi, self.device, self.path = ffi, device, os.path.abspath(path)
        self.machine = start_machine(ffi.load_module(self.path), device)
        self.main = self.machine["main"]
        count = int(self.machine["get_function_arity"]("main")) - 1
        arrays = (
            map_weights(os.path.join(os.path.dirname(self.path), WEIGHTS), count) if count else []
        )
        self.weights = [
            ffi.from_dlpack(array) if device == "cpu" else to_device(ffi, array, device)
            for array in arrays
        ]
        self._buffer = aligned(shape)

    def infer(self, images: Any) -> Any:
        """Logits (batch, classes) float32 of images float32."""
        import numpy

        return numpy.asarray(
            to_numpy(self.ffi, self.main(self._tensor(images), *self.weights), self.device)
        )

    def profile(self, images: Any, count: int) -> list[tuple[str, str, int, float]]:
        """(node, kernel, calls, seconds of all calls) for each kernel."""
        from time import perf_counter

        began: list[float] = []
        found: dict[str, list[float]] = {}

        def watch(function: Any, symbol: str, before: bool, *_: Any) -> int:
            if before:
                began.append(perf_counter())
            else:
                found.setdefault(symbol, []).append(perf_counter() - began.pop())
            return 0

        # Nothing takes an instrument off again, so another machine is watched.
        machine = start_machine(self.ffi.load_module(self.path), self.device)
        machine["set_instrument"](self.ffi.convert(watch))
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
        """The images where the device reads them: as they lie if aligned, else copied, which then
        is part of the inference.
        """
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
    """Settings that the runtime reads from the environment; the number holds for every model of
    this process, since there is one pool.
    """
    os.environ["TVM_NUM_THREADS"] = str(threads)
    # The pool would bind its threads to the first CPUs, whatever CPUs this process was given.
    os.environ["TVM_BIND_THREADS"] = "0"
    if not spinning:
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")


def import_ffi() -> Any:
    """`tvm_ffi` without torch, which it would import for exchanging tensors. Errors: EngineError
    where it is missing.
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
    """Let `import module` fail inside, unless it is here already: two hundred megabytes that a
    device has not.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def library_folders(model: str) -> list[str]:
    """Where the runtime's library may lie, in order."""
    folders = [os.path.dirname(os.path.abspath(model))]
    folders += [
        folder for folder in os.environ.get("TVM_LIBRARY_PATH", "").split(os.pathsep) if folder
    ]
    found = importlib.util.find_spec("tvm")
    for place in (found.submodule_search_locations or []) if found else []:
        folders.append(os.path.join(place, "lib"))
    return folders


def load_runtime(ffi: Any, model: str, device: str = "cpu") -> str:
    """Load libtvm_runtime.so, and what the device needs besides; the path. Errors: EngineError
    naming the folders that were searched.
    """
    folders = library_folders(model)
    runtime = ""
    for name in [LIBRARY, *([DEVICE_LIBRARIES[device]] if device in DEVICE_LIBRARIES else [])]:
        for path in (os.path.join(folder, name) for folder in folders):
            if os.path.isfile(path):
                break
        else:
            raise EngineError(
                f"{name} is in none of {', '.join(folders)}; put it beside the model, or install it with `python3 -m pip install {NEEDED.install}`"
            )
        runtime = runtime or path
        # A program that has imported tvm itself has loaded it already; twice would register
        # everything twice.
        if (
            name == LIBRARY
            and ffi.get_global_func("runtime.NumThreads", allow_missing=True) is not None
        ):
            continue
        import ctypes

        try:
            _libraries.append(ctypes.CDLL(path, ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise EngineError(
                f"{path}: cannot be loaded ({one_line(error)}); take the library of this apache-tvm-ffi's release and machine"
            ) from None
    return runtime


def runtime_version(ffi: Any) -> str:
    """Of apache-tvm where it is installed; else of the exchange layer, which is what the device
    has.
    """
    from importlib import metadata

    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        return f"ffi {ffi.__version__}"


def start_machine(module: Any, device: str) -> Any:
    """The virtual machine of a loaded module, its allocators set up."""
    machine = module["vm_load_executable"]()
    devices = [DEVICES[device], 0, POOLED]
    machine["vm_initialization"](
        *devices, *([] if device == "cpu" else [DEVICES["cpu"], 0, POOLED])
    )
    return machine


def device_there(ffi: Any, device: str) -> bool:
    """Whether the runtime finds such a device here."""
    query = ffi.get_global_func("runtime.GetDeviceAttr", allow_missing=True)
    try:
        # Attribute 0: whether it exists.
        return query is None or bool(query(DEVICES[device], 0, 0))
    except Exception:
        return False


def map_weights(path: str, count: int) -> list[Any]:
    """The tensors of a `weights.bin` as arrays over the mapped file. Errors: EngineError for a file
    that is not whole or has other tensors than `count`.
    """
    import numpy

    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise EngineError(
            f"{path}: no such file, and the model wants {count} weights from it; copy the whole artifact"
        )
    try:
        with open(path, "rb") as stream:
            head = stream.readline(1 << 24)
        told = json.loads(head)
        rows = told["tensors"]
        if told["schema"] != WEIGHTS_SCHEMA or len(rows) != count:
            raise ValueError(
                f"schema {told['schema']!r} with {len(rows)} tensors, wanted {WEIGHTS_SCHEMA!r} with {count}"
            )
        # Copy on write: never written to, but what is exchanged as a tensor must not be read-only.
        whole = numpy.memmap(path, dtype=numpy.uint8, mode="c")
        found = []
        for row in rows:
            if row["type"] not in WEIGHT_TYPES:
                raise ValueError(f"type {row['type']!r}")
            first = len(head) + int(row["offset"])
            last = first + int(row["bytes"])
            if not len(head) <= first <= last <= len(whole):
                raise ValueError("a tensor lies outside of the file")
            found.append(
                whole[first:last].view(row["type"]).reshape([int(size) for size in row["shape"]])
            )
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{name}: not a whole file of weights ({one_line(error)}); copy the whole artifact again"
        ) from None
    return found


def aligned(shape: list[int]) -> Any:
    """An array of zeros that begins where the generated code wants it."""
    import numpy

    count = 4
    for size in shape:
        count *= size
    room = numpy.zeros(count + ALIGNMENT_BYTES, dtype=numpy.uint8)
    first = -room.ctypes.data % ALIGNMENT_BYTES
    return room[first : first + count].view(numpy.float32).reshape(shape)


def to_device(ffi: Any, images: Any, device: str) -> Any:
    """A copy of an array in a device's memory."""
    tensor = ffi.get_global_func("runtime.TVMTensorAllocWithScope")(
        ffi.Shape(images.shape), ffi.dtype("float32"), ffi.device(DEVICES[device], 0), None
    )
    ffi.get_global_func("runtime.TVMTensorCopyFromBytes")(
        tensor, images.ctypes.data_as(_pointer()), images.nbytes
    )
    return tensor


def to_numpy(ffi: Any, tensor: Any, device: str) -> Any:
    """The logits as an array; from another device they are copied."""
    import numpy

    if hasattr(tensor, "__len__") and not hasattr(tensor, "shape"):
        tensor = tensor[0]
    if device == "cpu":
        return numpy.from_dlpack(tensor)
    found = numpy.empty(tuple(tensor.shape), dtype=numpy.float32)
    ffi.get_global_func("runtime.TVMTensorCopyToBytes")(
        tensor, found.ctypes.data_as(_pointer()), found.nbytes
    )
    return found


def _pointer() -> Any:
    import ctypes

    return ctypes.c_void_p
