"""`vitrim export`: write artifacts of a saved model or of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from ..core.console import echo, show
from ..core.errors import InputError
from ..core.storage import require_output_folder
from ..targets.catalog import load_target
from .export_options import (
    DataOptions,
    GraphOptions,
    Model,
    Out,
    Output,
    Variant,
)
from .model_data import CARD, calibration_images, model_data, read_card
from .option_groups import with_option_groups

if TYPE_CHECKING:
    from ..bench.results.measurement import Measurement
    from ..compress.network.architecture import DataSpec
    from ..compress.network.modules.model import CompactModel
    from ..compress.tokens.buckets import BucketedModel
    from ..export.artifact import Artifact

Image = tuple[int, int, int]
MEASUREMENTS = "measurements"
# Time limit of the measurement with --runtime all.
ALL_LIMIT_S = 30.0


@with_option_groups
def export(
    *,
    model: Model,
    out: Out = None,
    variant: Variant,
    data: DataOptions,
    graph: GraphOptions,
    output: Output,
) -> None:
    """Write a runnable file with its manifest, and check after every stage that its outputs match.

    [bold]Examples[/bold]

      vitrim export runs/quickstart/compact --out small-int8 --precision int8

      vitrim export small --out small-any --batch dynamic --data imagefolder:photos

      vitrim export small --out small-160 --image-size 160

      vitrim export runs/quickstart/compact --out small --bundle small-cpp

      vitrim export small --out backbone --output features --output patches --output blocks.8

      vitrim export model.onnx --out small --data imagefolder:photos

      vitrim export runs/quickstart/compact --out everywhere --runtime all

      vitrim export --verify small-int8

    Args:
        model: A saved model, an .onnx file, or an artifact to verify.
        out: The folder of the artifact.
        variant: Which artifact of the model is written.
        data: The images for parity and calibration.
        graph: How the graph is built.
        output: What is written besides the artifact.
    """
    if output.verify:
        from ..export.artifact import verify

        echo(verify(model))
        return
    if out is None:
        raise InputError("--out is missing: name the folder for the artifact")
    request = _Request(model, out, variant, data, graph, output)
    request.require_outputs()
    if request.is_graph:
        artifact = _export_graph_file(request)
    elif variant.runtime == "all":
        _export_for_all_runtimes(request)
        return
    else:
        artifact = _export_model(request)
    _show_artifact(artifact, request)


@dataclass(frozen=True)
class _Request:
    """The arguments of the command."""

    model: Path
    out: Path
    variant: Variant
    data: DataOptions
    graph: GraphOptions
    output: Output

    def require_outputs(self) -> None:
        """Validate --out and --bundle.

        Raises:
            InputError: One cannot be written, or overlaps what is read.
        """
        from ..compress.data.named_datasets import path_of
        from ..export.artifact import ARTIFACT, ARTIFACTS
        from ..export.bundle import BUNDLE

        target = self.variant.target
        inputs: dict[str, Path | None] = {
            "the model": self.model,
            "the data set": path_of(self.data.data or ""),
            "the target": Path(target) if target.endswith(".toml") else None,
        }
        kind = ARTIFACTS if self.variant.runtime == "all" else ARTIFACT
        overwrite, bundle = self.output.overwrite, self.output.bundle
        require_output_folder(self.out, kind, overwrite=overwrite, inputs=inputs)
        if bundle is not None:
            inputs["the artifact"] = self.out
            require_output_folder(bundle, BUNDLE, overwrite=overwrite, inputs=inputs)
            if not self.is_graph:
                self.require_bundle(self.variant.batch_size or 1)

    def require_bundle(self, batch: int | Literal["dynamic"]) -> None:
        """Validate that --bundle fits the runtime and a batch size.

        Raises:
            InputError: It does not.
        """
        from ..export.bundle import require_bundle

        if self.output.bundle is not None:
            require_bundle(f"--bundle {self.output.bundle}", self.variant.runtime, batch)

    @property
    def is_graph(self) -> bool:
        """Whether the model is an .onnx file."""
        return self.model.suffix.lower() == ".onnx" and not self.model.is_dir()

    def arguments(
        self, image: Image, classes: int | None, stated: DataSpec | None = None
    ) -> dict[str, Any]:
        """The arguments that all exports share.

        Args:
            image: (channels, height, width) of the input.
            classes: Number of outputs; None if unknown, 0 for a model without classifier.
            stated: The data config of the model, where it is known.
        """
        variant, own = self.variant, self.is_graph
        return {
            "target": variant.target,
            # A graph has a precision and a batch of its own.
            "precision": variant.precision or (None if own else "fp32"),
            "batch": variant.batch_size or (None if own else 1),
            "calibration": self.data.calibration,
            "form": self.graph.form,
            "tune": self.graph.tune,
            "ort_format": self.graph.ort_format,
            "threads": self.graph.threads,
            "overwrite": self.output.overwrite,
            **self._images(image, classes, stated),
        }

    def _images(self, image: Image, classes: int | None, stated: DataSpec | None) -> dict[str, Any]:
        card = read_card(self.model.parent / CARD)
        data = model_data(card, self.data.data, image, stated)
        if data is None:
            if self.output.bundle is not None:
                raise InputError(
                    f"--bundle {self.output.bundle}: a bundle reads pictures, so the artifact "
                    "needs the preprocessing of a data set; name it with --data"
                )
            echo(
                "no data set is known for this model (--data NAME): parity is checked on noise, "
                "and the manifest contains no preprocessing",
                err=True,
            )
            return {"preprocessing": None, "labels": None, "images": None}
        # The preprocessing of a run produces images of the size of its training.
        size = {"height": image[1], "width": image[2]}
        preprocessing = data.preprocessing.model_copy(update=size)
        data = replace(data, preprocessing=preprocessing)
        images, labels = calibration_images(data, self.data.images, classes)
        return {"preprocessing": preprocessing, "labels": labels, "images": images}


def _export_model(request: _Request) -> Artifact:
    from ..export.exporter import export

    variant, graph = request.variant, request.graph
    network, image = _network(request)
    settings = graph.runtime_options()
    if variant.runtime == "tvm" and request.output.bundle is not None:
        # The bundle links the model into the program.
        settings.setdefault("static", "yes")
    return export(
        network,
        request.out,
        runtime=variant.runtime,
        opset=graph.opset,
        image_size=variant.image_size,
        options=settings,
        outputs=graph.outputs or None,
        **request.arguments(image, _labelled(network, graph.outputs), network.architecture.data),
    )


def _export_graph_file(request: _Request) -> Artifact:
    from ..export.graphs.graph_file import read_graph
    from ..export.graphs.image_input import ImageInput
    from ..export.graphs.imported_graph import classes_of, export_graph

    path, variant, graph = request.model, request.variant, request.graph
    source = read_graph(path)
    entry, classes = ImageInput.of(source, path), classes_of(source)
    request.require_bundle(variant.batch_size or entry.batch or 1)
    if variant.image_size is not None:
        raise InputError(
            f"{path}: the image size of an .onnx file is fixed; export it again at "
            f"{variant.image_size}, or name the saved model"
        )
    if graph.outputs:
        raise InputError(
            f"{path}: --output names parts of a model that vitrim saved, and an .onnx file keeps "
            "its own output; leave --output out, or name the saved model"
        )
    if variant.runtime != "onnxruntime" or graph.opset is not None or graph.option:
        raise InputError(
            f"{path}: an .onnx file is exported for onnxruntime and keeps its opset; "
            "leave --runtime, --opset and --option out"
        )
    return export_graph(path, request.out, **request.arguments(entry.image, classes))


def _labelled(network: CompactModel | BucketedModel, outputs: list[str] | None) -> int:
    """The number of classes that labels are for; 0 without a classifier or without its logits."""
    if network.architecture.head is None or (outputs and "logits" not in outputs):
        return 0
    return network.architecture.classes


def _network(request: _Request) -> tuple[CompactModel | BucketedModel, Image]:
    """The model as it was saved, and the (channels, height, width) of the artifact's input."""
    from ..compress.network.files import BUCKETS_FILE
    from ..compress.surgery.image_size import at_image_size
    from ..compress.tokens.buckets import load_bucketed
    from ..export.resized_model import require_memory
    from ..pipeline.source_model import load_folder

    if (request.model / BUCKETS_FILE).exists():
        model = load_bucketed(request.model)
        return model, model.architecture.image
    network = load_folder(request.model)
    if request.variant.image_size is None:
        return network, network.architecture.image
    # Refused before any file is read or written for it.
    resized = at_image_size(network.architecture, request.variant.image_size)
    require_memory(resized)
    return network, resized.image


def _show_artifact(artifact: Artifact, request: _Request) -> None:
    for stage in artifact.manifest.parity:
        line = (
            f"{stage.title} against {stage.reference}: "
            f"largest relative error {stage.max_relative_error:.1e}"
        )
        images = f"{stage.images} {stage.input_kind}"
        if stage.top1_agreement is None:
            echo(f"{line} on {images}")
        else:
            share = 100 * stage.top1_agreement
            echo(f"{line}, same top-1 class on {share:.1f} % of {images}")
        if stage.choices:
            echo(f"{stage.title} against {stage.reference}: {stage.choices_text} of {images}")
    for output in artifact.manifest.outputs:
        if output.meaning is not None:
            shape = " x ".join(map(str, output.shape))
            echo(f"output {output.name}: {shape}, {output.meaning}")
    for note in artifact.manifest.notes:
        echo(note)
    for warning in artifact.manifest.warnings:
        echo(f"warning: {warning}")
    echo(f"saved: {request.out} ({artifact.bytes / 1e6:.2f} MB)")
    if request.output.bundle is not None:
        from ..export.bundle import bundle

        folder = bundle(artifact, request.output.bundle, overwrite=request.output.overwrite)
        echo(f"bundle: {folder}")


def _export_for_all_runtimes(request: _Request) -> None:
    """Write OUT/RUNTIME and OUT/measurements/RUNTIME.json for each runtime, and rank them."""
    from ..bench.local.measure import measure_interleaved
    from ..export.exporter import export_all_runtimes
    from ..export.resized_model import IMAGE_SIZE

    if request.graph.option or request.output.bundle is not None:
        raise InputError(
            "--runtime all does not accept --option and --bundle, which are specific to one "
            "runtime; name the runtime"
        )
    _require_measurable(request.variant)
    out, threads = request.out, request.graph.threads
    network, image = _network(request)
    made, absent = export_all_runtimes(
        network,
        out,
        report_progress=lambda name: echo(f"exporting for {name}", err=True),
        opset=request.graph.opset,
        image_size=request.variant.image_size,
        outputs=request.graph.outputs or None,
        **request.arguments(
            image, _labelled(network, request.graph.outputs), network.architecture.data
        ),
    )
    measured = measure_interleaved(made, threads, time_limit_s=ALL_LIMIT_S)
    for name, measurement in measured.items():
        measurement.save(out / MEASUREMENTS / f"{name}.json")
    ranked = sorted(measured, key=lambda name: measured[name].summary().p50_s)
    fastest = f"{ranked[0]} ({measured[ranked[0]].runtime_version}), {out / ranked[0]}"
    show(_runtime_table(ranked, made, measured), f"fastest here: {fastest}")
    for name, reason in absent.items():
        echo(f"{name}: {reason}")
    for name in ranked:
        for warning in made[name].manifest.warnings:
            echo(f"warning: {name}: {warning}")
    for note in made["onnxruntime"].manifest.notes:
        if note.startswith(IMAGE_SIZE):
            echo(note)


def _require_measurable(variant: Variant) -> None:
    from ..runtimes.cpu_features import fitting_target
    from ..targets.detect import missing_features

    if missing := missing_features(load_target(variant.target)):
        raise InputError(
            f"--runtime all measures on this machine, and this processor has no "
            f"{', '.join(missing)}; use --target {fitting_target()} or host"
        )


def _runtime_table(
    ranked: list[str], made: dict[str, Artifact], measured: dict[str, Measurement]
) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in ("runtime", "p50", "95 %", "relative time", "memory", "file", "parity"):
        table.add_column(column, justify="left" if column == "runtime" else "right", no_wrap=True)
    best_s = measured[ranked[0]].summary().p50_s
    for name in ranked:
        found, p50_s = measured[name], measured[name].summary().p50_s
        spread, memory = found.interval(), found.beyond_floor_rss_bytes
        table.add_row(
            f"{name} {found.runtime_version}",
            f"{1e3 * p50_s:.3f} ms",
            f"{1e3 * spread.low:.3f} - {1e3 * spread.high:.3f}",
            f"{p50_s / best_s:.2f}",
            "" if memory is None else f"{memory / 1e6:.1f} MB",
            f"{made[name].bytes / 1e6:.2f} MB",
            f"{made[name].manifest.parity[-1].max_relative_error:.1e}",
        )
    return table
