"""A compiled network as a shared library of plain C functions, called without any runtime."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from .engine import EngineError


class CompiledProgram:
    """`model.so` with its entry `vitrim_network_run`. One inference at a time, also of two objects
    of the same file, since the memory is the library's own.
    """

    def __init__(self, path: str, shape: list[int], threads: int) -> None:
        import numpy

        try:
            library = ctypes.CDLL(os.path.abspath(path))
            self._run = library.vitrim_network_run
        except OSError as error:
            raise EngineError(
                f"{os.path.basename(path)}: cannot be loaded ({error}); export it for this machine"
            ) from None
        except AttributeError:
            raise EngineError(
                f"{os.path.basename(path)}: has no vitrim_network_run; export the model again"
            ) from None
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.vitrim_network_profile.argtypes = [ctypes.c_void_p] * 3
        library.vitrim_network_failure.restype = library.vitrim_network_step.restype = (
            ctypes.c_char_p
        )
        library.vitrim_network_arena_bytes.restype = ctypes.c_int64
        library.vitrim_network_logit_numbers.restype = (
            library.vitrim_network_image_numbers.restype
        ) = ctypes.c_int64
        wanted = int(library.vitrim_network_image_numbers())
        if int(numpy.prod(shape)) != wanted:
            raise EngineError(
                f"{os.path.basename(path)} takes {wanted} numbers, and the input's shape {shape} holds {int(numpy.prod(shape))}"
            )
        self.library = library
        self.shape = shape
        self.logits = (shape[0], int(library.vitrim_network_logit_numbers()) // shape[0])
        self.threads = int(library.vitrim_network_threads(threads))

    @property
    def arena_bytes(self) -> int:
        """Memory that was planned for values between the kernels."""
        return int(self.library.vitrim_network_arena_bytes())

    def infer(self, images: Any) -> Any:
        """Logits (batch, classes) float32 of images float32, C-contiguous. Errors: RuntimeError
        with the kernel's words.
        """
        import numpy

        found = numpy.empty(self.logits, dtype=numpy.float32)
        if self._run(images.ctypes.data, found.ctypes.data) != 0:
            raise RuntimeError(self._failure())
        return found

    def profile(self, images: Any, count: int) -> list[tuple[str, str, int, float]]:
        """(node, kernel, calls, seconds of all calls) for each step, in order."""
        import numpy

        steps = int(self.library.vitrim_network_steps())
        seconds = numpy.zeros(steps, dtype=numpy.float64)
        found = numpy.empty(self.logits, dtype=numpy.float32)
        for _ in range(2):
            self.infer(images)
        for _ in range(count):
            if (
                self.library.vitrim_network_profile(
                    images.ctypes.data, found.ctypes.data, seconds.ctypes.data
                )
                != 0
            ):
                raise RuntimeError(self._failure())
        names = [self.library.vitrim_network_step(number).decode() for number in range(steps)]
        return [
            (f"{number}.{name}", name, count, float(seconds[number]))
            for number, name in enumerate(names)
        ]

    def watch(self, images: Any) -> list[tuple[str, bytes]]:
        """(node, what it wrote) for each step, in order. Errors: EngineError where the library was
        written before this could be asked.
        """
        import numpy

        try:
            run = self.library.vitrim_network_watch
        except AttributeError:
            raise EngineError("the model shows no inner values; export it again") from None
        seen: list[tuple[str, bytes]] = []
        watcher = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)

        def told(number: int, written: int, size: int) -> None:
            seen.append(
                (
                    f"{number}.{self.library.vitrim_network_step(number).decode()}",
                    ctypes.string_at(written, size),
                )
            )

        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, watcher]
        found = numpy.empty(self.logits, dtype=numpy.float32)
        if run(images.ctypes.data, found.ctypes.data, watcher(told)) != 0:
            raise RuntimeError(self._failure())
        return seen

    def _failure(self) -> str:
        return (
            str(self.library.vitrim_network_failure().decode(errors="replace"))
            or "a kernel failed without a word"
        )
