"""The base class of all engines: open one model, run one batch.

The files of this folder need Python 3.9, numpy and their own runtime, but nothing of vitrim: copied
to a device next to the runner they work unchanged.

A job is a dict with

- model: path of the main file; the other files of the artifact are in the same folder;
- runtime, threads;
- batch: the batch size, for a model with a free batch dimension;
- output: name of the logits, or of the first output;
- outputs: {"name", "shape"} of every output in order, for a model that returns other outputs than
  the logits alone;
- input: {"name", "shape", "type", "layout"} as in the manifest, for files that do not contain them;
- cpu: {"target", "needs", "assumes"}, the instruction sets that the artifact states (cpu_features);
- session: the runtime's own settings, text to text;

and with the keys that a single engine reads, which its docstring lists.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

Json = dict[str, Any]
# The provider of runtimes that do not choose between devices.
CPU = "CPU"
_MOST_ERROR_CHARACTERS = 300


class EngineError(Exception):
    """Why a model cannot run here, and what to do about it, in one line."""


class Requirement(NamedTuple):
    """What an engine needs.

    Attributes:
        module: The module that must be importable.
        install: The arguments of `pip install` that provide it.
    """

    module: str
    install: str


class Engine:
    """One model in one runtime.

    `__init__` imports the runtime and opens nothing, since the runner reads the memory floor after
    it; `load` opens the model. A subclass sets `runtime` and `version` in `__init__`, the other
    attributes in `load`.

    Attributes:
        runtime: The runtime's name.
        version: The runtime's version.
        provider: The device that runs the model.
        provider_nodes: How many nodes run on each provider; None where the runtime does not report
            it.
        copies_timed: On a GPU, whether timed calls include copies between host and device; None
            elsewhere.
        input_name, input_shape, input_type: The model's input; the type is numpy's name.
        output_name: The output with the logits; the first one where there are several.
    """

    runtime = ""
    version = ""
    provider: str | None = CPU
    provider_nodes: dict[str, int] | None = None
    copies_timed: bool | None = None
    input_name = "images"
    input_shape: list[int]
    input_type = "float32"
    output_name = "logits"

    def __init__(self, job: Json) -> None:
        self.job = job

    def load(self) -> None:
        """Open job["model"] with job["threads"]; raises EngineError."""
        raise NotImplementedError

    @property
    def outputs(self) -> list[Json]:
        """Name and shape of each output, in order; empty for a model with logits alone."""
        return list(self.job.get("outputs") or [])

    def infer(self, images: Any) -> Any:
        """Compute logits, or the first output.

        Args:
            images: C-contiguous, of `input_shape` and `input_type`.

        Returns:
            Logits (batch, classes) float32.
        """
        raise NotImplementedError

    def infer_outputs(self, images: Any) -> dict[str, Any]:
        """Compute all outputs; an inference costs the same as with `infer`.

        Args:
            images: C-contiguous, of `input_shape` and `input_type`.

        Returns:
            Each output by its name, in order, float32; the logits alone where a model has no
            others.
        """
        return {self.output_name: self.infer(images)}

    def infer_chosen(self, images: Any) -> tuple[Any, int]:
        """Compute logits of one image in the bucket that its scores choose.

        Args:
            images: C-contiguous, of `input_shape` and `input_type`.

        Returns:
            Logits (1, classes) float32, and the number of patches that the image kept.

        Raises:
            EngineError: The model has no buckets, or does not return the number.
        """
        raise EngineError(f"{self.runtime} runs no model with buckets")

    def infer_choices(self, images: Any) -> list[Any]:
        """Run the model, and read which patches its selections choose.

        Args:
            images: C-contiguous, of `input_shape` and `input_type`.

        Returns:
            For each selection whose choice depends on the image, in order, the chosen places
            (images, kept) among the patches that the stream has there, increasing.

        Raises:
            EngineError: The runtime does not show them.
        """
        raise EngineError(f"{self.runtime} does not show which patches a model selects")

    def set_outputs(self, available: list[str]) -> list[str]:
        """Set `output_name`, and return the names of the outputs that the job contains.

        Args:
            available: The outputs of the model's file.

        Raises:
            EngineError: The model has no such output.
        """
        names = [str(entry["name"]) for entry in self.outputs]
        if not names:
            first = "logits" if "logits" in available else available[0]
            names = [str(self.job.get("output") or first)]
        for name in names:
            if name not in available:
                raise EngineError(
                    f"the model has no output {name!r}; it has {', '.join(available)}"
                )
        self.output_name = names[0]
        return names

    def profile(self, images: Any, count: int) -> list[Json]:
        """Time each operator.

        Args:
            images: As for `infer`.
            count: Number of inferences.

        Returns:
            One row an operator: node, operator, provider, output_shapes, calls, and seconds (of one
            inference).

        Raises:
            EngineError: The runtime has no profiler.
        """
        raise EngineError(
            f"{self.runtime} has no profile of its operators here; "
            "measure without it, or profile the onnxruntime artifact"
        )

    def timed_call(self, images: Any) -> Callable[[], Any]:
        """The function that a benchmark times: one inference, complete when it returns.

        Where the device works asynchronously the function waits for it. With job["copies"] false an
        engine on a GPU leaves images and logits on the device, and only computation is timed.
        """
        infer = self.infer
        return lambda: infer(images)

    def arena_bytes(self) -> int | None:
        """The peak of the runtime's own allocator; None where the runtime does not report it."""
        return None

    def device_memory_peak_bytes(self) -> int | None:
        """The peak of GPU memory; None without a GPU, or where it is not reported."""
        return None

    def require_file(self) -> str:
        """The path of the model; raises EngineError if there is no such file."""
        path = str(self.job["model"])
        if not os.path.isfile(path):
            raise EngineError(
                f"{path}: no such file; give the path of a model that {self.runtime} opens"
            )
        return path

    def set_input(
        self, shape: list[Any] | None = None, dtype: str | None = None, name: str | None = None
    ) -> None:
        """Set `input_name`, `input_shape` and `input_type`.

        Args:
            shape: The shape in the model's file; free sizes are anything but positive integers. By
                default the shape in the job.
            dtype: The type in the model's file, by default the job's.
            name: The name in the model's file, by default the job's.

        Raises:
            EngineError: No shape is given, or a size other than the batch is free.
        """
        given = self.job.get("input") or {}
        self.input_name = name or given.get("name") or self.input_name
        self.input_type = dtype or given.get("type") or self.input_type
        if shape is None:
            shape = given.get("shape")
        if not shape:
            raise EngineError(
                "neither the model's file nor the job contains the shape of the input; "
                "measure an artifact's folder"
            )
        self.input_shape = concrete_shape(self.input_name, list(shape), self.job.get("batch"))

    def cannot_load(self, error: BaseException) -> EngineError:
        """The error for a file that the runtime refuses."""
        name = os.path.basename(str(self.job["model"]))
        return EngineError(
            f"{name}: {self.runtime} {self.version} cannot load it: {one_line(error)}"
        )


def concrete_shape(name: str, shape: list[Any], batch: int | None) -> list[int]:
    """A shape without free sizes.

    Args:
        name: The input's name, for messages.
        shape: Sizes; free ones are anything but positive integers.
        batch: The size of a free first dimension, by default 1.

    Raises:
        EngineError: Another dimension is free, or the first is fixed to another size than `batch`.
    """
    wanted = int(batch or 1)
    found = []
    for position, size in enumerate(shape):
        if isinstance(size, int) and size > 0:
            if position == 0 and batch and size != wanted:
                raise EngineError(
                    f"input {name!r} has the fixed batch {size}, and batch {wanted} was requested; "
                    "export the model with that batch, or with a free batch"
                )
            found.append(size)
        elif position == 0:
            found.append(wanted)
        else:
            raise EngineError(
                f"input {name!r} leaves dimension {position} open ({shape}); "
                "export the model with fixed image sizes"
            )
    return found


def missing(runtime: str, error: BaseException, needed: Requirement) -> EngineError:
    """The error for a runtime that is not installed.

    Args:
        runtime: The runtime's name.
        error: What importing it raised.
        needed: What to install.
    """
    return EngineError(
        f"the runtime {runtime} is missing here: {one_line(error)}; "
        f"install it with `python3 -m pip install {needed.install} numpy`"
    )


def one_line(error: BaseException) -> str:
    """An error's text on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _MOST_ERROR_CHARACTERS:
        return text
    return text[: _MOST_ERROR_CHARACTERS - 3] + "..."
