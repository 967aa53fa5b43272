"""The reference outputs of an imported graph: its own, without the runtime's optimisations.

A graph is refused that does not run, that returns no logits, whose outputs differ between two runs,
or whose outputs for an image depend on the rest of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...core.errors import InputError
from ..manifest import Array, Batch
from ..parity import (
    DYNAMIC_BATCH_IMAGES,
    first_mismatch,
    inner_values,
    relative_error,
    session_outputs,
)
from ..sessions import runtime_errors
from .image_input import ImageInput
from .model_proto import open_graph

# Kernels may sum in another order where buffers are aligned otherwise.
REPEATED = 1e-6
# Batches to try on a graph that refuses the requested one.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_RUNS = "export it again, or install an onnxruntime that runs it"


@dataclass(frozen=True)
class GraphReference:
    """An imported graph, as its file describes it.

    Attributes:
        graph: The graph.
        entry: Its input.
        path: Its file, for messages.
        batch: Images in a batch, or "dynamic".
        tolerance: Largest error relative to the largest logit that its precision allows.
    """

    graph: onnx.ModelProto
    entry: ImageInput
    path: Path
    batch: Batch
    tolerance: float

    def outputs(self, images: Array) -> Array:
        """Return the outputs for all images, after the checks.

        Args:
            images: (count, *shape), in the graph's order.

        Returns:
            Logits (count, classes) float32.

        Raises:
            InputError: The graph is refused; the message names the file and the reason.
        """
        with runtime_errors(str(self.path), _RUNS):
            session = open_graph(self.graph, optimised=False)
        size = min(len(images), DYNAMIC_BATCH_IMAGES) if self.batch == "dynamic" else self.batch
        first = np.resize(images, (size, *images.shape[1:]))
        logits = self._first_outputs(session, first)
        self._require_equal_runs(session, first, logits)
        self._require_independent_images(session, first, logits)
        with runtime_errors(str(self.path), _RUNS):
            found: Array = session_outputs(session, images, batch=self.batch)
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.path}: returns infinite or missing numbers; its weights are broken, or its "
                "images have another range: export with images of the data set"
            )
        return found.astype(np.float32, copy=False)

    def _first_outputs(self, session: Any, images: Array) -> Array:
        """Return the outputs of one batch, which must be logits."""
        with runtime_errors(str(self.path), _RUNS):
            try:
                logits = _run(session, images)
            except Exception:
                self._require_free_batch(session, len(images))
                raise
        if logits.ndim != 2 or logits.shape[1] == 0:
            raise InputError(
                f"{self.path}: returns shape {logits.shape}; a classifier returns (batch, classes)"
            )
        if len(logits) != len(images):
            self._require_free_batch(session, len(images))
            raise InputError(
                f"{self.path}: returns {len(logits)} rows of logits for {len(images)} images; "
                "export it again with a batch that is free in every node"
            )
        return logits

    def _require_free_batch(self, session: Any, refused: int) -> None:
        """Raise InputError if a batch that is declared free has one size inside."""
        if self.entry.batch is not None:
            return
        free = onnx.ModelProto()
        free.CopyFrom(self.graph)
        side = free.graph.input[0].type.tensor_type.shape.dim[0]
        side.Clear()
        side.dim_param = "batch"
        session = open_graph(free, optimised=False)
        for size in BATCHES:
            images = np.zeros((size, *self.entry.shape), np.float32)
            if size == refused or not _fits(session, images):
                continue
            requested = "a dynamic batch" if self.batch == "dynamic" else f"batch {self.batch}"
            raise InputError(
                f"{self.path}: declares a free batch, but its inside is made for batches of "
                f"{size}, so {requested} does not run; export with batch {size} (--batch {size}), "
                "or export the graph again with a batch that is free in every node"
            )

    def _require_equal_runs(self, session: Any, images: Array, logits: Array) -> None:
        with runtime_errors(str(self.path), _RUNS):
            others = [_run(session, images), _run(open_graph(self.graph, optimised=False), images)]
        difference = max(float(relative_error(logits, other).max()) for other in others)
        # Not a number is left to the message about such outputs.
        if difference > REPEATED:
            place = self._first_variable_node(images)
            raise InputError(
                f"{self.path}: two runs on the same images differ by {difference:.1e} of the "
                f"largest logit{place}; export the model for inference (eval mode)"
            )

    def _first_variable_node(self, images: Array) -> str:
        names = [name for node in self.graph.graph.node for name in node.output if name]
        left, right = (inner_values(self.graph, names, images) for _ in range(2))
        found = first_mismatch(self.graph, names, left, right, REPEATED)
        return f", first at {found}" if found else ""

    def _require_independent_images(self, session: Any, images: Array, logits: Array) -> None:
        """Compare the first image's outputs among other images, and alone if the batch is free."""
        if len(images) == 1:
            return
        with runtime_errors(str(self.path), _RUNS):
            found = [_run(session, np.concatenate([images[:1], -images[1:]]))[:1]]
            if self.batch == "dynamic":
                found.append(_run(session, images[:1]))
        scale = float(np.abs(logits).max()) or 1.0
        error = max(float(np.abs(other - logits[:1]).max()) / scale for other in found)
        if error > self.tolerance:
            raise InputError(
                f"{self.path}: the outputs of an image depend on the other images of its batch "
                f"(by {error:.1e} of the largest logit); export the model for inference, with a "
                "batch that is free in every node"
            )


def _run(session: Any, images: Array) -> Array:
    output = session.get_outputs()[0].name
    found: Array = session.run([output], {session.get_inputs()[0].name: images})[0]
    return found


def _fits(session: Any, images: Array) -> bool:
    try:
        logits = _run(session, images)
    except Exception:  # the runtime's errors share no type
        return False
    return logits.ndim == 2 and len(logits) == len(images)
