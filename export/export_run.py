"""One export in progress: what was requested, the probe, and what has been recorded so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..targets.catalog import load_target
from .choices import Chosen, SelectionReference, outputs_and_choices
from .manifest import Array, CpuFeatures, FileEntry, Manifest, Parity, Provenance, TensorSpec
from .parity import Probe, require_agreement, require_parity
from .request import ExportRequest

# An emulated inference is hundreds of times slower: as many images as fit into this, at least one
# batch.
EMULATION_LIMIT_S = 30.0


@dataclass(frozen=True)
class ExportRun:
    """State that all stages of one export share.

    Attributes:
        request: The options.
        probe: The inputs on which every stage is compared, and the reference's outputs.
        first_batch: One batch of the probe's images, for the values inside a graph.
        reference: Name of what produced the probe's logits.
        selections: What the reference's selections of tokens choose, if it has any.
        stages: Parity of each stage so far.
        notes: Lines for the manifest so far.
    """

    request: ExportRequest
    probe: Probe
    first_batch: Array
    reference: str = "torch"
    selections: SelectionReference | None = None
    stages: list[Parity] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def outputs_of(self, graph: onnx.ModelProto) -> tuple[Array, Chosen | None]:
        """Run a graph on the probe's images: its outputs, and the choices of its selections."""
        names = () if self.selections is None else self.selections.values
        return outputs_and_choices(graph, names, self.probe.images, batch=self.request.batch)

    def compare(
        self,
        name: str,
        logits: Array,
        locate: Callable[[float], str | None],
        *,
        precision: str = "fp32",
        chosen: Chosen | None = None,
    ) -> list[Parity]:
        """Compare the outputs of a stage with the reference's, without recording it.

        Args:
            name: Name of the stage.
            logits: Its outputs; fewer rows than the probe has are compared with its first images.
            locate: Tolerance -> the first difference, or None; called only on failure.
            precision: Selects the tolerance.
            chosen: The tokens that the stage's selections chose. Errors are then those of the
                reference with the same choices. None: the network has none, or they are unknown.

        Returns:
            The figures, of each output if there are several.

        Raises:
            ParityError: The error exceeds the tolerance, or the classes agree less than by chance.
        """
        figures = []
        own = self.probe.first(len(logits))
        same, choices = own, None
        if self.selections is not None and chosen is not None:
            chosen = tuple(rows[: len(logits)] for rows in chosen)
            choices = self.selections.compare(chosen)
            same = replace(own, logits=self.selections.outputs_for(chosen, own.logits))
        parts = zip(same.parts(logits), own.parts(logits), strict=True)
        for (output, given, part), (_, probe, _) in parts:
            parity = given.compare(
                name,
                part,
                tolerance=self.request.numeric.tolerances[precision],
                reference=self.reference,
                precision=precision,
            )
            agreement = float((part.argmax(-1) == probe.logits.argmax(-1)).mean())
            update: dict[str, Any] = {"top1_agreement": agreement, "choices": choices}
            parity = parity.model_copy(update=update)
            if output is not None:
                classes = parity.top1_agreement if output.kind == "logits" else None
                update = {"output": output.name, "top1_agreement": classes}
                parity = parity.model_copy(update=update)
            require_parity(parity, locate)
            if parity.top1_agreement is not None:
                require_agreement(parity, probe.clear_agreement(part))
            figures.append(parity)
        return figures

    def check(
        self,
        name: str,
        logits: Array,
        locate: Callable[[float], str | None],
        *,
        precision: str = "fp32",
        chosen: Chosen | None = None,
    ) -> None:
        """Compare the outputs of a stage and record it; the arguments are those of `compare`.

        Args:
            name: Name of the stage.
            logits: Its outputs.
            locate: Tolerance -> the first difference, or None; called only on failure.
            precision: Selects the tolerance.
            chosen: The tokens that its selections chose.

        Raises:
            ParityError: See `compare`.
        """
        self.stages.extend(self.compare(name, logits, locate, precision=precision, chosen=chosen))

    def job(self, file: Path, session: Mapping[str, str], *, emulated: bool) -> dict[str, Any]:
        """Return the engine's job that runs a written file in a subprocess."""
        device = self.request.device
        shape = [self.request.input_batch, *self.request.shape]
        return {
            "runtime": device.runtime,
            "model": str(file.resolve()),
            "threads": device.threads,
            "input": {"name": "images", "shape": shape, "type": "float32"},
            "session": dict(session),
            **({"outputs": self.engine_outputs} if self.request.outputs else {}),
            **({"time_limit_s": EMULATION_LIMIT_S} if emulated else {}),
        }

    @property
    def engine_outputs(self) -> list[dict[str, Any]]:
        """The outputs as an engine's job states them."""
        batch = self.request.input_batch
        return [
            {"name": output.name, "shape": [batch, *output.shape]}
            for output in self.request.outputs
        ]

    def _output_specs(self, name: str) -> tuple[TensorSpec, ...]:
        """The manifest's entries for the outputs; `name` is that of the logits alone."""
        batch = self.request.symbolic_batch
        if not self.request.outputs:
            classes = int(self.probe.logits.shape[-1])
            return (TensorSpec(name=name, shape=(batch, classes), layout="NC"),)
        return tuple(
            TensorSpec(
                name=output.name,
                shape=(batch, *output.shape),
                layout="NC" if len(output.shape) == 1 else "NLC",
                kind=output.kind,
                meaning=output.meaning,
                grid=output.grid,
            )
            for output in self.request.outputs
        )

    def manifest(
        self,
        *,
        name: str,
        form: str,
        files: Sequence[FileEntry],
        provenance: Provenance,
        versions: Mapping[str, str],
        opset: int | None,
        session: Mapping[str, str],
        cpu: CpuFeatures,
        tensors: tuple[str, str] = ("images", "logits"),
    ) -> Manifest:
        """Return the manifest of the finished artifact.

        Args:
            name: Name of the model where the request has none.
            form: The form that was shipped.
            files: Entries of all files.
            provenance: Where the model came from.
            versions: Of the tools that made the artifact.
            opset: Of the standard's operators, where there is a graph.
            session: Settings that the runtime opens the model with.
            cpu: The instruction sets that the files need.
            tensors: Names of input and output.

        Returns:
            The manifest, not sealed yet.
        """
        request, fields = self.request, self.request.manifest
        batch = request.symbolic_batch
        return Manifest(
            name=fields.name or name,
            inputs=(
                TensorSpec(name=tensors[0], shape=(batch, *request.shape), layout=request.layout),
            ),
            outputs=self._output_specs(tensors[1]),
            batch=request.batch,
            preprocessing=fields.preprocessing,
            labels=fields.labels,
            opset=opset,
            target=load_target(request.device.target).name,
            cpu=cpu,
            runtime=request.device.runtime,
            precision=request.numeric.precision,
            form=form,
            session=dict(session),
            versions=dict(versions),
            files=tuple(files),
            parity=tuple(self.stages),
            provenance=provenance,
            notes=tuple(self.notes),
        )


def first_batch(request: ExportRequest, probe: Probe) -> Array:
    """Return the probe's first images, as many as the graph takes at once."""
    if request.batch == "dynamic":
        return probe.images[:2]
    if len(probe.images) >= request.batch:
        return probe.images[: request.batch]
    return np.repeat(probe.images[:1], request.batch, axis=0)
