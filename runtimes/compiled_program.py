"""A compiled network as a shared library of plain C functions, called without any runtime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from .engine import EngineError, Json

# 64 bytes of float32.
ALIGNED_NUMBERS = 16


class CompiledProgram:
    """`model.so` with its entry `vitrim_network_run`.

    One inference at a time, for all objects of the same file together: the memory is the library's.

    Args:
        path: The library.
        shape: The shape of the images.
        outputs: Name and shape of each output, in order; empty for the logits alone.
        threads: How many threads are requested; the library may use fewer.

    Raises:
        EngineError: The file is not such a library, takes images of another size, or has code that
            this processor cannot run.
    """

    def __init__(
        self, path: str, shape: list[int], threads: int, outputs: Sequence[Json] = ()
    ) -> None:
        import numpy

        name = os.path.basename(path)
        try:
            library = ctypes.CDLL(os.path.abspath(path))
            self._run = library.vitrim_network_run
        except OSError as error:
            raise EngineError(
                f"{name}: cannot be loaded ({error}); export it for this machine"
            ) from None
        except AttributeError:
            raise EngineError(
                f"{name}: has no vitrim_network_run; export the model again"
            ) from None
        _declare(library)
        _require_processor(library, name)
        wanted, given = int(library.vitrim_network_image_numbers()), int(numpy.prod(shape))
        if given != wanted:
            raise EngineError(
                f"{name} takes {wanted} numbers, and the input's shape {shape} has {given}"
            )
        self.library = library
        self.shape = shape
        self.numbers = int(library.vitrim_network_logit_numbers())
        self.outputs = (
            _places(library, name, outputs)
            if outputs
            else {"logits": (0, [shape[0], self.numbers // shape[0]])}
        )
        self.threads = int(library.vitrim_network_threads(threads))

    def force(self, patches: int) -> None:
        """Let every image keep a number of patches, one bucket's; 0: what its scores choose.

        Raises:
            EngineError: The network has no such bucket.
        """
        force = getattr(self.library, "vitrim_network_force", None)
        if patches and (force is None or force(patches) != 0):
            raise EngineError(f"the model has no bucket of {patches} patches; export it again")
        if not patches and force is not None:
            force(0)

    @property
    def kept(self) -> int:
        """How many patches the last image kept; 0 for a network without buckets."""
        kept = getattr(self.library, "vitrim_network_kept", None)
        return 0 if kept is None else int(kept())

    @property
    def arena_bytes(self) -> int:
        """The memory planned for values between the kernels."""
        return int(self.library.vitrim_network_arena_bytes())

    def infer(self, images: Any) -> Any:
        """Logits (batch, classes) float32, or the first output, of C-contiguous images float32.

        Raises:
            RuntimeError: A kernel failed; the message is the kernel's.
        """
        return next(iter(self.infer_outputs(images).values()))

    def infer_outputs(self, images: Any) -> dict[str, Any]:
        """Each output by its name, float32; see `infer`."""
        import numpy

        found = numpy.empty(self.numbers, dtype=numpy.float32)
        if self._run(images.ctypes.data, found.ctypes.data) != 0:
            raise RuntimeError(self._failure())
        return {
            name: found[start : start + int(numpy.prod(shape))].reshape(shape)
            for name, (start, shape) in self.outputs.items()
        }

    def profile(self, images: Any, count: int) -> list[tuple[str, str, int, float]]:
        """(node, kernel, calls, seconds of all calls) of each step, in order."""
        import numpy

        library = self.library
        steps = int(library.vitrim_network_steps())
        seconds = numpy.zeros(steps, dtype=numpy.float64)
        found = numpy.empty(self.numbers, dtype=numpy.float32)
        pointers = [array.ctypes.data for array in (images, found, seconds)]
        for _ in range(2):
            self.infer(images)
        for _ in range(count):
            if library.vitrim_network_profile(*pointers) != 0:
                raise RuntimeError(self._failure())
        names = [library.vitrim_network_step(number).decode() for number in range(steps)]
        # Of a network with buckets, the steps of the other buckets did not run.
        return [
            (f"{number}.{name}", name, count, float(seconds[number]))
            for number, name in enumerate(names)
            if seconds[number] > 0 or not self.kept
        ]

    def watch(self, images: Any) -> list[tuple[str, bytes]]:
        """(node, bytes that it wrote) of each step, in order.

        Raises:
            EngineError: The library was exported by a version without this function.
            RuntimeError: A kernel failed.
        """
        import numpy

        try:
            run = self.library.vitrim_network_watch
        except AttributeError:
            raise EngineError("the model shows no inner values; export it again") from None
        seen: list[tuple[str, bytes]] = []
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)

        def record(number: int, written: int, size: int) -> None:
            name = self.library.vitrim_network_step(number).decode()
            seen.append((f"{number}.{name}", ctypes.string_at(written, size)))

        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, callback]
        found = numpy.empty(self.numbers, dtype=numpy.float32)
        if run(images.ctypes.data, found.ctypes.data, callback(record)) != 0:
            raise RuntimeError(self._failure())
        return seen

    def _failure(self) -> str:
        message = str(self.library.vitrim_network_failure().decode(errors="replace"))
        return message or "a kernel failed without a message"


def _require_processor(library: Any, name: str) -> None:
    try:
        refusal = library.vitrim_network_refusal
    except AttributeError:  # a library of an earlier version
        return
    refusal.restype = ctypes.c_char_p
    if (reason := refusal()) is not None:
        raise EngineError(f"{name}: {reason.decode(errors='replace')}")


def buffer_numbers(outputs: Sequence[Json]) -> int:
    """How many numbers the buffer of several outputs has; each begins at a multiple of 16.

    Args:
        outputs: Name and shape of each output, in the order of the library.
    """
    end = 0
    for entry in outputs:
        size = 1
        for extent in entry["shape"]:
            size *= int(extent)
        end = -(-end // ALIGNED_NUMBERS) * ALIGNED_NUMBERS + size
    return end


def _places(library: Any, file: str, outputs: Sequence[Json]) -> dict[str, tuple[int, list[int]]]:
    """First number and shape of each output, in the order of the job."""
    try:
        library.vitrim_network_output_name.restype = ctypes.c_char_p
        for function in (
            library.vitrim_network_output_start,
            library.vitrim_network_output_numbers,
        ):
            function.restype = ctypes.c_int64
        count = int(library.vitrim_network_outputs())
    except AttributeError:  # a library of an earlier version
        raise EngineError(f"{file}: has no named outputs; export the model again") from None
    numbers = {library.vitrim_network_output_name(i).decode(): i for i in range(count)}
    found = {}
    for entry in outputs:
        name, shape = str(entry["name"]), [int(size) for size in entry["shape"]]
        if name not in numbers:
            raise EngineError(f"{file}: has no output {name!r}; it has {', '.join(numbers)}")
        size = 1
        for extent in shape:
            size *= extent
        if size != int(library.vitrim_network_output_numbers(numbers[name])):
            raise EngineError(f"{file}: output {name!r} has another shape than {shape}")
        found[name] = (int(library.vitrim_network_output_start(numbers[name])), shape)
    return found


def _declare(library: Any) -> None:
    """Set the C types of the library's functions."""
    library.vitrim_network_run.argtypes = [ctypes.c_void_p] * 2
    library.vitrim_network_profile.argtypes = [ctypes.c_void_p] * 3
    for function in (library.vitrim_network_failure, library.vitrim_network_step):
        function.restype = ctypes.c_char_p
    for function in (
        library.vitrim_network_arena_bytes,
        library.vitrim_network_logit_numbers,
        library.vitrim_network_image_numbers,
    ):
        function.restype = ctypes.c_int64
