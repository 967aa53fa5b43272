"""What every runtime's engine has in common: open one model, answer one batch.

The files of this folder need Python 3.9 with numpy and their own runtime, and nothing of vitrim:
copied to a device beside the runner they do the same work there.

Job: model (path of the main file; its siblings lie beside it), runtime, threads, batch (for a free
batch dimension), output (name of the logits), input ({"name", "shape", "type"} as the manifest
tells it, for files that do not), session (the runtime's own settings, text to text), and what a
single runtime reads besides (providers, arena and spinning for onnxruntime).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

Json = dict[str, Any]
# A runtime that does not choose between devices ran on the processor.
CPU = "CPU"


class EngineError(Exception):
    """One line that says why the model cannot be run here, and the way out."""


class Requirement(NamedTuple):
    """A module that must be importable, and what pip is given to install it."""

    module: str
    install: str


class Engine:
    """One model in one runtime. A subclass fills in every attribute below: `runtime` and `version`
    in `__init__`, the others in `load`.

    __init__(job) imports the runtime and opens nothing, since the memory floor is read after it;
    load() opens the model.
    """

    runtime = ""
    version = ""
    # Which device really ran, and how many nodes ran where; None where the runtime does not tell.
    provider: str | None = CPU
    # On a GPU: whether what is timed includes carrying the images there and the logits back. None
    # elsewhere.
    copies_timed: bool | None = None
    provider_nodes: dict[str, int] | None = None
    input_name = "images"
    input_shape: list[int]
    input_type = "float32"
    output_name = "logits"

    def __init__(self, job: Json) -> None:
        self.job = job

    def load(self) -> None:
        """Open job["model"] with job["threads"]. Errors: EngineError."""
        raise NotImplementedError

    def infer(self, images: Any) -> Any:
        """Logits (batch, classes) float32 of images of `input_shape` and `input_type`,
        C-contiguous.
        """
        raise NotImplementedError

    def profile(self, images: Any, count: int) -> list[Json]:
        """One row an operator: node, operator, provider, output_shapes, calls, seconds (of one
        inference). Errors: EngineError.
        """
        raise EngineError(
            f"{self.runtime} has no profile of its operators here; measure without it, or profile the onnxruntime artifact"
        )

    def timed_call(self, images: Any) -> Callable[[], Any]:
        """What a timing calls: one whole answer. A device that works behind the program's back is
        waited for.

        With job["copies"] false an engine on a GPU leaves images and logits there, and what is
        timed is its work alone.
        """
        infer = self.infer
        return lambda: infer(images)

    def arena_bytes(self) -> int | None:
        """The highest that the runtime's own allocator held, where it tells."""
        return None

    def device_memory_peak_bytes(self) -> int | None:
        """The most that was taken of a GPU's memory, where the model runs on one that tells."""
        return None

    def require_file(self) -> str:
        """The path of the model. Errors: EngineError where no file is there."""
        path = str(self.job["model"])
        if not os.path.isfile(path):
            raise EngineError(
                f"{path}: no such file; give the path of a model that {self.runtime} opens"
            )
        return path

    def take_input(
        self, told: list[Any] | None = None, kind: str | None = None, name: str | None = None
    ) -> None:
        """Set the input from what the file tells (free sizes are anything but whole numbers above
        0), else from the job. Errors: EngineError.
        """
        given = self.job.get("input") or {}
        self.input_name = name or given.get("name") or self.input_name
        self.input_type = kind or given.get("type") or self.input_type
        shape = told if told is not None else given.get("shape")
        if not shape:
            raise EngineError(
                "the model's file does not tell its input, and the job does not either; measure an artifact's folder"
            )
        self.input_shape = concrete_shape(self.input_name, list(shape), self.job.get("batch"))

    def cannot_load(self, error: BaseException) -> EngineError:
        """The one line for a file that the runtime refuses."""
        return EngineError(
            f"{os.path.basename(str(self.job['model']))}: {self.runtime} {self.version} cannot load it: {one_line(error)}"
        )


def concrete_shape(name: str, shape: list[Any], asked: int | None) -> list[int]:
    """A shape without free sizes: a free first dimension becomes the batch that was asked for, or
    1. Errors: EngineError.
    """
    batch = int(asked or 1)
    found = []
    for position, size in enumerate(shape):
        if isinstance(size, int) and size > 0:
            if position == 0 and asked and size != batch:
                raise EngineError(
                    f"input {name!r} has the fixed batch {size}, and batch {batch} was asked for; export it so, or with a free batch"
                )
            found.append(size)
        elif position == 0:
            found.append(batch)
        else:
            raise EngineError(
                f"input {name!r} leaves dimension {position} open ({shape}); export the model with fixed image sizes"
            )
    return found


def missing(runtime: str, error: BaseException, needed: Requirement) -> EngineError:
    """The one line for a runtime that is not installed."""
    return EngineError(
        f"the runtime {runtime} is missing here: {one_line(error)}; install it with `python3 -m pip install {needed.install} numpy`"
    )


def one_line(error: BaseException) -> str:
    """An error's text on one line of at most 300 letters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
