"""A compiled network as a shared library of plain C functions, called without any runtime."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from .engine import EngineError


class CompiledProgram:
    """`model.so` with its entry `vitrim_network_run`.

    One inference at a time, for all objects of the same file together: the memory is the library's.

    Args:
        path: The library.
        shape: The shape of the images.
        threads: How many threads are requested; the library may use fewer.

    Raises:
        EngineError: The file is not such a library, takes images of another size, or has code that
            this processor cannot run.
    """

    def __init__(self, path: str, shape: list[int], threads: int) -> None:
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
        self.logits = (shape[0], int(library.vitrim_network_logit_numbers()) // shape[0])
        self.threads = int(library.vitrim_network_threads(threads))

    @property
    def arena_bytes(self) -> int:
        """The memory planned for values between the kernels."""
        return int(self.library.vitrim_network_arena_bytes())

    def infer(self, images: Any) -> Any:
        """Logits (batch, classes) float32 of C-contiguous images float32.

        Raises:
            RuntimeError: A kernel failed; the message is the kernel's.
        """
        import numpy

        found = numpy.empty(self.logits, dtype=numpy.float32)
        if self._run(images.ctypes.data, found.ctypes.data) != 0:
            raise RuntimeError(self._failure())
        return found

    def profile(self, images: Any, count: int) -> list[tuple[str, str, int, float]]:
        """(node, kernel, calls, seconds of all calls) of each step, in order."""
        import numpy

        library = self.library
        steps = int(library.vitrim_network_steps())
        seconds = numpy.zeros(steps, dtype=numpy.float64)
        found = numpy.empty(self.logits, dtype=numpy.float32)
        pointers = [array.ctypes.data for array in (images, found, seconds)]
        for _ in range(2):
            self.infer(images)
        for _ in range(count):
            if library.vitrim_network_profile(*pointers) != 0:
                raise RuntimeError(self._failure())
        names = [library.vitrim_network_step(number).decode() for number in range(steps)]
        return [
            (f"{number}.{name}", name, count, float(seconds[number]))
            for number, name in enumerate(names)
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
        found = numpy.empty(self.logits, dtype=numpy.float32)
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
