"""The last steps of the chain: artifacts, their measurements and the report."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import io
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import __version__
from ..bench.report.model import Report
from ..bench.results.buckets import bucket_pattern
from ..bench.results.measurement import Measurement
from ..compress.data.decoding import write_pixels
from ..compress.data.splits import DataSplits, Split, stratified_indices
from ..compress.network.architecture import Architecture
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import TRIM_FILE
from ..compress.network.modules.model import CompactModel
from ..compress.network.patch_grid import format_image_size
from ..compress.surgery.image_size import at_image_size
from ..compress.tokens.buckets import BucketedModel
from ..compress.train.training_files import read_history
from ..core.console import progress_bar, status
from ..core.storage import disk_errors, replace_file
from ..export.artifact import Artifact
from ..export.resized_model import resampled_note
from .artifacts import ONNX_RUNTIME, Planned, planned_artifacts
from .bucket_step import bounds, measurement_names
from .estimates import run_estimates
from .kept_units import kept_branches, selection_map, token_map
from .latency_loop import latency_entry
from .magnitude_step import read_dead
from .phases import HISTORY, RunContext
from .recipe import Recipe
from .run_folder import RunFolder

ARTIFACTS, MEASUREMENTS = "artifacts", "measurements"
SAMPLE_SEED = 0
# Images that are decoded at a time.
_PART = 256
# Test images in the picture of where patches leave, and their largest side.
_SHOWN, _SHOWN_PX = 4, 112
# Test images over which it is averaged where patches are chosen for each image.
_AVERAGED = 128
VERSIONED = ("torch", "timm", "numpy", "onnx", "onnxruntime", "onnxsim")


@dataclass(frozen=True)
class TrainedModels:
    """The models of a run, and the relative error of the cut (`training_steps.Cut`).

    `exact`: the compact model without the dead weight of its zeros, where single weights are zero.
    `buckets`: the compact model with `masks.token_buckets`, which is then the one that ships.
    """

    baseline: CompactModel
    compact: CompactModel
    cut_error: float
    exact: CompactModel | None = None
    buckets: BucketedModel | None = None

    def by_name(self) -> dict[str, CompactModel | BucketedModel]:
        """The models by the names that artifacts have."""
        shipped = self.compact if self.buckets is None else self.buckets
        found = {"baseline": self.baseline, "compact": shipped}
        return found if self.exact is None else {**found, "exact": self.exact}


def export_all(models: TrainedModels, context: RunContext) -> dict[str, Artifact]:
    """Export the models to artifacts/; parity and int8 calibration use validation images."""
    from ..export.exporter import export
    from ..export.stage_line import stages_shown

    recipe, data, quiet = context.recipe, context.data, context.quiet
    images, _ = stratified_sample(data.val, recipe.export.calibration_images).arrays()
    provenance = {"recipe": recipe.name, "seed": str(recipe.train.seed), "data": data.name}
    by_name = models.by_name()
    made: dict[str, Artifact] = {}
    for name, plan in plans_of(recipe).items():
        status(f"exporting {name}", quiet=quiet)
        with stages_shown(quiet=quiet):
            made[name] = export(
                by_name[plan.model],
                context.folder / f"{ARTIFACTS}/{name}",
                target=recipe.export.target,
                runtime=plan.runtime,
                precision=plan.precision,
                threads=recipe.bench.threads,
                preprocessing=data.preprocessing,
                labels=list(data.labels),
                images=images,
                batch=recipe.export.batch,
                image_size=recipe.export.image_size,
                outputs=recipe.export.outputs,
                overwrite=True,
                name=name,
                provenance=provenance,
            )
    return made


def plans_of(recipe: Recipe) -> dict[str, Planned]:
    """The artifacts of a recipe by name."""
    return planned_artifacts(recipe.export, exact=recipe.masks.method == "magnitude")


def load_artifacts(recipe: Recipe, folder: RunFolder) -> dict[str, Artifact]:
    """Load the artifacts that `export_all` wrote."""
    names = plans_of(recipe)
    return {name: Artifact.load(folder / f"{ARTIFACTS}/{name}") for name in names}


def measure_all(artifacts: Mapping[str, Artifact], context: RunContext) -> dict[str, Measurement]:
    """Measure all artifacts interleaved, with their top-1 on the test images; buckets each.

    This machine measures them, or the device of `bench.on`.
    """
    from .bench_device import measured_artifacts

    bench = context.recipe.bench
    place = "" if bench.on is None else ", on the device of bench.on"
    status(f"measuring {', '.join(artifacts)}, interleaved{place}", quiet=context.quiet)
    with tempfile.TemporaryDirectory() as temporary:
        dataset = write_dataset(context.data, Path(temporary) / "test.npz", bench.top1_images)
        target = context.recipe.export.target
        measured = measured_artifacts(artifacts, bench, dataset, target=target, quiet=context.quiet)
    _remove_other_buckets(context, measured)
    for name, measurement in measured.items():
        measurement.save(context.folder / f"{MEASUREMENTS}/{name}.json")
    return measured


def _remove_other_buckets(context: RunContext, measured: Mapping[str, Measurement]) -> None:
    """Remove what an earlier recipe measured of the same artifacts with other buckets, or none."""
    folder = context.folder / MEASUREMENTS
    for name in plans_of(context.recipe):
        for path in (folder / f"{name}.json", *folder.glob(f"{bucket_pattern(name)}.json")):
            if path.stem not in measured:
                path.unlink(missing_ok=True)


def load_measurements(recipe: Recipe, folder: RunFolder) -> dict[str, Measurement]:
    """Load the measurements that `measure_all` wrote."""
    plans, masks = plans_of(recipe).items(), recipe.masks
    names = [each for name, plan in plans for each in measurement_names(name, plan, masks)]
    return {name: Measurement.load(folder / f"{MEASUREMENTS}/{name}.json") for name in names}


def write_dataset(data: DataSplits, path: Path, limit: int | None) -> Path:
    """Write test images for the runner: uint8 `images` (N, C, H, W) and int64 `labels` (N,).

    Images that are not decoded in advance are written one part after the other, to a folder.

    Args:
        data: Its test split is written.
        path: The .npz file; the folder has the same name without the suffix.
        limit: The largest number of images (default: all).

    Returns:
        The file or the folder.

    Raises:
        InputError: The disk is full, or an image cannot be decoded.
    """
    split = stratified_sample(data.test, limit)
    if split.decoded:
        images, labels = split.batch(slice(None))
        np.savez(path, images=images.numpy(), labels=labels.numpy())
        return path
    folder = path.with_suffix("")
    folder.mkdir()
    shape = (len(split), *split.preprocessing.image)
    with disk_errors(folder), (folder / "images.npy").open("wb") as stream:
        write_pixels(stream, shape, _decoded_parts(split))
    np.save(folder / "labels.npy", np.asarray(split.targets))
    return folder


def stratified_sample(split: Split, count: int | None) -> Split:
    """At most `count` images with the class proportions of the split.

    The first images of a folder may all be of one class.
    """
    if count is None or count >= len(split):
        return split
    return split.select(stratified_indices(split.targets, count, SAMPLE_SEED)[0])


def write_report(
    models: TrainedModels,
    artifacts: Mapping[str, Artifact],
    measurements: Mapping[str, Measurement],
    context: RunContext,
) -> Report:
    """Write kept.json, report.json, report.md and report.html to the run folder.

    Args:
        models: The trained models.
        artifacts: The exported artifacts by name.
        measurements: Their measurements by the names of `measurement_names`.
        context: The run; its data has the image size of the artifacts.

    Returns:
        The contents of report.json.
    """
    from ..bench.report import render

    recipe, folder = context.recipe, context.folder
    baseline = models.baseline.architecture
    # Where single weights are zero, what the exact removal of dead weight keeps.
    kept = kept_branches(baseline, (models.exact or models.compact).architecture)
    replace_file(folder / "kept.json", json.dumps(kept, indent=1) + "\n")
    # Counted at the image size of the artifacts, so that multiply-adds match latencies.
    architectures = {
        name: _exported(model.architecture, recipe) for name, model in models.by_name().items()
    }
    plans = plans_of(recipe)
    single = bounds(plans, measurements, recipe.masks)
    measured = {
        name: [measurements[each] for each in measurement_names(name, plan, recipe.masks)]
        for name, plan in plans.items()
    }
    entries = {
        name: _model_entry(
            architecture,
            {key: measured[key] for key, plan in plans.items() if plan.model == name},
            artifacts,
            single,
        )
        for name, architecture in architectures.items()
    }
    estimates = run_estimates(
        architectures,
        ("fp32", *recipe.export.precisions),
        recipe.report.estimate_for,
        _file_bytes(plans, single),
    )
    report = Report.model_validate(
        {
            "schema": "vitrim.report/1",
            "models": entries,
            "parity": _parity(models.cut_error, artifacts),
            "estimates": estimates,
            "title": recipe.name,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "recipe": recipe.name,
            "data": _data_text(context, baseline.image[1:]),
            "seed": recipe.train.seed,
            "data_seed": recipe.data.seed,
            "warnings": [*_unreadable(context), *resampled_notes(architectures.values())],
            "versions": versions(),
            "seconds": folder.seconds(),
            "tokens": _token_map(models.compact, context),
            "cut": _cut_errors(folder),
            "latency": latency_entry(recipe, baseline, folder.path, single),
            "zeros": read_dead(folder.path),
        }
    )
    replace_file(folder / "report.json", json.dumps(report.to_dict(), indent=1) + "\n")
    render(folder.path)
    return report


def _token_map(compact: CompactModel, context: RunContext) -> dict[str, Any] | None:
    """The entry `tokens` of report.json, with some test images."""
    found = token_map(compact.architecture)
    if compact.architecture.selects:
        averaged = context.data.test.floats(slice(0, _AVERAGED))
        found = selection_map(compact.eval(), averaged, _SHOWN)
    if found is None:
        return None
    images = context.data.test.batch(slice(0, _SHOWN))[0].numpy()
    return {**found, "images": [_png(image) for image in images]}


def _cut_errors(folder: RunFolder) -> dict[str, Any] | None:
    """The entry `cut` of report.json, from trim.json of a cut without training."""
    path = folder / TRIM_FILE
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    names = ("name", "predicted", "measured", "cost_share")
    return {
        "predicted": record["predicted_error"],
        "measured": record["check"].get("error"),
        "images": record["check"]["images"],
        "rows": [{name: row[name] for name in names} for row in record.get("rows", ())],
    }


def _png(image: NDArray[np.uint8]) -> str:
    """(channels, height, width) -> a PNG of at most `_SHOWN_PX` pixels a side, in base64."""
    pixels = image.transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((_SHOWN_PX, _SHOWN_PX))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _decoded_parts(split: Split) -> Iterator[NDArray[np.uint8]]:
    with progress_bar("decoding test images", len(split)) as advance:
        for start in range(0, len(split), _PART):
            yield split.batch(slice(start, start + _PART))[0].numpy()
            advance(min(len(split), start + _PART))


def _unreadable(context: RunContext) -> list[str]:
    """Warnings of images that could not be decoded, with `data.on_error = "skip"`."""
    found = []
    if context.data.left_out:
        found.append(f"{context.data.left_out} unreadable images are left out of the data set.")
    for name, split in (("validation", context.data.val), ("test", context.data.test)):
        count = 0 if isinstance(split.pixels, np.ndarray) else len(split.pixels.unreadable)
        if count:
            found.append(f"{count} unreadable {name} images are black.")
    epochs = [line.get("skipped_images", 0) for line in read_history(context.folder / HISTORY)]
    if any(epochs):
        found.append(f"up to {max(epochs)} unreadable images an epoch were skipped in training.")
    return found


def resampled_notes(architectures: Iterable[Architecture]) -> list[str]:
    """The lines about token masks that were resampled to the image size of the artifacts."""
    found = [
        resampled_note(architecture.image[1:])
        for architecture in architectures
        if architecture.tokens_resampled
    ]
    return list(dict.fromkeys(found))


def _exported(architecture: Architecture, recipe: Recipe) -> Architecture:
    size = recipe.export.image_size
    return architecture if size is None else at_image_size(architecture, size)


def _parity(cut_error: float, artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    parity = {"cut: masked against compact": cut_error}
    for name, artifact in artifacts.items():
        for stage in artifact.manifest.parity:
            key = f"{name}: {stage.title} against {stage.reference}"
            if stage.choices:
                key = f"{key}, {stage.choices_text}"
            parity[key] = stage.max_relative_error
    return parity


def _file_bytes(
    plans: Mapping[str, Planned], measurements: Mapping[str, Measurement]
) -> dict[tuple[str, str], int]:
    """File sizes by (model, precision); the estimates are of ONNX Runtime."""
    return {
        (plans[name].model, plans[name].precision): measured.file_bytes
        for name, measured in measurements.items()
        if plans[name].runtime == ONNX_RUNTIME
    }


def _data_text(context: RunContext, trained_size: tuple[int, ...]) -> str:
    data, size = context.data, context.recipe.export.image_size
    counts = {"training": data.train, "validation": data.val, "test": data.test}
    text = ", ".join(f"{len(split):,} {name}" for name, split in counts.items())
    text = f"{data.name}: {text} images"
    if size and size != trained_size:
        text += f"; artifacts at {format_image_size(size)}, without training at that size"
    return text


def versions() -> dict[str, str]:
    """Versions of vitrim, Python and the libraries that may change a figure."""
    found = {"vitrim": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _model_entry(
    architecture: Architecture,
    measured: Mapping[str, Sequence[Measurement]],
    artifacts: Mapping[str, Artifact],
    single: Mapping[str, Measurement],
) -> dict[str, Any]:
    """The entry of a model; `measured` has its artifacts, `single` what stands for each of all."""
    entries = [
        {
            "runtime": artifacts[name].manifest.runtime,
            "precision": artifacts[name].manifest.precision,
            "target": artifacts[name].manifest.target,
            "bytes": each.file_bytes,
            "measurement": each.to_dict(),
        }
        for name, own in measured.items()
        for each in own
    ]
    # The accuracy of a model is that of its first artifact: of a file that ran, not of the network
    # that it was exported from.
    return {
        "params": count_params(architecture),
        "macs": count_macs(architecture),
        "top1": single[next(iter(measured))].top1,
        "artifacts": entries,
    }
